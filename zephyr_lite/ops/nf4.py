"""4-bit NormalFloat weights (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), in bitsandbytes' own storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cache, lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from .dispatch import Draw, Widths, jit, on_device, runs_triton, tl
from .hub_kernels import no_hub_kernels


@contextmanager
def _compile_later() -> Iterator[None]:
    """``torch.compile`` of a function waits for its first call, for whatever is imported within.

    bitsandbytes compiles its CPU implementation of the 8-bit optimizers while it is imported. That alone imports PyTorch's
    compiler: importing bitsandbytes took 2.4 seconds of processor time instead of 0.2, for functions that
    a run on a GPU never calls. What is computed is the same.
    """
    now: Any = torch.compile

    def later(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled = cache(lambda: now(function, **options))
        return wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = now


with _compile_later(), no_hub_kernels():
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear4bit as Linear4bit  # for model/base.py
    from bitsandbytes.nn import Params4bit


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is bitsandbytes' ``Params4bit`` with its quantization state."""
    return getattr(weight, "quant_state", None) is not None


def state_of(weight: Tensor) -> Any:
    """How bitsandbytes stored a 4-bit weight."""
    return weight.quant_state  # type: ignore[attr-defined]


def stored_tensors(weight: Tensor) -> dict[str, Tensor]:
    """All that a frozen weight is read from, by name: "" its own storage, and of a 4-bit one its quantization state's
    tensors as well."""
    found = {"": weight.data}
    if is_quantized(weight):
        state = state_of(weight)
        found |= {"absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"offset": state.offset, "nested_absmax": state.state2.absmax, "nested_code": state.state2.code}
    return found


def weight_over(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A weight as ``dequantize`` takes it, read from other tensors than the ones that ``stored_tensors(weight)`` names:
    of the same shapes and dtypes, on any device."""
    result = tensors[""]
    if is_quantized(weight):
        state = copy(state_of(weight))
        state.absmax, state.code = tensors["absmax"], tensors["code"]
        if state.nested:
            state.offset, state.state2 = tensors["offset"], copy(state.state2)
            state.state2.absmax, state.state2.code = tensors["nested_absmax"], tensors["nested_code"]
        result.quant_state = state  # type: ignore[attr-defined]
    return result


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
        if not runs_triton("nf4", weight, dtype):
            return _twin(weight, dtype, out)
        shape = state_of(weight).shape
        out = torch.empty(shape, dtype=dtype, device=weight.device) if out is None else out
        if out.shape != shape or out.dtype != dtype or not out.is_contiguous():
            raise ValueError(f"out is {list(out.shape)} {out.dtype}; a contiguous {list(shape)} {dtype} is wanted")
        return _kernel([(0, weight)], out)
    weight = weight.detach().to(dtype) if out is None else weight.detach()
    return weight if out is None else out.copy_(weight)


def dequantize_into(buffer: Tensor, weights: Sequence[tuple[int, Tensor]]) -> None:
    """Dequantize 4-bit weights of one model into a flat buffer; on CUDA in one launch.

    Args:
        buffer: contiguous, in the dtype of the products.
        weights: (first element of its place in the buffer, weight).
    """
    if runs_triton("nf4", buffer):
        _kernel(weights, buffer)
        return
    for start, weight in weights:
        shape = state_of(weight).shape
        _twin(weight, buffer.dtype, buffer[start : start + shape.numel()].view(shape))


def _twin(weight: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    state = state_of(weight)
    kind = torch.float32 if dtype == torch.float64 else dtype  # bitsandbytes knows no float64
    if weight.device.type == "cpu" and state.shape[-1] % state.blocksize:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        packed, count = weight.data.reshape(-1).view(torch.uint8), state.shape.numel()
        result = _block_by_block(packed, absmax, count, state.blocksize, state.quant_type, kind).view(state.shape)
    else:
        wanted = copy(state)  # the result's dtype is read from it, and the weight's is shared
        wanted.dtype = kind
        if out is not None and out.is_cuda and out.dtype == kind:
            return bnb.dequantize_4bit(weight.data, wanted, out=out)
        result = bnb.dequantize_4bit(weight.data, wanted).view(state.shape)
    result = result.to(dtype)
    return result if out is None else out.copy_(result)


def _block_by_block(
    packed: Tensor, absmax: Tensor, count: int, size: int, quant_type: str, dtype: torch.dtype
) -> Tensor:
    """`count` values in blocks of `size`, flat, on the CPU. bitsandbytes gets one block a row: its kernel for AVX-512 mixes up
    the scales of rows that are no whole number of blocks."""
    whole = count // size
    flat = torch.empty(count, dtype=dtype)
    for first, rows, width in ((0, whole, size), (whole, 1, count % size)):
        if rows * width:
            part = packed[first * size // 2 :][: (rows * width + 1) // 2].view(-1, 1)
            state = bnb.QuantState(
                absmax=absmax[first : first + rows],
                shape=torch.Size((rows, width)),
                blocksize=size,
                quant_type=quant_type,
                dtype=dtype,
            )
            flat[first * size :][: rows * width] = bnb.dequantize_4bit(part, state).reshape(-1)
    return flat


@jit
def block_values(tensors, block, filled, byte, there, NESTED: tl.constexpr, NESTED_BLOCK: tl.constexpr):
    """The values of a 4-bit weight's blocks, float32 [blocks, values of a block].

    `tensors` points to ``storage_addresses``, `byte` are the blocks' bytes; `filled` and `there` mask blocks and bytes.
    """
    packed = tl.multiple_of(tl.load(tensors).to(tl.pointer_type(tl.uint8)), 16)
    code = tl.load(tensors + 2).to(tl.pointer_type(tl.float32))
    if NESTED:
        absmax = tl.load(tensors + 1).to(tl.pointer_type(tl.uint8))
        nested_absmax = tl.load(tensors + 3).to(tl.pointer_type(tl.float32))
        nested_code = tl.load(tensors + 4).to(tl.pointer_type(tl.float32))
        offset = tl.load(tensors + 5).to(tl.pointer_type(tl.float32))
        scale = tl.load(nested_code + tl.load(absmax + block, mask=filled, other=0).to(tl.int32))
        # the sum is after the product and both round, as in bitsandbytes: launched with enable_fp_fusion=False
        scale = scale * tl.load(nested_absmax + block // NESTED_BLOCK, mask=filled, other=0.0) + tl.load(offset)
    else:
        scale = tl.load(tl.load(tensors + 1).to(tl.pointer_type(tl.float32)) + block, mask=filled, other=0.0)
    pair = tl.load(packed + byte, mask=there, other=0).to(tl.int32)
    # the high half of a byte is the earlier value
    return tl.interleave(tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))) * scale[:, None]


@jit(do_not_specialize=["count"])
def _dequantize(
    table,
    out,
    count,
    NESTED: tl.constexpr,
    WHOLE: tl.constexpr,
    HALF: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A row is a block of 2 · HALF values that share a scale; a program takes ROWS of them, of one of `count` weights.

    The table has nine numbers a weight: its first program, its place in out, its elements (WHOLE: whole blocks), and the
    addresses of its tensors.
    """
    program = tl.program_id(0)
    which = 0
    for i in range(1, count):
        which += (program >= tl.load(table + 9 * i)).to(tl.int32)
    entry = table + 9 * which
    row = (program - tl.load(entry)) * ROWS + tl.arange(0, ROWS)
    start = tl.multiple_of(tl.load(entry + 1), 16)
    elements = tl.load(entry + 2)
    filled = row * (2 * HALF) < elements
    byte = row[:, None] * HALF + tl.arange(0, HALF)[None, :]
    place = row[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    # a mask by rows lets a store take 16 bytes
    there, stored = (filled[:, None], filled[:, None]) if WHOLE else (byte < (elements + 1) // 2, place < elements)
    value = block_values(entry + 3, row, filled, byte, there, NESTED, NESTED_BLOCK)
    tl.store(out + start + place, value.to(out.dtype.element_ty), mask=stored)


def storage_addresses(weight: Tensor) -> tuple[int, ...]:
    """The addresses of a 4-bit weight's six tensors, as ``block_values`` reads them."""
    state = state_of(weight)
    tensors = [weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    assert all(t.device == weight.device and t.is_contiguous() for t in tensors)
    return (*(t.data_ptr() for t in tensors), *[0] * (6 - len(tensors)))


@lru_cache(maxsize=1024)
def table_on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A kernel's table of numbers, int64."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _kernel(weights: Sequence[tuple[int, Tensor]], out: Tensor) -> Tensor:
    """Weights of one kind of storage, in one launch, each to its place in `out` (see ``dequantize_into``)."""
    state = state_of(weights[0][1])
    nested, half = state.state2, state.blocksize // 2
    rows = max(1, 1024 // half)
    numbers: list[int] = []
    programs, whole = 0, True
    for start, weight in weights:
        own = state_of(weight)
        elements = own.shape.numel()
        assert own.blocksize == state.blocksize and own.nested == state.nested and weight.device == out.device
        assert start % 16 == 0 and start + elements <= out.numel()
        numbers += [programs, start, elements, *storage_addresses(weight)]
        programs += -(-elements // (2 * half * rows))
        whole = whole and elements % (2 * half) == 0
    if not programs:
        return out
    with on_device(out):
        _dequantize[(programs,)](
            table_on_device(tuple(numbers), out.device),
            out,
            len(weights),
            NESTED=bool(nested),
            WHOLE=whole,
            HALF=half,
            NESTED_BLOCK=nested.blocksize if nested else 1,
            ROWS=rows,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def sample_weight(values: Tensor, *, nested: bool = True) -> Tensor:
    """A 4-bit weight for checks."""
    data, state = bnb.quantize_4bit(values.float(), blocksize=64, quant_type="nf4", compress_statistics=nested)
    return Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)


def sample(draw: Draw, widths: Widths) -> list[Tensor]:
    """What ``dispatch.check_kernels`` compares: two weights in one launch."""
    found = []
    for nested in (True, False):
        first, second = (sample_weight(draw(rows, widths.inner), nested=nested) for rows in (33, 3))
        start = -(-33 * widths.inner // 16) * 16
        buffer = torch.zeros_like(draw(start + 3 * widths.inner))
        dequantize_into(buffer, [(0, first), (start, second)])
        found.append(buffer)
    return found


BLOCK = 64
# Quantizing takes about five float32 copies of what it works on: pieces of 4 Mi elements keep that under 100 MB.
_PIECE = 4 * 2**20


def _stored(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _block_by_block(packed, absmax, math.prod(shape), BLOCK, "nf4", dtype).view(shape)


def through_nf4(weight: Tensor, *, double_quant: bool, dtype: torch.dtype) -> Tensor:
    """The values that a matrix has after transformers loads it in 4 bits with `dtype=dtype`.

    It is cast to `dtype` first, then quantized over its flattened values in blocks of 64; with `double_quant` the
    scales are themselves quantized to 8 bits around their mean, in blocks of 256.

    Args:
        weight: [out, in], floating point, on the CPU; may be mapped from a file.
        dtype: float32, float16 or bfloat16.
    Returns:
        [out, in] of `dtype`.
    """
    packed, absmax = [], []
    for piece in weight.reshape(-1).split(_PIECE):
        values, state = bnb.quantize_4bit(piece.to(dtype), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
        packed.append(values.view(-1))
        absmax.append(state.absmax)
    scales = torch.cat(absmax)
    if double_quant:
        offset = scales.mean()
        codes, nested = bnb.quantize_blockwise(scales - offset, blocksize=256)
        scales = bnb.dequantize_blockwise(codes, nested) + offset
    return _stored(torch.cat(packed), scales, tuple(weight.shape), dtype)


def read_stored(tensors: Mapping[str, Tensor]) -> Tensor:
    """A matrix from the tensors under which a quantized checkpoint keeps it, dequantized to the checkpoint's dtype.

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
    return _stored(tensors[""].reshape(-1).view(torch.uint8), absmax.float(), tuple(state.shape), state.dtype)
