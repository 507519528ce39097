"""``zephyr-lite reproduce``: a recipe from its first step to a row of results."""

from __future__ import annotations

from ..errors import UserError
from .options import Verbose


def reproduce(verbose: Verbose = False) -> None:
    """Run a recipe: both stages, merge, evaluation and report, and the row for the table of results."""
    raise UserError("reproduce: is being built.")
