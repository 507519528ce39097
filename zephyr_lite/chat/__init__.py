"""Talk to a stage of a run, or to a merged model."""

from .model import Chat, load_chat

__all__ = ["Chat", "load_chat"]
