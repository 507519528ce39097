"""To be built."""

from __future__ import annotations


def loss() -> None:
    """To be built."""
    raise NotImplementedError


def preference() -> None:
    """To be built."""
    raise NotImplementedError
