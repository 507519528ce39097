"""What layers keep for their backward pass, on the host in the meantime.

A layer's tensors are copied out on a stream of their own while the next layer computes, and come back while the layer
after it goes backward: one layer's are on their way at any time, so that two layers' are on the device in either pass.
A CPU stands in for the accelerator through the same code; nothing runs beside anything else there.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .allocator import is_wsl


class LockRefused(UserError):
    """The system does not lock as much main memory as was asked for."""


CHUNK = 32 * 2**20  # of the ring through which memory that cannot be locked is copied
PROBE = 256 * 2**20  # what ``lockable`` locks at a time
ALIGNMENT = 256  # what a device's memory is aligned to; views of 16-byte types need no more
PAGE = 4096


class SideStream:
    """A CUDA stream for copies beside the computing one; on a CPU, where copies are done when they return, nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (target, source) after everything that was given to the computing stream so far.

        Returns:
            what ``wait`` takes.
        """
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        ring = _rings.get(self.device)
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                if ring is None or (target if source.is_cuda else source).is_pinned():
                    target.copy_(source, non_blocking=True)
                else:
                    ring.copy(target, source)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def wait(self, done: Any) -> None:
        """What is given to the computing stream from here on runs after the copy. The processor does not wait."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


def host_bytes(count: int, device: torch.device) -> Tensor:
    """uint8 [count] on the host, locked in place where a GPU copies from or to it.

    Where the system does not lock so much (WSL2: from 0.5 GiB to half of the main memory), it is ordinary memory, and
    ``SideStream`` copies it through a ring of locked chunks: right, but slower, and the processor waits.

    Raises:
        LockRefused: there is not so much memory, or the system does not lock the ring either.
    """
    if device.type != "cuda" or not count:
        return torch.empty(count, dtype=torch.uint8)
    if is_wsl() and device not in _rings:
        _rings[device] = Ring(device)  # first: when a lock is refused, there may be no room for it left
    memory, code = _locked(count, device)
    if code and device not in _rings:
        _rings[device] = Ring(device)
    return memory


def lockable(wanted: int, device: torch.device) -> int:
    """How many bytes of main memory the system locks for copies, of as many as are wanted: pieces are locked until one is
    refused, and released again. One piece less than that is left to others."""
    pieces: list[Tensor] = []
    while len(pieces) * PROBE < wanted:
        piece, code = _locked(PROBE, device)
        if code:
            return max(0, len(pieces) - 1) * PROBE
        pieces.append(piece)
    return wanted


def _locked(count: int, device: torch.device) -> tuple[Tensor, int]:
    """uint8 [count] on the host, locked for as long as it exists; and 0, or CUDA's error where the system refuses the lock.

    PyTorch's own pinned memory comes in powers of two: up to twice what is needed. So ordinary memory is registered.

    Raises:
        LockRefused: there is not so much memory.
    """
    try:
        owner = np.empty(count + PAGE, dtype=np.uint8)
    except MemoryError:
        raise LockRefused(
            f"main memory has no {count / 2**30:.2f} GiB for what is offloaded or streamed.",
            "Close what fills it, or set memory.offload=false and memory.stream=false.",
        ) from None
    start = -owner.ctypes.data % PAGE  # a page belongs to one registration
    memory = torch.from_numpy(owner[start : start + count])
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(memory.data_ptr(), count, 0))
    if code:
        _clear_last_error()
    else:
        # tensors keep their owner alive; its end is told before its memory goes
        weakref.finalize(
            owner, _unlock, runtime, memory.data_ptr(), device
        ).atexit = False  # the process takes it along
    return memory, code


def _clear_last_error() -> None:
    """Take CUDA's pending error, which the next kernel launch would report as its own. PyTorch's binding of the runtime has no
    cudaGetLastError, but torch loads the library with its symbols global (libtorch_global_deps)."""
    last_error = getattr(
        ctypes.CDLL(None), "cudaGetLastError", None
    )  # None: the runtime is linked into torch statically
    if last_error is not None:
        last_error()


def _unlock(runtime: Any, start: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a pass that failed may have left a copy on its way
    runtime.cudaHostUnregister(start)


class Ring:
    """Two locked chunks through which ordinary memory is copied to and from a card.

    Args:
        device: the card.

    Raises:
        LockRefused: the system does not lock the chunks either.
    """

    def __init__(self, device: torch.device) -> None:
        self._slots = []
        for _ in range(2):
            chunk, code = _locked(CHUNK, device)
            if code:
                raise LockRefused(
                    f"main memory could not be locked for copies to the card, not even {CHUNK // 2**20} MiB (CUDA error "
                    f"{code}).",
                    "Raise the limit (`ulimit -l`, or the container's memlock), close what fills the main memory, or set "
                    "memory.offload=false and memory.stream=false.",
                )
            self._slots.append((chunk, torch.cuda.Event()))

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy a contiguous tensor on the current stream; returns when ordinary memory has been read or written."""
        to_host = not target.is_cuda
        arriving: list[tuple[Tensor, Tensor, Any]] = []
        pieces = zip(*(t.view(-1).view(torch.uint8).split(CHUNK) for t in (target, source)), cycle(self._slots))
        for there, here, (chunk, event) in pieces:
            if len(arriving) == len(self._slots):
                self._take(*arriving.pop(0))
            event.synchronize()  # what was copied by way of this chunk before, on whichever stream
            chunk = chunk[: here.numel()]
            if to_host:
                self._enqueue(chunk, here)
                arriving.append((there, chunk, event))
            else:
                chunk.copy_(here)
                self._enqueue(there, chunk)
            event.record()
        for piece in arriving:
            self._take(*piece)

    def _enqueue(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def _take(self, target: Tensor, chunk: Tensor, event: Any) -> None:
        event.synchronize()
        target.copy_(chunk)


_rings: dict[torch.device, Ring] = {}  # of devices for which a lock was refused


@dataclass
class Kept:
    """One layer's kept tensors, while they are on the host.

    Attributes:
        layer: its index.
        turn: the number of the forward pass that kept them; a later one takes the place on the host over.
        host: where each lies: views of the layer's place.
    """

    layer: int
    turn: int
    host: list[Tensor]
    _device: list[Tensor] = field(default_factory=list)
    _done: Any = None


class Offload:
    """The place on the host for what the first `layers` layers keep.

    One place a layer, as large as it ever had to be. A graph's backward pass must have run (or never run) before the
    next forward pass that keeps something: training is like that, and anything else is an error.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        self.layers = layers
        self._side = SideStream(device)
        self._device = device
        self._places: dict[int, Tensor] = {}
        self._now: dict[int, Kept] = {}
        self._leaving: list[tuple[Any, Sequence[Tensor]]] = []
        self._turn: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(place.numel() for place in self._places.values())

    def put(self, layer: int, tensors: Sequence[Tensor]) -> Kept:
        """Send a layer's tensors to the host. The caller drops its references; they stay until they have left."""
        tensors = [t.detach().contiguous() for t in tensors]  # nothing here may hold a graph
        kept = Kept(layer, self._turn.get(layer, 0) + 1, self._views(layer, tensors))
        self._turn[layer] = kept.turn
        done = self._side.copy(list(zip(kept.host, tensors)))
        self.settle()  # the layer before has had this layer's time to leave
        self._leaving.append((done, tensors))
        self._now[layer] = kept
        return kept

    def settle(self) -> None:
        """Let go of what has left: later work takes its memory only after it did."""
        for done, _ in self._leaving:
            self._side.wait(done)
        self._leaving.clear()

    def ahead(self, layer: int) -> None:
        """Start bringing a layer's tensors back, if it has any here."""
        kept = self._now.get(layer)
        if kept is not None and not kept._device:
            self._fetch(kept)

    def get(self, kept: Kept) -> list[Tensor]:
        """A layer's tensors on the device.

        Raises:
            RuntimeError: another forward pass took their place.
        """
        if self._turn.get(kept.layer) != kept.turn:
            raise RuntimeError(
                f"layer {kept.layer}: another forward pass has taken the place of what it kept on the host; "
                "run each backward pass before the next forward pass"
            )
        if not kept._device:
            self._fetch(kept)
        self._side.wait(kept._done)
        tensors, kept._device, kept._done = kept._device, [], None
        if self._now.get(kept.layer) is kept:
            del self._now[kept.layer]  # nothing may bring it back a second time by itself
        return tensors

    def clear(self) -> None:
        """Drop what a pass that failed left on its way; the places on the host stay."""
        self._side.finish()
        for kept in self._now.values():
            kept._device = []
        self._now, self._leaving = {}, []

    def _fetch(self, kept: Kept) -> None:
        tensors = [torch.empty(h.shape, dtype=h.dtype, device=self._device) for h in kept.host]
        kept._done = self._side.copy(list(zip(tensors, kept.host)))
        kept._device = tensors

    def _views(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A place for each tensor in the layer's place."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        place = self._places.get(layer)
        if place is None or place.numel() < end:
            self._side.finish()  # nothing may be on its way to or from the place that goes
            self._places.pop(layer, None)
            place = self._places[layer] = host_bytes(end, self._device)
        return [place[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, tensors)]
