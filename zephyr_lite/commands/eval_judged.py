"""To be built."""

from __future__ import annotations


def mt_bench() -> None:
    """To be built."""
    raise NotImplementedError


def alpaca() -> None:
    """To be built."""
    raise NotImplementedError
