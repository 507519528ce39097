"""Products with the frozen matrices in int8 (``memory.compute=int8``; ``ops.int8``).

Which channels of a site's input stay in the compute dtype is decided once, before the first step: those with the largest values
in one pass over general text, by the model that the stage starts from. So they are the same for policy and reference, however
rows are packed, and in a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops.dispatch import runs_triton
from ..ops.int8 import Int8Matrix, OutlierChannels, largest_channels, outlier_count
from ..ops.int8_weights import requantize, static_scales
from ..ops.lora import Int8Site, LinearGroup
from .dequant_buffer import DequantBuffer, ScratchMode, scratch_elements, width_of
from .execution import layer_of

if TYPE_CHECKING:
    from ..data.batch import Batch
    from .decoder import Decoder


class Int8Buffer(DequantBuffer):
    """Frozen 4-bit matrices as int8 codes, [out, in] for the forward pass beside [in, out] for the backward pass: together as many
    bytes as a matrix has in 16 bits. The columns of outlier channels are in tensors of their own."""

    def __init__(self, mode: ScratchMode = "layer") -> None:
        super().__init__(mode)
        self._outliers: list[Tensor] = []  # of each site

    def parts(
        self, sites: Sequence[LinearGroup], index: int, dtype: torch.dtype, *, backward: bool = False
    ) -> Iterator[tuple[int, Int8Matrix]]:
        site = sites[index]
        if not self._buffers or self._outliers[0].dtype != dtype:
            self._allocate(sites, dtype)
        apart = self.mode == "small" and index >= 2  # gate, up and down are in one place in turn
        if not apart:
            beside = range(len(sites) if self.mode == "layer" else 2)
            at_once = beside if runs_triton("int8_weights", self._outliers[0]) else [index]
            self._requantize(sites, [(i, j) for i in at_once for j in range(len(sites[i].outs))], backward)
        for j, columns in enumerate(site.slices):
            if apart:
                self._requantize(sites, [(index, j)], backward)
            yield columns.start, self._matrix(sites, index, j, backward)

    def _allocate(self, sites: Sequence[LinearGroup], dtype: torch.dtype) -> None:
        self.free()
        device = sites[0].weights[0].device
        for size in scratch_elements(sites, self.mode):
            self._buffers.append(torch.empty(2 * size, dtype=torch.int8, device=device))
        for site in sites:
            shape = (sum(site.outs), outlier_count(width_of(site)))
            self._outliers.append(torch.empty(shape, dtype=dtype, device=device))

    def free(self) -> None:
        super().free()
        self._outliers = []

    def _matrix(self, sites: Sequence[LinearGroup], index: int, projection: int, backward: bool) -> Int8Matrix:
        """The place of a matrix."""
        site = sites[index]
        assert site.int8 is not None
        out, width = site.outs[projection], width_of(site)
        start, buffer = 0, self._buffers[-1]
        if self.mode == "layer" or index < 2:
            start = sum(sum(other.outs) * width_of(other) for other in sites[:index])
            start, buffer = 2 * (start + site.slices[projection].start * width), self._buffers[0]
        rows, columns = site.int8.scales[projection]
        size = out * width
        if backward:
            return Int8Matrix(buffer[start + size : start + 2 * size].view(width, out), columns)
        outliers = self._outliers[index][site.slices[projection]]
        return Int8Matrix(buffer[start : start + size].view(out, width), rows, outliers)

    def _requantize(self, sites: Sequence[LinearGroup], wanted: Sequence[tuple[int, int]], backward: bool) -> None:
        """Fill the places of (site, projection), unless they hold these matrices already."""
        missing: list[tuple[Tensor, Int8Matrix, OutlierChannels | None]] = []
        filled: dict[tuple[int, int], tuple[Tensor, int]] = {}
        for index, projection in wanted:
            site, into = sites[index], self._matrix(sites, index, projection, backward)
            weight, place = site.weights[projection], (index // 2, into.codes.storage_offset())
            if not self._holds(place, weight):
                assert site.int8 is not None
                missing.append((weight, into, None if backward else site.int8.outliers))
                filled[place] = (weight, weight._version)
        if missing:
            requantize(missing, self._outliers[0].dtype, transposed=backward)
            self._held.update(filled)


@torch.no_grad()
def calibrate(decoder: Decoder, batch: Batch) -> None:
    """From the next pass on the decoder computes in int8.

    Args:
        decoder: in the compute dtype so far; 4-bit weights.
        batch: of general text, on its device. The trained adapter is off.
    """
    layers = [
        layer_of(module, lambda *_: [], None, index=index, stream=decoder.stream)
        for index, module in enumerate(decoder.stack.base.model.layers)
    ]
    peaks = [
        [torch.zeros(width_of(site), dtype=decoder.dtype, device=decoder.device) for site in layer.sites]
        for layer in layers
    ]
    decoder.of_sites = [[{"peaks": each} for each in of_layer] for of_layer in peaks]
    decoder._run(batch, None, "input", (decoder.stack.trainable,))
    decoder.scratch.free()
    found: list[list[dict[str, Any]]] = []
    for layer, of_layer in zip(layers, peaks):
        if decoder.stream is not None:
            decoder.stream.begin(layer.index, 1)
        found.append([])
        for site, each in zip(layer.sites, of_layer):
            found[-1].append({"int8": Int8Site(largest_channels(each), tuple(map(static_scales, site.weights)))})
    decoder.of_sites, decoder.scratch = found, Int8Buffer(decoder.scratch.mode)
