"""Upper bounds of what a job costs, and what it has cost while it runs.

A prompt is counted by its bytes and a reply by its ``max_tokens``: usually three to five times what is spent. Only a budget
limits a job exactly.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from ..io.text import duration
from .client import Request, RequestFailed, prompt_token_bound
from .endpoints import EndpointSpec
from .jobs import Budget
from .request_log import NAME, Reply, Totals

PIPE_SECONDS = 30.0  # between two lines where the output is no terminal


@dataclass
class Bound:
    """Upper bounds for some requests, each answered at its first try."""

    requests: int = 0
    tokens: int = 0
    dollars: float = 0.0


class CostClient:
    """Takes the place of a ``ModelClient`` to learn what a job costs at most: sends nothing and adds up its requests.

    Each reply is as long as it may be, with a text of one byte a token that differs from all others; none can be parsed.

    Attributes:
        bounds: {endpoint: upper bounds of its requests}.
    """

    def __init__(self, specs: Mapping[str, EndpointSpec]) -> None:
        self._specs = specs
        self.bounds = {name: Bound() for name in specs}

    async def ask(self, request: Request) -> Reply:
        spec = self._specs[request.endpoint]
        body = request.body(spec)
        prompt, length = prompt_token_bound(body["messages"]), body["max_tokens"]
        bound = self.bounds[spec.name]
        bound.requests += 1
        bound.tokens += prompt + length
        bound.dollars += spec.dollars(prompt, length)
        name = hashlib.sha256(request.key.encode()).hexdigest()
        return Reply((name * (length // len(name) + 1))[:length], "stop", prompt, length)

    async def ask_parsed(self, request: Request, parse: Callable[[str], Any], tries: int = 3) -> Any:
        await self.ask(request)
        raise RequestFailed("nothing is sent")


def bound_lines(bounds: Mapping[str, Bound], specs: Iterable[EndpointSpec]) -> list[str]:
    """One line per endpoint, and one for all of them."""
    priced = has_prices(specs)
    total = Bound(*(sum(getattr(b, name) for b in bounds.values()) for name in ("requests", "tokens", "dollars")))
    lines = [
        f"{name}: {b.requests:,} requests, {b.tokens:,} tokens at most" + (f", ${b.dollars:,.2f}" if priced else "")
        for name, b in {**bounds, "in all, every request answered at its first try": total}.items()
    ]
    if not priced:
        lines.append("no prices are given (input_price, output_price: US dollars per million tokens)")
    return [*lines, "failed tries and unreadable replies come on top; --max-requests and --max-tokens are exact limits"]


def has_prices(specs: Iterable[EndpointSpec]) -> bool:
    """Whether any endpoint has a price."""
    return any(spec.input_price or spec.output_price for spec in specs)


def budget_lines(budget: Budget, out: Path) -> list[str]:
    """What limits a job, and whether its folder holds replies already."""
    limits = [f"{value:,} {unit}" for unit, value in budget if value is not None]
    lines = [
        f"budget: {' and '.join(limits)}, never exceeded" if limits else "no budget (--max-requests, --max-tokens)"
    ]
    if (out / NAME).is_file():
        lines.append(f"requests that {out} holds are not sent again; they are not deducted here")
    return lines


class Meter:
    """Items done, requests, tokens, dollars and the time left: a bar in a terminal, a line now and then in a pipe.

    Args:
        total: number of items.
        unit: their name: "prompts".
        priced: whether dollars are shown.

    Attributes:
        totals: what is shown as spent; of the job's ``ModelClient``.
    """

    def __init__(self, console: Console, total: int, unit: str, priced: bool) -> None:
        self.totals = Totals()
        self._console, self._unit, self._priced = console, unit, priced
        self._last_line = time.monotonic()
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[spent]}")
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(unit, total=total, spent="")

    def __enter__(self) -> Meter:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Count one more item as done, and show ``412 requests  98,313 tokens  $0.0421  12 min left``."""
        totals, task = self.totals, self._progress.tasks[self._task]
        parts = [f"{totals.requests:,} requests", f"{totals.tokens - totals.held:,} tokens"]
        if self._priced:
            parts.append(f"${totals.dollars + totals.lost_dollars:,.4f}")
        if left := task.time_remaining:
            parts.append(f"{duration(left)} left")
        spent = "  ".join(parts)
        self._progress.update(self._task, advance=1, spent=spent)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= PIPE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{self._unit} {task.completed:,.0f}/{task.total:,.0f}  {spent}")
