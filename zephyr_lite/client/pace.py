"""How fast an endpoint is asked: so many at once, so many a minute, and slower when it says so."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import UTC
from email.utils import parsedate_to_datetime

LONGEST_BACK_OFF = 60.0  # seconds
LONGEST_SLOWING = 5.0  # seconds between two requests


class Pace:
    """One endpoint's.

    Args:
        concurrency: requests under way at once.
        requests_per_minute: evenly spaced, so that no minute sees more.
        back_off: seconds of the first wait after a failure; each further one is twice as long.
    """

    def __init__(self, concurrency: int, requests_per_minute: float | None, back_off: float) -> None:
        self.slots = asyncio.Semaphore(concurrency)
        self.back_off = back_off
        self._space = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._first_slowing = back_off / concurrency
        self._slowing = 0.0  # more space, where the endpoint has said that it has too much to do
        self._paused_until = 0.0
        self._next = 0.0  # when the next request may leave, on the monotonic clock

    def delay(self) -> float:
        """Seconds until a request may leave; 0: now."""
        return max(0.0, self._next - time.monotonic())

    def leave(self) -> None:
        """A request leaves."""
        self._next = time.monotonic() + self._space + self._slowing

    def pause(self, seconds: float) -> None:
        """Nobody asks for so long: the server has too much to do. Afterwards those who waited do not come all at once:
        they leave further apart, twice as far each time that it happens again, until answers come."""
        now = time.monotonic()
        if now >= self._paused_until:  # not one of several that were turned away together
            self._slowing = min(LONGEST_SLOWING, max(2 * self._slowing, self._first_slowing))
        self._paused_until = max(self._paused_until, now + seconds)
        self._next = max(self._next, self._paused_until)

    def answered(self) -> None:
        """An answer came: a little faster again."""
        self._slowing = 0.8 * self._slowing if self._slowing > 1e-3 else 0.0

    def wait_after(self, tries: int) -> float:
        """Seconds to wait after the n-th failed try: exponential, and not the same for all who failed together."""
        longest = min(LONGEST_BACK_OFF, self.back_off * 2.0 ** min(tries - 1, 30))
        return longest * random.uniform(0.5, 1.0)


def retry_after(headers: dict[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``retry-after-ms``, or ``retry-after`` in seconds or as a date (RFC 9110)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        when = parsedate_to_datetime(headers["retry-after"])
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return max(0.0, when.timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
