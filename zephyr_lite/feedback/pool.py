"""Many tasks at once, results in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def in_order(items: Iterable[T], work: Callable[[T], Awaitable[R]], window: int) -> AsyncIterator[tuple[T, R]]:
    """(item, its result), in the items' order, whatever order they are finished in.

    Args:
        items: read as room is made, so it may be long.
        work: what is done with one; its error ends everything, and is raised where its result would stand.
        window: how many are under way or wait for their turn: this bounds memory too.
    """
    tasks: deque[tuple[T, asyncio.Task[R]]] = deque()
    rest = iter(items)
    try:
        while True:
            while len(tasks) < window:
                try:
                    item = next(rest)
                except StopIteration:
                    break
                tasks.append((item, asyncio.ensure_future(_started(work, item))))
            if not tasks:
                return
            head = tasks[0][1]
            while not head.done():
                running = [task for _, task in tasks if not task.done()]
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:  # an error further back is not kept waiting behind a slow first
                    if task.exception() is not None:
                        await task
            item, task = tasks.popleft()
            yield item, await task
    finally:
        await cancel([task for _, task in tasks])


async def _started(work: Callable[[T], Awaitable[R]], item: T) -> R:
    return await work(item)


async def cancel(tasks: Iterable[asyncio.Task[R]]) -> None:
    """Cancel what runs, and wait until it has let go of what it holds."""
    running = list(tasks)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


@contextmanager
def grace_said(say: Callable[[str], None]) -> Iterator[None]:
    """At an interrupt, say why the command does not end at once."""
    try:
        yield
    except asyncio.CancelledError:
        say("interrupted: waiting a moment for answers that are on their way, for they are paid for (again: at once)")
        raise
