"""``zephyr-lite data show``."""

from __future__ import annotations

from ..errors import UserError


def show() -> None:
    """A row the way training sees it, token by token."""
    raise UserError("not built yet.")
