"""Talk to a stage of a run, or to a merged model."""

from .generate import Chat, load_chat

__all__ = ["Chat", "load_chat"]
