"""Blocks of rows in several processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

from ..data.workers import interruptible

Item = TypeVar("Item")
Result = TypeVar("Result")
_job: Callable[[Any], Any]


def in_processes(job: Callable[[Item], Result], items: Iterable[Item], processes: int, title: str) -> Iterator[Result]:
    """``map(job, items)`` in order, with a progress bar in a terminal.

    Args:
        job: sent to each process once.
        processes: 1 for this process alone.
    """
    items = list(items)
    bar = {"console": Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
    processes = min(processes, len(items))
    if processes <= 1:
        yield from track(map(job, items), title, len(items), **bar)  # type: ignore[arg-type]
        return
    with interruptible(), multiprocessing.Pool(processes, _start, (job,)) as pool:
        yield from track(pool.imap(_run, items), title, len(items), **bar)  # type: ignore[arg-type]


def _start(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job


def _run(item: Any) -> Any:
    return _job(item)
