"""The dequantized weights of one decoder layer, in a buffer that all layers share.

layer   [qkv | o | gate_up | down], 416 MiB for Mistral-7B in 16 bits: one dequantization per weight and pass, on CUDA in one
        launch; one matrix product for q, k, v and one for gate, up. A pass that begins with the layer that the last pass
        ended with reuses it.
small   two buffers of 112 MiB: [qkv | o], and one that gate, up and down use in turn. The backward pass dequantizes gate and
        up twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ..ops.dispatch import runs_triton
from ..ops.int8 import Int8Matrix
from ..ops.lora import LinearGroup
from ..ops.nf4 import dequantize, dequantize_into, is_quantized

ScratchMode = Literal["layer", "small"]


class DequantBuffer:
    """Frozen matrices, dense, in the compute dtype.

    Only quantized weights use the buffer. A matrix is valid until another layer's is requested (``small``: until another one
    of the MLP is).
    """

    def __init__(self, mode: ScratchMode = "layer") -> None:
        self.mode = mode
        self._buffers: list[Tensor] = []
        # (buffer, offset) → the weight that was dequantized there, and its version
        self._held: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def parts(
        self, sites: Sequence[LinearGroup], index: int, dtype: torch.dtype, *, backward: bool = False
    ) -> Iterator[tuple[int, Tensor | Int8Matrix]]:
        """The matrices of ``sites[index]`` as ``ops.lora`` takes them.

        Args:
            sites: all of the layer's: qkv, o, gate_up, down. Every layer has the same shapes.
            dtype: of the products.
            backward: for ``grad_input``, not for ``project``; a dense matrix serves both.
        """
        site = sites[index]
        if not is_quantized(site.weights[0]):
            for weight, columns in zip(site.weights, site.slices):
                yield columns.start, dequantize(weight, dtype)
            return
        device = site.weights[0].device
        if not self._buffers or self._buffers[0].dtype != dtype or self._buffers[0].device != device:
            self.free()
            sizes = scratch_elements(sites, self.mode)
            self._buffers = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
        if self.mode == "layer" or index < 2:
            beside = sites if self.mode == "layer" else sites[:2]
            starts = list(accumulate((sum(other.outs) * width_of(other) for other in beside), initial=0))
            # in one launch on CUDA; elsewhere no sooner than they are read: the first layer's backward pass may not read q, k, v
            at_once = range(len(beside)) if runs_triton("nf4", self._buffers[0]) else [index]
            places = []
            for i in at_once:
                for weight, columns in zip(beside[i].weights, beside[i].slices):
                    if is_quantized(weight):
                        places.append((starts[i] + columns.start * width_of(beside[i]), weight))
            self._fill(0, places)
            yield 0, self._buffers[0][starts[index] : starts[index + 1]].view(-1, width_of(site))
            return
        for weight, out, columns in zip(site.weights, site.outs, site.slices):
            self._fill(1, [(0, weight)])
            yield columns.start, self._buffers[1][: out * width_of(site)].view(-1, width_of(site))

    def free(self) -> None:
        """Free the memory."""
        self._buffers, self._held = [], {}

    def _fill(self, buffer: int, places: Sequence[tuple[int, Tensor]]) -> None:
        """Dequantize weights to their places in a buffer, unless it holds them already."""
        missing = [(start, weight) for start, weight in places if not self._holds((buffer, start), weight)]
        if missing:
            dequantize_into(self._buffers[buffer], missing)
        for start, weight in missing:
            self._held[buffer, start] = (weight, weight._version)

    def _holds(self, place: tuple[int, int], weight: Tensor) -> bool:
        held = self._held.get(place)
        return held is not None and held[0] is weight and held[1] == weight._version


def scratch_elements(sites: Sequence[LinearGroup], mode: ScratchMode) -> list[int]:
    """The size of each buffer, in elements."""
    sizes = [sum(site.outs) * width_of(site) for site in sites]
    if mode == "layer":
        return [sum(sizes)]
    return [sizes[0] + sizes[1], max(out * width_of(site) for site in sites[2:] for out in site.outs)]


def width_of(site: LinearGroup) -> int:
    weight = site.weights[0]
    state = getattr(weight, "quant_state", None)
    return (state.shape if state is not None else weight.shape)[1]
