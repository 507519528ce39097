"""The processes of one run: ``torchrun -m zephyr_lite sft …`` starts one a card, on one machine or several.

Each holds the whole model and works on its share of every step's rows; the adapter's gradients are summed in one
all-reduce. One of them, the writer (rank 0), reads the user's mind and writes the run's folder; the others read it.
Whatever is decided is decided in one place or from numbers that all have: that is what keeps them in step. A process that
fails tells the others, so that nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import Interrupted, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# The longest that a process waits for another: the writer may tokenize for hours. One that died is noticed at once.
PATIENCE = timedelta(hours=12)
# what torchrun, accelerate and others tell the processes that they start
_RANK, _SIZE, _LOCAL_RANK, _LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
_LAUNCHERS = (
    _RANK,
    _SIZE,
    _LOCAL_RANK,
    _LOCAL_SIZE,
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "ROLE_RANK",
    "NODE_RANK",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
)
_LAUNCHERS_BEGIN = (
    "OMPI_COMM_WORLD_",
    "PMI_",
    "MV2_COMM_WORLD_",
    "TORCHELASTIC_",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON",
    "ACCELERATE_USE_PARALLELISM",
    "ACCELERATE_USE_TP",
)
# Seconds in which a second signal is the launcher's copy of the first (see ``echoes``).
ECHO = 5.0


class PeerEnded(Exception):
    """Another process of the run has ended; it says itself why. The command line exits with its code.

    Args:
        message: which one, and what it was.
        code: its exit code.

    Attributes:
        interrupted: it was asked to end.
        heard_by: the rank of this process.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message, self.code = message, code
        self.interrupted = code == 128 + signal.SIGINT
        self.heard_by = _here.rank


@dataclass(frozen=True)
class World:
    """This process among those of the run; alone, everything here is what it would be without it.

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
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What every process has, by rank. All of them must call it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _alive():
            dist.all_gather_object(found, value)
        return found

    def each(self, work: Callable[[], T]) -> list[T]:
        """Run it everywhere; the results by rank. What is run must not itself exchange anything with the others.

        Raises:
            PeerEnded: it failed in another process; in the one where it failed, what it raised.
        """
        if self.size == 1:
            return [work()]
        result, error = _tried(work)
        found = self.gather((result, None if error is None else _code(error), _said(error)))
        if error is not None:
            raise error
        self._all_well([(code, said) for _, code, said in found])
        return [value for value, _, _ in found]  # type: ignore[misc]

    def together(self, work: Callable[[], T]) -> T:
        """Run it everywhere, for its effects and this process's own result, which goes nowhere else.

        Raises:
            PeerEnded: as ``each``.
        """
        if self.size == 1:
            return work()
        kept: list[T] = []
        self.each(lambda: kept.append(work()))
        return kept[0]

    def lead(self, work: Callable[[], T]) -> T:
        """The writer runs it, and all have its result.

        Raises:
            PeerEnded: as ``each``.
        """
        return self.each(work if self.writes else lambda: None)[0]  # type: ignore[return-value, arg-type]

    def in_turn(self, work: Callable[[], T]) -> T:
        """Run it in the writer first, then in the first process of each other machine, then in the rest: what one has
        downloaded, tokenized or quantized lies in the caches for the next.

        Raises:
            PeerEnded: as ``each``.
        """
        if self.size == 1:
            return work()
        mine = 0 if self.writes else 1 if self.local_rank == 0 else 2
        kept: list[T] = []
        for turn in range(3):
            self.each(lambda: kept.append(work()) if turn == mine else None)  # noqa: B023 (called at once)
        return kept[0]

    def sums(self, work: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Run it everywhere; its numbers summed by name, in the order of ranks, so that all have the same bits.

        Raises:
            PeerEnded: as ``each``.
        """
        total: dict[str, float] = {}
        for numbers in self.each(work):
            for name, value in numbers.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place: one all-reduce."""
        if self.size > 1:
            import torch.distributed as dist

            with _alive():
                dist.all_reduce(tensor)

    def share(self, items: Sequence[int], lengths: Sequence[int] | Any) -> list[int]:
        """This process's part of them (see ``deal``)."""
        return list(items) if self.size == 1 else deal(items, lengths, self.size)[self.rank]

    def _all_well(self, found: Sequence[tuple[int | None, str]]) -> None:
        for rank, (code, said) in enumerate(found):
            if code is not None:
                raise PeerEnded(f"process {rank} ended: {said}", code)


def deal(items: Sequence[int], lengths: Sequence[int] | Any, size: int) -> list[list[int]]:
    """Split items among processes so that they finish together: the longest first, each to whoever has least so far
    (longest processing time first: Graham 1969, at most 4/3 of the best). In each part they keep their order.

    Args:
        items: indices into ``lengths``.
        lengths: tokens of each.
    """
    parts: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    places = sorted(range(len(items)), key=lambda place: (-int(lengths[items[place]]), place))
    for place in places:
        least = min(range(size), key=lambda rank: (loads[rank], rank))
        parts[least].append(place)
        loads[least] += int(lengths[items[place]])
    return [[items[place] for place in sorted(part)] for part in parts]


@contextmanager
def _alive() -> Iterator[None]:
    """A process that is killed tells nobody; its connections end. One that leaves an exchange half-way must never begin
    another: the others would take its words for those of the first."""
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
            "The same command goes on from the last checkpoint.",
            1,
        ) from None


def nothing(line: str = "") -> Any:
    """What a process says and decides that leaves that to the writer."""


def _tried(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return work(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def _code(error: BaseException) -> int:
    """The exit code that an error leads to (``cli.run``)."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return 128 + signal.SIGINT
    if isinstance(error, UserError):
        return 0 if getattr(error, "done", False) else 2
    return getattr(error, "code", 1)


def _said(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300] if error is not None else ""


_here = World()
_launched_alone = False  # ``alone`` removed a launcher's variables
_left = False  # this process was interrupted in the middle of an exchange


def world() -> World:
    """This process among those of its run; alone unless ``joined``."""
    return _here


def launched() -> int:
    """How many processes whoever started this one says there are."""
    return _number(_SIZE, 1)


def alone() -> None:
    """Where one process was started, remove what launchers (torchrun, accelerate, MPI) tell theirs, of which a shell or a
    container may have kept some: accelerate and torch would wait for processes that are not there."""
    global _launched_alone
    if launched() > 1:
        return
    _launched_alone = _launched_alone or _RANK in os.environ
    for name in list(os.environ):
        if name in _LAUNCHERS or name.startswith(_LAUNCHERS_BEGIN):
            del os.environ[name]


def speaks() -> bool:
    """Whether this process is the one that says what all of them know: the first, also before they meet and after."""
    return os.environ.get(_SIZE, "1") == "1" or os.environ.get(_RANK, "0") == "0"


def everywhere(error: UserError, *, machine: bool = False) -> UserError:
    """Mark an error that is raised in all processes (``machine``: in all of this machine): one of them says it."""
    here = os.environ.get(_LOCAL_RANK, "0") == "0" if machine else speaks()
    error.said_elsewhere = launched() > 1 and not here  # type: ignore[attr-defined]
    return error


def echoes(first: float | None) -> bool:
    """Whether a signal that comes now is the launcher's copy of an earlier one. Who signals a whole group (systemd, scancel)
    reaches torchrun and its processes alike, and torchrun then passes it on: that is no second request.

    Args:
        first: when the earlier one came, on the clock of time.monotonic; None: there was none.
    """
    return first is not None and (_launched_alone or _RANK in os.environ) and time.monotonic() - first < ECHO


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text}: is no number.", "torchrun sets it; unset it to run in one process.") from None


@contextmanager
def joined() -> Iterator[World]:
    """Within, this process is one of those that torchrun, accelerate or another launcher started, if one did.

    Raises:
        UserError: there are several, and the launcher has not said where they meet, or they do not meet; or there are more of
            them here than cards.
    """
    global _here, _left
    size = launched()
    if size <= 1 or _here.size > 1:  # it has joined already
        yield _here
        return
    import torch
    import torch.distributed as dist

    place = World(_number(_RANK, 0), size, _number(_LOCAL_RANK, 0), _number(_LOCAL_SIZE, 1))
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards:
        if place.local_rank >= cards:
            raise UserError(
                f"{place.local_size} processes were started on this machine, which has {cards} card(s).",
                f"Start one a card: torchrun --nproc-per-node {cards} -m zephyr_lite …",
            )
        torch.cuda.set_device(place.local_rank)
    try:
        # numbers and decisions go over gloo, gradients on cards over NCCL
        dist.init_process_group("cpu:gloo,cuda:nccl" if cards else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"process {place.rank} of {size} cannot meet the others: {str(error).splitlines()[0]}",
            "Start all of them with torchrun or accelerate launch; on several machines with the same --rdzv-endpoint.",
        ) from None
    _here, _left = place, False
    try:
        yield place
    finally:
        _here = World()
        # a process that fails must not wait for those that it leaves behind
        dist.destroy_process_group()


def sees(folder: Any) -> None:
    """Whether every process sees the writer's folder, as it must.

    Raises:
        UserError: it does not; names the machine.
    """
    found = _here.gather((socket.gethostname(), os.path.isdir(folder)))
    blind = sorted({host for host, there in found if not there})
    if blind:
        raise everywhere(
            UserError(
                f"{folder}: is not there on {', '.join(blind)}.",
                "All machines need the run's folder, the data and the base under the same names: put them on a shared disk.",
            )
        )
