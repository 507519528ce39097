"""Activation offload: tensors that layers keep for their backward pass, moved to the host in the meantime.

A layer's tensors are copied to the host on a side stream while the next layer computes, and copied back while the layer after
it runs backward, so that the device holds two layers' tensors in either pass. On a CPU the same code runs without overlap.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


class LockRefused(UserError):
    """The system does not give the requested amount of main memory."""


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
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)  # of pageable memory the driver makes it a blocking copy
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


def pack(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offset of each tensor in one block of memory, and the size of the block, in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def views(memory: Tensor, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the same shapes and dtypes, as views of a block of memory."""
    return [memory[start : start + t.nbytes].view(t.dtype).view(t.shape) for start, t in zip(starts, like)]


def host_bytes(count: int, device: torch.device) -> Tensor:
    """uint8 [count] on the host, page-locked for copies to and from a GPU.

    Where the system refuses the lock (WSL2: from 0.5 GiB to half of the main memory) it is pageable memory: its copies are
    slower, and the CPU waits for them.

    Raises:
        LockRefused: there is not enough memory.
    """
    if device.type != "cuda" or not count:
        return torch.empty(count, dtype=torch.uint8)
    memory, _ = _locked(count, device)
    return memory


def lockable(wanted: int, device: torch.device) -> int:
    """How many of the wanted bytes of main memory the system locks: pieces are locked until one is refused, then released.
    One piece of these is left to other programs."""
    pieces: list[Tensor] = []
    while len(pieces) * PROBE < wanted:
        piece, is_locked = _locked(PROBE, device)
        if not is_locked:
            return max(0, len(pieces) - 1) * PROBE
        pieces.append(piece)
    return wanted


def _locked(count: int, device: torch.device) -> tuple[Tensor, bool]:
    """As ``host_bytes``, and whether the memory is locked. Pageable memory is registered, because PyTorch's pinned allocator
    rounds up to powers of two."""
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
    if int(runtime.cudaHostRegister(memory.data_ptr(), count, 0)):
        # clear CUDA's pending error, which the next kernel launch would report; torch loads the runtime with global symbols
        ctypes.CDLL(None).cudaGetLastError()
        return memory, False
    # tensors keep their owner alive; unlock before its memory is freed (at exit the process frees it)
    weakref.finalize(owner, _unlock, runtime, memory.data_ptr(), device).atexit = False
    return memory, True


def _unlock(runtime: Any, start: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a failed pass may have left a copy running
    runtime.cudaHostUnregister(start)


class ActivationOffload:
    """Host buffers for the tensors that the first `layers` layers keep, one a layer.

    A graph's backward pass must run (or be dropped) before the next forward pass that keeps tensors.
    """

    def __init__(self, device: torch.device, layers: int) -> None:
        self.layers = layers
        self._side = SideStream(device)
        self._device = device
        self._buffers: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {}  # views of the host buffers, one a tensor
        self._fetched: dict[
            int, tuple[Any, list[Tensor]]
        ] = {}  # copies on the device, and the event when they are done
        self._leaving: list[tuple[Any, Sequence[Tensor]]] = []

    def put(self, layer: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Start copying a layer's tensors to the host. They stay alive until the copy is done.

        Returns:
            where they are on the host, for ``get``; the next forward pass overwrites them.
        """
        tensors = [t.detach().contiguous() for t in tensors]  # nothing here may hold a graph
        starts, size = pack(tensors)
        buffer = self._buffers.get(layer)
        if buffer is None or buffer.numel() < size:
            self._side.finish()  # no copy may use the buffer that is freed
            self._buffers.pop(layer, None)
            del buffer
            buffer = self._buffers[layer] = host_bytes(size, self._device)
        host = views(buffer, starts, tensors)
        done = self._side.copy(list(zip(host, tensors)))
        self.wait_pending()  # the copies of the layer before had this layer's time
        self._leaving.append((done, tensors))
        self._kept[layer] = host
        return host

    def wait_pending(self) -> None:
        """Release the tensors of pending copies; later work reuses their memory only after the copies."""
        for done, _ in self._leaving:
            self._side.wait(done)
        self._leaving.clear()

    def prefetch(self, layer: int) -> None:
        """Start copying a layer's tensors back, if it has any on the host."""
        if layer in self._kept and layer not in self._fetched:
            host = self._kept[layer]
            tensors = [torch.empty(h.shape, dtype=h.dtype, device=self._device) for h in host]
            self._fetched[layer] = (self._side.copy(list(zip(tensors, host))), tensors)

    def get(self, layer: int, host: list[Tensor]) -> list[Tensor]:
        """A layer's tensors on the device."""
        assert self._kept.get(layer) is host, "run each backward pass before the next forward pass"
        self.prefetch(layer)
        del self._kept[layer]
        done, tensors = self._fetched.pop(layer)
        self._side.wait(done)
        return tensors

    def clear(self) -> None:
        """Drop the tensors of a failed pass; the host buffers stay."""
        self._side.finish()
        self._kept, self._fetched, self._leaving = {}, {}, []
