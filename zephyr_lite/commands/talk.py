"""To be built."""

from __future__ import annotations


def chat() -> None:
    """To be built."""
    raise NotImplementedError
