"""Predicted bytes of a run on the device and in main memory, by name, before anything is allocated.

Resident tensors and kept activations are exact counts. A layer's peak is the largest of a few moments, each
a sum of tensor widths times tokens (``layer_bytes``). Two numbers are estimates: the CUDA context, and the allocator's slack.
``tests/memory/test_estimate.py`` compares the prediction with recorded and with real allocations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig
from ..model.families import Shape
from ..ops.int8 import outlier_count
from ..ops.lora import ALIGNMENT, SMALL
from .activations import head_bytes, layer_bytes
from .gpus import MIB, Device
from .workload import Workload

SLAB_ALIGNMENT = 256  # of a tensor in a streamed layer's block (``weight_streaming``)
NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale; scales that share one of their own
# The allocator's slack. Segments of large blocks grow by 20 MiB, those of small ones by 2, requests are rounded to 512 bytes,
# and a freed block is not always where the next one fits: a share of the transient bytes, and two steps of growth.
SLACK_SHARE, SLACK_BYTES = 0.03, 40 * MIB
# A layer and the head of the other engines take so many times as much, by rough estimate.
OTHER_ENGINES = 3

# what is on the device at one moment of a step, beside what is resident
TRANSIENT = (
    "kept activations",
    "reference's hidden states",
    "a layer at work",
    "the head at work",
    "inputs",
)
# of a streamed base; in main memory, but not locked there (a tied one is the output head, which is locked)
PAGED = "embedding"


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by name."""

    resident: dict[str, int]  # on the device from the first step to the last
    transient: dict[str, int]  # on the device at the peak, beside that
    at: str  # the moment of the peak
    managed: int  # optimizer states that CUDA moves to the host where the device is full
    host: dict[str, int]  # in main memory, locked but for `PAGED`
    peak: int  # `resident` and `transient` together


def stored_bytes(job: Workload, projection: str) -> list[int]:
    """The tensors of one frozen projection, as bitsandbytes stores them: packed values, scales, their code; nested scales
    add their own scales, offset and code."""
    out, width = job.shape.matrices[projection]
    numbers = out * width
    if job.storage == "dense":
        return [numbers * job.dtype.itemsize]
    packed, scales, code = -(-numbers // 2), -(-numbers // NF4_BLOCK), 16 * 4
    if job.storage == "nf4":
        return [packed, 4 * scales, code]
    return [packed, scales, code, 4, 4 * -(-scales // NESTED_BLOCK), 256 * 4]


@lru_cache(maxsize=256)
def slab_bytes(job: Workload) -> int:
    """A streamed layer's projections in one block, each tensor aligned."""
    sizes = [size for name in job.shape.matrices for size in stored_bytes(job, name)]
    return sum(-(-size // SLAB_ALIGNMENT) * SLAB_ALIGNMENT for size in sizes)


def base_bytes(job: Workload, *, stream: bool = False) -> dict[str, int]:
    """The frozen base on the device."""
    s, size = job.shape, job.dtype.itemsize
    layer, norms = 0, (2 + len(s.family.post_norms)) * s.hidden + len(s.family.head_norms) * s.head_dim
    for name in s.matrices:
        layer += sum(stored_bytes(job, name))
        norms += s.matrices[name][0] if name in s.biases else 0
    norms = size * (s.layers * norms + s.hidden)
    if stream:
        return {"two layers' buffers": min(2, s.layers) * slab_bytes(job), "norms": norms}
    head = {} if s.tied else {"output head": size * s.head_weights}
    return {"decoder layers": s.layers * layer, "embedding": size * s.head_weights, **head, "norms": norms}


def buffer_numbers(tensors: Sequence[int]) -> int:
    """Of a buffer of an adapter's matrices, each aligned."""
    return sum(-(-n // ALIGNMENT) * ALIGNMENT for n in tensors)


def optimizer_bytes(optim: str, tensors: tuple[int, ...], *, cuda: bool = True) -> tuple[int, int]:
    """(on the device, managed) bytes of the optimizer's state.

    Two moments a number, of 4 bytes or of one with a scale for every 256 (bitsandbytes; tensors under 4,096 numbers: 4 bytes).
    The paged optimizers' states of buffers from 100,000 numbers on are managed memory. torch keeps a float32 step number.

    Args:
        tensors: float32 numbers in each trained tensor.
    """
    if optim == "adamw_torch" or (optim == "paged_adamw_32bit" and not cuda):
        return 8 * buffer_numbers(tensors) + 4, 0
    small = [n for n in tensors if "8bit" in optim and n < SMALL]  # a buffer of their own
    device = managed = 0
    for buffer, eight in ((small, False), ([n for n in tensors if n >= SMALL or not small], "8bit" in optim)):
        n = buffer_numbers(buffer)
        if optim.startswith("paged") and n >= 100_000 and cuda:
            managed += (2 if eight else 8) * n
        else:
            device += (2 if eight else 8) * n
        if eight and n:  # the scales, and the two codes
            device += 2 * 4 * n // ALIGNMENT + 2 * 4 * 256
    return device, managed


def scratch_bytes(shape: Shape, itemsize: int, mode: ScratchMode, int8: bool = False) -> int:
    """The buffer of dequantized weights: q, k, v, o beside all of gate, up, down (``layer``) or the largest (``small``). In int8
    for both passes, with outlier channels of a whole layer."""
    mlp = [math.prod(shape.matrices[name]) for site in shape.family.sites[2:] for name in site]
    attention = shape.layer_weights - sum(mlp)
    numbers = attention + (sum(mlp) if mode == "layer" else max(mlp))
    if not int8:
        return itemsize * numbers
    return 2 * numbers + itemsize * sum(out * outlier_count(width) for out, width in shape.matrices.values())


def int8_bytes(shape: Shape) -> int:
    """Scales of all matrices' rows and columns, and each site's outlier channels."""
    layer = 4 * sum(map(sum, shape.matrices.values()))
    for name, *_ in shape.family.sites:
        width = shape.matrices[name][1]
        layer += 8 * outlier_count(width) + 2 * width
    return shape.layers * layer


@lru_cache(maxsize=256)
def resident_bytes(job: Workload, stream: bool, scratch: ScratchMode, device: Device) -> tuple[dict[str, int], int]:
    """(bytes by name on the device from the first step to the last; optimizer states that CUDA may move to the host)."""
    optimizer, managed = optimizer_bytes(job.optim, job.trained_tensors, cuda=device.cuda)
    adapters = sum(4 * buffer_numbers(adapter.tensors(job.shape)) for adapter in job.adapters)
    scratch_size = scratch_bytes(job.shape, job.dtype.itemsize, scratch, job.int8)
    parts = {
        **base_bytes(job, stream=stream),
        "dequantized weights": 0 if job.storage == "dense" else scratch_size,
        "int8 scales": int8_bytes(job.shape) if job.int8 else 0,
        "adapters": adapters,
        "gradients": 4 * buffer_numbers(job.trained_tensors),
        "optimizer's state": optimizer,
        # the forward pass has one, and the backward pass, which runs in autograd's thread, another
        "matrix products' workspace": 2 * device.workspace,
        "CUDA context" if device.cuda else "process": device.context,
    }
    return {name: size for name, size in parts.items() if size}, managed


def estimate(job: Workload, execution: ExecutionConfig, device: Device, *, training: bool = True) -> MemoryBreakdown:
    """A run's memory.

    Args:
        training: with a backward pass; else an evaluation's.
    """
    s, size, tokens = job.shape, job.dtype.itemsize, max(execution.micro_tokens, job.longest)
    together = job.live_reference and execution.reference == "together"
    resident, managed = resident_bytes(job, execution.stream, execution.scratch, device)
    kept_by, forward, backward = layer_bytes(job, tokens, execution.tile, device)
    head, head_at = head_bytes(job, tokens, execution.stream, together, device.cuda)
    x = tokens * s.hidden * size
    beside = x * together
    # a micro-batch's ids, positions and streams; its rotary angles; rows and ids of its targets; its hidden states
    inputs = tokens * (3 * 8 + 2 * s.tables * (s.rotary or s.head_dim) * size) + round(tokens * job.targets) * 16
    states = inputs + x
    # (where, layer, bytes by the names below) at every moment that may be the peak
    moments: list[tuple[str, int, tuple[int, ...]]] = []
    # kept by earlier layers on the device; by the layer before, on its way to the host; on the host
    resting = moving = on_host = 0
    for index, keep in enumerate(execution.keep if training else ()):
        away, kept, there = index < execution.offload, kept_by[keep], resting + moving
        moments.append(("forward pass of layer", index, (there, beside, forward[keep], 0, states)))
        if together:
            found = (resting + kept, x, forward[None], 0, states)
            moments.append(("reference's pass of layer", index, found))
        moments.append(("backward pass of layer", index, (there, 0, backward[keep, away], 0, states)))
        moving = kept if away else 0
        on_host += moving
        resting += kept - moving
    if training:
        moments.append((head_at, -1, (resting, 0, 0, head, inputs)))
    else:
        moments.append(("evaluation", -1, (0, beside, max(head, forward[None]), 0, states)))
    at, index, peak = max(moments, key=lambda moment: sum(moment[2]))
    transient = {name: n for name, n in zip(TRANSIENT, peak) if n}
    if job.engine != "fused":
        transient = {name: OTHER_ENGINES * n for name, n in transient.items()}
    if device.cuda:
        transient["allocator's slack"] = SLACK_BYTES + round(SLACK_SHARE * sum(peak))
    host = {"kept activations": on_host} if on_host else {}
    if execution.stream:
        copied = s.head_weights * size
        host["streamed base"] = s.layers * slab_bytes(job) + copied
        if not s.tied:
            host[PAGED] = copied
    total = sum(resident.values()) + sum(transient.values())
    return MemoryBreakdown(resident, transient, at if index < 0 else f"{at} {index + 1}", managed, host, total)
