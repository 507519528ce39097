"""``zephyr-lite report``: one file about a run, or about two side by side."""

from __future__ import annotations

from ..errors import UserError
from .options import Verbose


def report(verbose: Verbose = False) -> None:
    """Write report.html of a run, or of two runs side by side."""
    raise UserError("report: is being built.")
