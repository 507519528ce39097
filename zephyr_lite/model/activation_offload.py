"""Activation offload: tensors that layers keep for their backward pass, moved to the host in the meantime.

A layer's tensors are copied to the host on a side stream while the next layer computes, and copied back while the layer after
it runs backward, so that the device holds two layers' tensors in either pass. On a CPU the same code runs without overlap.
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
    """The system refuses to lock the requested amount of main memory."""


CHUNK = 32 * 2**20  # of the ring through which unlocked memory is copied
PROBE = 256 * 2**20  # what ``lockable`` locks at a time
ALIGNMENT = 256  # of device memory
PAGE = 4096


class SideStream:
    """A CUDA stream for copies that overlap with computation; on a CPU copies are synchronous."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Any:
        """Copy each (target, source) after everything enqueued on the computing stream so far.

        Returns:
            an event for ``wait``.
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
        """Let later work on the computing stream run after the copy; the CPU does not wait."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def finish(self) -> None:
        """Wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()


def host_bytes(count: int, device: torch.device) -> Tensor:
    """uint8 [count] on the host, page-locked for copies to and from a GPU.

    Where the system refuses the lock (WSL2: from 0.5 GiB to half of the main memory) it is pageable memory, which
    ``SideStream`` copies through a ring of locked chunks: slower, and the CPU waits.

    Raises:
        LockRefused: there is not enough memory, or the ring cannot be locked either.
    """
    if device.type != "cuda" or not count:
        return torch.empty(count, dtype=torch.uint8)
    if is_wsl() and device not in _rings:
        _rings[device] = Ring(device)  # first: after a refusal there may be no room left for it
    memory, code = _locked(count, device)
    if code and device not in _rings:
        _rings[device] = Ring(device)
    return memory


def lockable(wanted: int, device: torch.device) -> int:
    """How many of the wanted bytes of main memory the system locks: pieces are locked until one is refused, then released.
    One piece of these is left to other programs."""
    pieces: list[Tensor] = []
    while len(pieces) * PROBE < wanted:
        piece, code = _locked(PROBE, device)
        if code:
            return max(0, len(pieces) - 1) * PROBE
        pieces.append(piece)
    return wanted


def _locked(count: int, device: torch.device) -> tuple[Tensor, int]:
    """uint8 [count] on the host, locked while it exists; and 0, or CUDA's error code where the system refuses the lock.

    Pageable memory is registered, because PyTorch's pinned allocator rounds up to powers of two.

    Raises:
        LockRefused: there is not enough memory.
    """
    try:
        owner = np.empty(count + PAGE, dtype=np.uint8)
    except MemoryError:
        raise LockRefused(
            f"main memory has no {count / 2**30:.2f} GiB for activation offload or weight streaming.",
            "Close other programs, or set memory.offload=false and memory.stream=false.",
        ) from None
    start = -owner.ctypes.data % PAGE  # a page belongs to one registration
    memory = torch.from_numpy(owner[start : start + count])
    runtime: Any = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(memory.data_ptr(), count, 0))
    if code:
        _clear_last_error()
    else:
        # tensors keep their owner alive; unlock before its memory is freed (at exit the process frees it)
        weakref.finalize(owner, _unlock, runtime, memory.data_ptr(), device).atexit = False
    return memory, code


def _clear_last_error() -> None:
    """Clear CUDA's pending error, which the next kernel launch would report. PyTorch does not expose cudaGetLastError, but it
    loads the runtime with global symbols (libtorch_global_deps); None where torch links it statically."""
    last_error = getattr(ctypes.CDLL(None), "cudaGetLastError", None)
    if last_error is not None:
        last_error()


def _unlock(runtime: Any, start: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a failed pass may have left a copy running
    runtime.cudaHostUnregister(start)


class Ring:
    """Two locked chunks through which pageable memory is copied to and from a GPU.

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
        """Copy a contiguous tensor on the current stream; returns when the pageable memory has been read or written."""
        to_host = not target.is_cuda
        arriving: list[tuple[Tensor, Tensor, Any]] = []
        pieces = zip(*(t.view(-1).view(torch.uint8).split(CHUNK) for t in (target, source)), cycle(self._slots))
        for there, here, (chunk, event) in pieces:
            if len(arriving) == len(self._slots):
                self._take(*arriving.pop(0))
            event.synchronize()  # the chunk's previous copy, on any stream
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


_rings: dict[torch.device, Ring] = {}  # for devices with a refused lock


@dataclass
class Kept:
    """One layer's kept tensors on the host.

    Attributes:
        layer: its index.
        host: views of the layer's host buffer, one a tensor; the next forward pass overwrites them.
    """

    layer: int
    host: list[Tensor]
    _device: list[Tensor] = field(default_factory=list)
    _done: Any = None


class ActivationOffload:
    """Host buffers for the tensors that the first `layers` layers keep, one a layer.

    A graph's backward pass must run (or be dropped) before the next forward pass that keeps tensors.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        self.layers = layers
        self._side = SideStream(device)
        self._device = device
        self._places: dict[int, Tensor] = {}
        self._now: dict[int, Kept] = {}
        self._leaving: list[tuple[Any, Sequence[Tensor]]] = []

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(place.numel() for place in self._places.values())

    def put(self, layer: int, tensors: Sequence[Tensor]) -> Kept:
        """Start copying a layer's tensors to the host. They stay alive until the copy is done."""
        tensors = [t.detach().contiguous() for t in tensors]  # nothing here may hold a graph
        kept = Kept(layer, self._views(layer, tensors))
        done = self._side.copy(list(zip(kept.host, tensors)))
        self.wait_pending()  # the copies of the layer before had this layer's time
        self._leaving.append((done, tensors))
        self._now[layer] = kept
        return kept

    def wait_pending(self) -> None:
        """Release the tensors of pending copies; later work reuses their memory only after the copies."""
        for done, _ in self._leaving:
            self._side.wait(done)
        self._leaving.clear()

    def prefetch(self, layer: int) -> None:
        """Start copying a layer's tensors back, if it has any on the host."""
        kept = self._now.get(layer)
        if kept is not None and not kept._device:
            self._fetch(kept)

    def get(self, kept: Kept) -> list[Tensor]:
        """A layer's tensors on the device."""
        assert self._now.pop(kept.layer, None) is kept, "run each backward pass before the next forward pass"
        if not kept._device:
            self._fetch(kept)
        self._side.wait(kept._done)
        tensors, kept._device, kept._done = kept._device, [], None
        return tensors

    def clear(self) -> None:
        """Drop the tensors of a failed pass; the host buffers stay."""
        self._side.finish()
        for kept in self._now.values():
            kept._device = []
        self._now, self._leaving = {}, []

    def _fetch(self, kept: Kept) -> None:
        tensors = [torch.empty(h.shape, dtype=h.dtype, device=self._device) for h in kept.host]
        kept._done = self._side.copy(list(zip(tensors, kept.host)))
        kept._device = tensors

    def _views(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """A view of the layer's host buffer for each tensor."""
        starts, end = [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        place = self._places.get(layer)
        if place is None or place.numel() < end:
            self._side.finish()  # no copy may use the buffer that is freed
            self._places.pop(layer, None)
            place = self._places[layer] = host_bytes(end, self._device)
        return [place[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, tensors)]
