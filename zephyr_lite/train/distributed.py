"""The processes of one run, as ``torchrun`` or ``accelerate launch`` starts them: one per GPU, on one machine or several.

Each holds the whole model and computes its share of every step's rows; one all-reduce sums the adapter's gradients. Rank 0
reads the configuration, prints, and writes the run's folder. A process that ends closes its connections, which ends the
others too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Interrupted, UserError
from ..io.interrupts import LOCAL_RANK, LOCAL_SIZE, RANK, launched, speaks

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# The longest that a process waits for another: rank 0 may tokenize for hours. A dead process is noticed at once.
TIMEOUT = timedelta(hours=12)


class PeerEnded(Exception):
    """Another process of the run has ended, and prints why itself; the command line exits with the same code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message, self.code = message, code


@dataclass(frozen=True)
class World:
    """This process among those of the run. Every method is a collective call, which all processes make at the same point."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on this machine

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._exchange("all_gather_object", found, value)
        return found

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            self._exchange("all_reduce", tensor)

    def broadcast(self, work: Callable[[], T]) -> T:
        """Call a function in rank 0; its result in all. It must not exchange anything itself.

        Raises:
            PeerEnded: the function failed there.
        """
        return work() if self.size == 1 else self.all_gather(self._call(work, self.is_main_process))[0]

    def main_process_first(self, work: Callable[[], T]) -> T:
        """Call a function in rank 0, then in the first process of every other machine, then in the rest, so that they find
        in the caches what the first has downloaded, tokenized or quantized.

        Raises:
            PeerEnded: the function failed in another process.
        """
        if self.size == 1:
            return work()
        turn = 0 if self.is_main_process else 1 if self.local_rank == 0 else 2
        return [self._call(work, turn == now) for now in range(3)][turn]

    def shard(self, items: Sequence[int], lengths: Sequence[int] | Any) -> list[int]:
        """This process's part of the items (see ``deal``)."""
        return list(items) if self.size == 1 else deal(items, lengths, self.size)[self.rank]

    def _call(self, work: Callable[[], T], here: bool) -> T:
        """The result of a function in the processes that call it ``here``; PeerEnded in all others if it fails in one."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = work() if here else None
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        failure = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        found = self.all_gather((failure, _exit_code(error)))
        if error is not None:
            raise error
        for rank, (message, code) in enumerate(found):
            if message is not None:
                raise PeerEnded(f"process {rank} ended: {message}", code)
        return result

    def _exchange(self, operation: str, *arguments: Any) -> None:
        import torch.distributed as dist

        try:
            getattr(dist, operation)(*arguments)
        except RuntimeError as error:  # the connection to a process that ended was closed
            raise PeerEnded(
                f"another process of the run has ended ({str(error).splitlines()[0][:200]}). "
                "The same command resumes from the last checkpoint.",
                1,
            ) from None


def sum_by_name(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum of each number over all parts, in their order."""
    total: dict[str, float] = {}
    for numbers in parts:
        for name, value in numbers.items():
            total[name] = total.get(name, 0.0) + value
    return total


def deal(items: Sequence[int], lengths: Sequence[int] | Any, size: int) -> list[list[int]]:
    """Split items among processes so that they finish together: longest processing time first (Graham 1969, at most 4/3 of
    the best). Within a part the order is kept.

    Args:
        items: indices into ``lengths``.
        lengths: tokens of each.
    """
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for place in sorted(range(len(items)), key=lambda place: (-int(lengths[items[place]]), place)):
        least = loads.index(min(loads))
        parts[least].append(place)
        loads[least] += int(lengths[items[place]])
    return [[items[place] for place in sorted(part)] for part in parts]


def _exit_code(error: BaseException | None) -> int:
    """The exit code that an error leads to (``cli.app.run``)."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return 128 + signal.SIGINT
    if isinstance(error, UserError):
        return 0 if getattr(error, "done", False) else 2
    return getattr(error, "code", 1)


_world = World()


def world() -> World:
    """This process among those of its run; alone unless ``joined``."""
    return _world


def everywhere(error: UserError, *, machine: bool = False) -> UserError:
    """Mark an error that is raised in all processes (``machine``: in all of this machine): one of them prints it."""
    first = os.environ.get(LOCAL_RANK, "0") == "0" if machine else speaks()
    error.said_elsewhere = launched() > 1 and not first  # type: ignore[attr-defined]
    return error


@contextmanager
def joined() -> Iterator[World]:
    """Within, this process exchanges with the others that a launcher started, if there are others."""
    global _world
    if launched() <= 1 or _world.size > 1:
        yield _world
        return
    import torch
    import torch.distributed as dist

    rank, local_rank, local_size = (int(os.environ.get(name, "0")) for name in (RANK, LOCAL_RANK, LOCAL_SIZE))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        if local_rank >= gpus:
            raise UserError(
                f"{local_size} processes were started on this machine, which has {gpus} GPU(s).",
                f"Start one per GPU: torchrun --nproc-per-node {gpus} -m zephyr_lite …",
            )
        torch.cuda.set_device(local_rank)
    try:
        # numbers and decisions go over gloo, gradients on GPUs over NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {rank} of {launched()} cannot connect to the others: {str(error).splitlines()[0]}",
            "Start all of them with torchrun or accelerate launch; on several machines with the same --rdzv-endpoint.",
        ) from None
    _world = World(rank, launched(), local_rank)
    try:
        yield _world
    finally:
        _world = World()
        dist.destroy_process_group()  # without a barrier: a process that fails must not wait for the others
