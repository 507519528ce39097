"""To be built."""

from __future__ import annotations


def check() -> None:
    """To be built."""
    raise NotImplementedError
