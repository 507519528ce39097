"""Durations and values as parts of messages."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``1 h 20 min``, ``2.5 days``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min" if minutes < 600 else f"{minutes / 60:.0f} h"
    return f"{minutes / 1440:.1f} days"


def short(value: object, length: int = 80) -> str:
    """The repr of a value, cut to ``length``."""
    text = repr(value)
    return text if len(text) <= length else text[: length - 1] + "…"
