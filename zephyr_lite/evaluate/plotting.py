"""matplotlib, which is an optional dependency."""

from __future__ import annotations

from importlib.util import find_spec

from ..errors import UserError


def have_matplotlib() -> bool:
    return find_spec("matplotlib") is not None


def need_matplotlib(what: str, without: str) -> None:
    """Raise a UserError if matplotlib is not installed.

    Args:
        what: is to be drawn: "the curves".
        without: the option that leaves it out.
    """
    if not have_matplotlib():
        raise UserError(
            f"{what} cannot be drawn: matplotlib is not installed.",
            f'pip install "zephyr-lite[plots]", or leave the picture out with {without}.',
        )
