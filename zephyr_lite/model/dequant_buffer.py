"""The dequantized weights of one decoder layer, in a buffer that all layers share.

layer   [qkv | o | gate_up | down], 416 MiB for Mistral-7B in 16 bits: one dequantization per weight and pass, one matrix
        product for q, k, v and one for gate, up. A pass that begins with the layer that the last pass ended with reuses it.
small   two buffers of 112 MiB: [qkv | o], and one that gate, up and down use in turn. The backward pass dequantizes gate and
        up twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        # (buffer, offset) → the weight that was dequantized there, and its version
        self._held: dict[tuple[int, int], tuple[Tensor, int]] = {}

    def parts(self, sites: Sequence[LinearGroup], index: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """The matrices of ``sites[index]`` as ``ops.lora`` takes them.

        Args:
            sites: all of the layer's: qkv, o, gate_up, down. Every layer has the same shapes.
            dtype: of the products.
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
            start = sum(sum(other.outs) * _width(other) for other in sites[:index])
            yield 0, self._fill(0, start, site, range(len(site.weights)), dtype)
            return
        for projection, columns in enumerate(site.slices):
            yield columns.start, self._fill(1, 0, site, [projection], dtype)

    def free(self) -> None:
        """Free the memory."""
        self._buffers, self._held = [], {}

    def _fill(
        self, buffer: int, start: int, site: LinearGroup, projections: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        """Projections of a site next to each other, dequantized unless the buffer holds them already."""
        width = _width(site)
        end = start
        for projection in projections:
            weight, size = site.weights[projection], site.outs[projection] * width
            held = self._held.get((buffer, end))
            if held is None or held[0] is not weight or held[1] != weight._version:
                dequantize(weight, dtype, out=self._buffers[buffer][end : end + size].view(-1, width))
                self._held[buffer, end] = (weight, weight._version)
            end += size
        return self._buffers[buffer][start:end].view(-1, width)


def scratch_elements(sites: Sequence[LinearGroup], mode: ScratchMode) -> list[int]:
    """The size of each buffer, in elements."""
    sizes = [sum(site.outs) * _width(site) for site in sites]
    if mode == "layer":
        return [sum(sizes)]
    return [sizes[0] + sizes[1], max(out * _width(site) for site in sites[2:] for out in site.outs)]


def _width(site: LinearGroup) -> int:
    weight = site.weights[0]
    state = getattr(weight, "quant_state", None)
    return (state.shape if state is not None else weight.shape)[1]
