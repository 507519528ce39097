"""Take the merged model elsewhere: GGUF, Ollama, a model card, the hub."""
