"""4-bit NormalFloat weights (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), in bitsandbytes' own storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import bitsandbytes.functional as bnb
import torch
from torch import Tensor


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is bitsandbytes' ``Params4bit`` with its quantization state."""
    return getattr(weight, "quant_state", None) is not None


def dequantize(weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A frozen weight as a matrix to multiply with.

    Args:
        weight: [out, in]; a plain matrix, or 4-bit storage (NF4 or FP4, nested scales or not) with its ``quant_state``.
        dtype: of the result.
        out: contiguous [out, in] of `dtype` to write into, such as a slice of a larger buffer.
    Returns:
        [out, in]; `out` where it is given, ``weight`` itself where it is plain and of that dtype, else a new tensor.
    """
    if is_quantized(weight):
        return _twin(weight, dtype, out)
    weight = weight.detach().to(dtype) if out is None else weight.detach()
    return weight if out is None else out.copy_(weight)


def _twin(weight: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    state = weight.quant_state  # type: ignore[attr-defined]
    shape = state.shape
    if weight.device.type == "cpu" and shape[-1] % state.blocksize and shape.numel() % state.blocksize == 0:
        # One row a block: the CPU kernel for AVX-512 mixes up the scales of rows that are no whole number of blocks.
        shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    # a state of our own, because the result's dtype is read from it and the weight's own is shared
    wanted = bnb.QuantState(
        absmax=state.absmax,
        shape=shape,
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=torch.float32 if dtype == torch.float64 else dtype,
        offset=state.offset,
        state2=state.state2,
    )
    if out is not None and out.is_cuda and out.dtype == wanted.dtype:
        return bnb.dequantize_4bit(weight.data, wanted, out=out)
    result = bnb.dequantize_4bit(weight.data, wanted).view(state.shape).to(dtype)
    return result if out is None else out.copy_(result)


BLOCK = 64
# Quantizing takes about five float32 copies of what it works on: pieces of 4 Mi elements keep that under 100 MB.
_PIECE = 4 * 2**20


@dataclass(frozen=True)
class StoredNf4:
    """A matrix in NF4 outside a model, dequantized a few rows at a time.

    Attributes:
        packed: uint8 [ceil(out * in / 2)], two values a byte.
        absmax: float32 [ceil(out * in / 64)], a scale for each block of the flattened matrix.
        shape: (out, in).
        dtype: what it dequantizes to.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def rows(self, rows: slice) -> Tensor:
        """Rows [start, stop), dequantized to a new [stop - start, in] tensor of `dtype`."""
        width = self.shape[1]
        first, last = rows.start * width, rows.stop * width
        # Blocks run over the flattened matrix: take the whole blocks around the rows, then cut.
        low, high = first // BLOCK, -(-last // BLOCK)
        whole = min(high, self.shape[0] * width // BLOCK)
        values = self._blocks(low, whole, BLOCK)
        if whole < high:
            values = torch.cat([values, self._blocks(whole, high, self.shape[0] * width % BLOCK)])
        return values[first - low * BLOCK : last - low * BLOCK].view(-1, width)

    def _blocks(self, low: int, high: int, width: int) -> Tensor:
        if low >= high:
            return torch.empty(0, dtype=self.dtype)
        packed = self.packed[low * (BLOCK // 2) : low * (BLOCK // 2) + ((high - low) * width + 1) // 2]
        # One row a block: the CPU kernel for AVX-512 mixes up the scales of rows that are no multiple of 64 long.
        state = bnb.QuantState(
            absmax=self.absmax[low:high],
            shape=torch.Size((high - low, width)),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
        )
        return bnb.dequantize_4bit(packed.view(-1, 1), state).reshape(-1)


def quantize_stored(weight: Tensor, *, double_quant: bool, dtype: torch.dtype) -> StoredNf4:
    """What a matrix becomes when transformers loads it in 4 bits with `dtype=dtype`.

    It is cast to `dtype` first, then quantized over its flattened values in blocks of 64; with `double_quant` the
    scales are themselves quantized to 8 bits around their mean, in blocks of 256. Works in pieces: besides the result
    it needs about 100 MB, whatever the size (`weight` may be mapped from a file).

    Args:
        weight: [out, in], floating point, on the CPU.
        dtype: float32, float16 or bfloat16.
    """
    flat = weight.reshape(-1)
    packed, absmax = [], []
    for piece in flat.split(_PIECE):
        values, state = bnb.quantize_4bit(piece.to(dtype), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        packed.append(values.view(-1))
        absmax.append(state.absmax)
    scales = torch.cat(absmax)
    if double_quant:
        offset = scales.mean()
        codes, nested = bnb.quantize_blockwise(scales - offset, blocksize=256)
        scales = bnb.dequantize_blockwise(codes, nested) + offset
    return StoredNf4(torch.cat(packed), scales, tuple(weight.shape), dtype)


def read_stored(tensors: Mapping[str, Tensor]) -> StoredNf4:
    """A matrix from the tensors under which a quantized checkpoint keeps it.

    Args:
        tensors: "" → the packed weight, "absmax", "quant_map", "quant_state.bitsandbytes__nf4", and with double
            quantization "nested_absmax" and "nested_quant_map".

    Raises:
        ValueError: another 4-bit type or another block size than bitsandbytes' default.
    """
    parts = {name: tensor for name, tensor in tensors.items() if name}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    if state.quant_type != "nf4" or state.blocksize != BLOCK or state.shape is None:
        raise ValueError(f"{state.quant_type} in blocks of {state.blocksize}; only nf4 in blocks of {BLOCK} is read")
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return StoredNf4(tensors[""].reshape(-1).view(torch.uint8), absmax.float(), tuple(state.shape), state.dtype)


def nf4_round_trip(weight: Tensor, double_quant: bool, dtype: torch.dtype) -> Tensor:
    """What 4-bit training saw of a weight: cast to `dtype`, quantized to NF4 and back; new, [out, in], of `dtype`."""
    return quantize_stored(weight, double_quant=double_quant, dtype=dtype).rows(slice(0, weight.shape[0]))
