"""Chat models that answer requests, behind an OpenAI-compatible server or in a local folder."""
