"""Chat models that answer requests: servers that speak the OpenAI chat API, or a local folder; journal and budget."""
