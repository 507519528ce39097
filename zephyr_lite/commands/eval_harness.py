"""To be built."""

from __future__ import annotations


def harness() -> None:
    """To be built."""
    raise NotImplementedError
