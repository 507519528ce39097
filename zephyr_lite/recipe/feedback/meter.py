"""How far a job is: a bar in a terminal, a line now and then in a pipe; with what it has asked, and what that cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ...client.budget import Totals
from ...io.words import duration

PIPE_SECONDS = 30.0  # between two lines of a pipe


class Meter:
    """Shows ``done/total`` of something, requests, tokens, dollars and the time that is left.

    Args:
        console: where to.
        total: of the things that are counted.
        unit: their name: "prompts".
        priced: whether any endpoint has a price; a cost of $0.00 that only says that nobody named one is not shown.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        console: RichConsole,
        total: int,
        unit: str,
        priced: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._unit, self._priced, self._clock = console, total, unit, priced, clock
        self.done = 0
        self._totals = Totals()
        # since when replies come that the journal did not hold, and how much was done then: what the journal holds takes
        # no time, and would promise too much
        self._fresh_since: tuple[float, int] | None = None
        self._waiting_since = clock()
        self._replies: int | None = None
        self._last_line = clock()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(unit, total=total, said="")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def totals(self, totals: Totals) -> None:
        """What has been spent; ``open_desk``'s ``on_progress``."""
        if self._fresh_since is None:
            if self._replies is not None and totals.replies > self._replies:
                self._fresh_since = (self._waiting_since, self.done)
            self._waiting_since, self._replies = self._clock(), totals.replies
        self._totals = totals
        self._show()

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        self._show()

    def said(self) -> str:
        """``412 requests  98,313 tokens  $0.0421  12 min left``."""
        # without what is held for replies that are under way: a figure that shrinks would be hard to understand
        spent = self._totals.prompt_tokens + self._totals.completion_tokens + self._totals.lost_tokens
        parts = [f"{self._totals.requests:,} requests", f"{spent:,} tokens"]
        if self._priced:
            parts.append(f"${self._totals.dollars + self._totals.lost_dollars:,.4f}")
        if (left := self._left()) is not None:
            parts.append(f"{duration(left)} left")
        return "  ".join(parts)

    def _left(self) -> float | None:
        if self._fresh_since is None or self.done >= self._total:
            return None
        since, before = self._fresh_since
        if self.done == before:
            return None
        return (self._clock() - since) / (self.done - before) * (self._total - self.done)

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, said=self.said())
        elif self._clock() - self._last_line >= PIPE_SECONDS:
            self._last_line = self._clock()
            self._console.print(f"{self._unit} {self.done:,}/{self._total:,}  {self.said()}")
