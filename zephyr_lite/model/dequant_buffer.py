"""The dequantized weights of one decoder layer, in a buffer that all layers share.

layer   [qkv | o | gate_up | down], 416 MiB for Mistral-7B in 16 bits: one dequantization per weight and pass, one matrix
        product for q, k, v and one for gate, up. A pass that begins with the layer that the last pass ended with reuses it.
small   two buffers of 112 MiB: [qkv | o], and one that gate, up and down use in turn. The backward pass dequantizes gate and
        up twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from ..ops.lora import LinearGroup
from ..ops.nf4 import dequantize, is_quantized

ScratchMode = Literal["layer", "small"]


class DequantBuffer:
    """Frozen matrices, dense, in the compute dtype.

    Only quantized weights use the buffer. A matrix is valid until another layer's is requested (``small``: until another one
    of the MLP is).
    """

    def __init__(self, mode: ScratchMode = "layer") -> None:
        self.mode = mode
        self._buffers: list[Tensor] = []
        self._layout: list[tuple[tuple[int, ...], int]] = []
        # (buffer, offset) → the weight that was dequantized there, and its version
        self._held: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def parts(self, sites: Sequence[LinearGroup], index: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The matrices of ``sites[index]`` as ``ops.lora`` takes them.

        Args:
            sites: all of the layer's: qkv, o, gate_up, down.
            dtype: of the products.
        """
        site = sites[index]
        if not any(is_quantized(weight) for weight in site.weights):
            for weight, columns in zip(site.weights, site.slices):
                yield columns.start, dequantize(weight, dtype)
            return
        self._allocate(sites, dtype)
        if self.mode == "layer" or index < 2:
            start = sum(_elements(s) for s in sites[:index])
            yield 0, self._fill((0, start), site, range(len(site.weights)), dtype)
            return
        for projection, columns in enumerate(site.slices):
            yield columns.start, self._fill((1, 0), site, [projection], dtype)

    def free(self) -> None:
        """Free the memory."""
        self._buffers, self._layout, self._held = [], [], {}

    def _fill(
        self, place: tuple[int, int], site: LinearGroup, projections: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Projections of a site next to each other, dequantized unless the buffer holds them already."""
        buffer, start = place
        width = _width(site)
        rows = [site.outs[p] for p in projections]
        whole = self._buffers[buffer][start : start + sum(rows) * width].view(sum(rows), width)
        for projection, end, count in zip(projections, accumulate(rows), rows):
            weight = site.weights[projection]
            at = (buffer, start + (end - count) * width)
            held = self._held.get(at)
            if held is None or held[0] is not weight or held[1] != weight._version:
                dequantize(weight, dtype, out=whole[end - count : end])
                self._held[at] = (weight, weight._version)
        return whole

    def _allocate(self, sites: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        layout = [(site.outs, _width(site)) for site in sites]
        if layout != self._layout:  # other shapes have other offsets
            self._layout, self._held = layout, {}
        sizes = scratch_elements(sites, self.mode)
        device = sites[0].weights[0].device
        found = self._buffers
        if len(found) != len(sizes) or any(
            b.numel() < n or b.dtype != dtype or b.device != device for b, n in zip(found, sizes)
        ):
            self._held = {}
            self._buffers = [torch.empty(n, dtype=dtype, device=device) for n in sizes]


def scratch_elements(sites: Sequence[LinearGroup], mode: ScratchMode) -> list[int]:
    """The size of each buffer, in elements."""
    if mode == "layer":
        return [sum(map(_elements, sites))]
    largest = max(out * _width(site) for site in sites[2:] for out in site.outs)
    return [_elements(sites[0]) + _elements(sites[1]), largest]


def _width(site: LinearGroup) -> int:
    weight = site.weights[0]
    state = getattr(weight, "quant_state", None)
    return (state.shape if state is not None else weight.shape)[1]


def _elements(site: LinearGroup) -> int:
    return sum(site.outs) * _width(site)
