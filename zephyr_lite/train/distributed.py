"""The processes of one run, as ``torchrun`` or ``accelerate launch`` starts them: one per GPU, on one machine or several.

Each holds the whole model and computes its share of every step's rows; one all-reduce sums the adapter's gradients. Rank 0
reads the configuration, prints, and writes the run's folder. A process that fails tells the others, so that none waits for
it.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
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
PATIENCE = timedelta(hours=12)


class PeerEnded(Exception):
    """Another process of the run has ended, and prints why itself; the command line exits with the same code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message, self.code = message, code
        self.interrupted = code == 128 + signal.SIGINT


@dataclass(frozen=True)
class World:
    """This process among those of the run. Every method is a collective call, which all processes make at the same point; it
    raises ``PeerEnded`` in all the others where one fails.

    Attributes:
        rank, size: of all processes.
        local_rank, local_size: of those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _exchange():
            dist.all_gather_object(found, value)
        return found

    def each(self, work: Callable[[], T]) -> list[T]:
        """Call a function in every process; the results by rank. The function must not exchange anything itself.

        Raises:
            PeerEnded: the function failed in another process; where it failed its own error is raised.
        """
        if self.size == 1:
            return [work()]
        result: Any = None
        error: BaseException | None = None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as caught:
            error = caught
        failure = None if error is None else (_code(error), " ".join(f"{type(error).__name__}: {error}".split())[:300])
        found = self.gather((result, failure))
        if error is not None:
            raise error
        for rank, (_, failed) in enumerate(found):
            if failed is not None:
                raise PeerEnded(f"process {rank} ended: {failed[1]}", failed[0])
        return [value for value, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """Call a function in every process; this process's own result, which is not sent."""
        if self.size == 1:
            return work()
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    def lead(self, work: Callable[[], T]) -> T:
        """Call a function in rank 0; its result in all."""
        return self.each(work if self.writes else nothing)[0]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Call a function in rank 0, then in the first process of every other machine, then in the rest, so that they find
        in the caches what the first has downloaded, tokenized or quantized; this process's own result."""
        mine = 0 if self.writes else 1 if self.local_rank == 0 else 2
        kept: list[T] = []
        for turn in range(3):
            self.each(lambda: kept.append(work()) if turn == mine else None)  # noqa: B023 (called at once)
        return kept[0]

    def sums(self, work: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Call a function in every process and sum its numbers by name, in the order of ranks: the same bits in all."""
        total: dict[str, float] = {}
        for numbers in self.each(work):
            for name, value in numbers.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            import torch.distributed as dist

            with _exchange():
                dist.all_reduce(tensor)

    def share(self, items: Sequence[int], lengths: Sequence[int] | Any) -> list[int]:
        """This process's part of the items (see ``deal``)."""
        return list(items) if self.size == 1 else deal(items, lengths, self.size)[self.rank]


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


@contextmanager
def _exchange() -> Iterator[None]:
    """An exchange with the others. A killed process is noticed by the end of its connections. A process that was
    interrupted within an exchange must not begin another: the others would take its values for those of the first."""
    global _left
    if _left:
        raise KeyboardInterrupt
    try:
        yield
    except KeyboardInterrupt:
        _left = True
        raise
    except RuntimeError as error:
        raise PeerEnded(
            f"another process of the run is gone ({str(error).splitlines()[0][:200]}). "
            "The same command resumes from the last checkpoint.",
            1,
        ) from None


def nothing(*args: Any) -> Any:
    """Does nothing: what processes other than rank 0 print."""


def _code(error: BaseException) -> int:
    """The exit code that an error leads to (``cli.app.run``)."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return 128 + signal.SIGINT
    if isinstance(error, UserError):
        return 0 if getattr(error, "done", False) else 2
    return getattr(error, "code", 1)


_here = World()
_left = False  # this process was interrupted within an exchange


def world() -> World:
    """This process among those of its run; alone unless ``joined``."""
    return _here


def everywhere(error: UserError, *, machine: bool = False) -> UserError:
    """Mark an error that is raised in all processes (``machine``: in all of this machine): one of them prints it."""
    first = os.environ.get(LOCAL_RANK, "0") == "0" if machine else speaks()
    error.said_elsewhere = launched() > 1 and not first  # type: ignore[attr-defined]
    return error


@contextmanager
def joined() -> Iterator[World]:
    """Within, this process exchanges with the others that a launcher started, if there are others.

    Raises:
        UserError: the processes cannot connect, or there are more of them on this machine than GPUs.
    """
    global _here, _left
    if launched() <= 1 or _here.size > 1:
        yield _here
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
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {rank} of {launched()} cannot connect to the others: {str(error).splitlines()[0]}",
            "Start all of them with torchrun or accelerate launch; on several machines with the same --rdzv-endpoint.",
        ) from None
    _here, _left = World(rank, launched(), local_rank, local_size or 1), False
    try:
        yield _here
    finally:
        _here = World()
        dist.destroy_process_group()  # without a barrier: a process that fails must not wait for the others


def sees(folder: Any) -> None:
    """Check that every process sees the run's folder.

    Raises:
        UserError: one does not; names its machine.
    """
    found = _here.gather((socket.gethostname(), os.path.isdir(folder)))
    if blind := sorted({host for host, there in found if not there}):
        raise everywhere(
            UserError(
                f"{folder}: does not exist on {', '.join(blind)}.",
                "All machines need the run's folder, the data and the base at the same paths: use a shared disk.",
            )
        )
