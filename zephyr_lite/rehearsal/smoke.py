"""Twenty steps, a kill, a resume, merge and a generation, on the user's own card and data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..config import Method
from ..errors import UserError


def run_smoke(method: Method, config: str | None, overrides: Sequence[str], *, say: Callable[[str], None]) -> None:
    """Rehearse a stage."""
    raise UserError("--smoke: is being built.")
