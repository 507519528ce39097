"""To be built."""

from __future__ import annotations


def gguf() -> None:
    """To be built."""
    raise NotImplementedError


def ollama() -> None:
    """To be built."""
    raise NotImplementedError


def card() -> None:
    """To be built."""
    raise NotImplementedError


def push() -> None:
    """To be built."""
    raise NotImplementedError
