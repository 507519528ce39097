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


class Turns:
    """Lets tasks through one by one in the order of their numbers, from 0. Each calls ``done`` once, whether or not it
    has waited: a number that is done early is passed over when its turn comes."""

    def __init__(self) -> None:
        self._next = 0
        self._done: set[int] = set()
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def wait(self, number: int) -> None:
        """Returns when all before this one are done."""
        if number > self._next:
            self._waiting[number] = asyncio.get_running_loop().create_future()
            await self._waiting[number]

    def done(self, number: int) -> None:
        self._done.add(number)
        while self._next in self._done:
            self._done.remove(self._next)
            self._next += 1
        waiting = self._waiting.pop(self._next, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)


@contextmanager
def grace_said(say: Callable[[str], None]) -> Iterator[None]:
    """At an interrupt, say why the command does not end at once."""
    try:
        yield
    except asyncio.CancelledError:
        say("interrupted: waiting a moment for answers that are on their way, for they are paid for (again: at once)")
        raise
