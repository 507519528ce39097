"""``zephyr-lite data stats``."""

from __future__ import annotations

from ..errors import UserError


def stats() -> None:
    """Lengths, what is cut and dropped, how full rows are, tokens and steps."""
    raise UserError("not built yet.")
