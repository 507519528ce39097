"""The model: loading, adapters, the decoder."""
