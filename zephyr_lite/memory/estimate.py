"""Predicted bytes of a run on the device and in main memory, by name, before anything is allocated.

Resident tensors and kept activations are exact counts. What a layer holds while it runs is the largest of a few moments, each
a sum of tensor widths times tokens (``layer_bytes``). Two numbers are estimates: the CUDA context, and the allocator's slack.
``tests/memory/test_estimate.py`` compares the prediction with recorded and with real allocations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep
from ..model.families import Shape
from ..ops.lora import ALIGNMENT, SMALL
from ..ops.token_logps import CHUNK_BYTES
from .workload import Workload

MIB, GIB = 2**20, 2**30
SLAB_ALIGNMENT = 256  # of a tensor in a streamed layer's block (``weight_streaming``)
NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale; scales that share one of their own
# A process's CUDA context, its kernels and the driver's own memory, outside the allocator: 0.4 to 0.8 GiB.
CONTEXT_BYTES = 3 * GIB // 4
# cuBLAS keeps a workspace (torch/cuda: CUBLAS_WORKSPACE_CONFIG's default :4096:2:16:8; 32 MiB from compute capability 9.0)
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = 8_519_680, 32 * MIB
# The allocator's slack. Segments of large blocks grow by 20 MiB, those of small ones by 2, requests are rounded to 512 bytes,
# and a freed block is not always where the next one fits: a share of the transient bytes, and two steps of growth.
SLACK_SHARE, SLACK_BYTES = 0.03, 40 * MIB
# A layer and the head of the other engines take so many times as much, by rough estimate.
OTHER_ENGINES = 3

# what a layer may keep, and whether that goes to the host
Kind = tuple[Keep, bool]
KEEPS: tuple[Keep, ...] = ("input", "attention", "all")
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
class Device:
    """How a device allocates."""

    backend: Literal["flash", "efficient", "cpu"] = "flash"  # the attention's implementation
    workspace: int = CUBLAS_BYTES  # bytes that its matrix products keep
    # bytes that a process takes before its first tensor, where free memory was not measured without them
    context: int = 0

    @classmethod
    def of(cls, capability: tuple[int, int], half: bool = True, *, context: int = CONTEXT_BYTES) -> Device:
        """A CUDA card by its compute capability; `half`: it computes in 16 bits."""
        return cls(
            "flash" if half and capability >= (8, 0) else "efficient",
            CUBLAS_BYTES_HOPPER if capability[0] == 9 else CUBLAS_BYTES,
            context,
        )

    @property
    def cuda(self) -> bool:
        return self.backend != "cpu"


CPU = Device("cpu", 0)


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by name."""

    resident: dict[str, int]  # on the device from the first step to the last
    transient: dict[str, int]  # on the device at the peak, beside that
    at: str  # the moment of the peak
    managed: int  # optimizer states that CUDA moves to the host where the device is full
    host: dict[str, int]  # in main memory, locked but for `PAGED`
    peak: int  # `resident` and `transient` together


# -- resident ----------------------------------------------------------------------------------------------------------


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


def scratch_bytes(shape: Shape, itemsize: int, mode: ScratchMode) -> int:
    """The buffer of dequantized weights: q, k, v, o beside all of gate, up, down (``layer``) or the largest (``small``)."""
    mlp = [math.prod(shape.matrices[name]) for site in shape.family.sites[2:] for name in site]
    attention = shape.layer_weights - sum(mlp)
    return itemsize * (attention + (sum(mlp) if mode == "layer" else max(mlp)))


@lru_cache(maxsize=256)
def resident_bytes(job: Workload, stream: bool, scratch: ScratchMode, device: Device) -> tuple[dict[str, int], int]:
    """(bytes by name on the device from the first step to the last; optimizer states that CUDA may move to the host)."""
    optimizer, managed = optimizer_bytes(job.optim, job.trained_tensors, cuda=device.cuda)
    adapters = sum(4 * buffer_numbers(adapter.tensors(job.shape)) for adapter in job.adapters)
    parts = base_bytes(job, stream=stream)
    for name, size in (
        ("dequantized weights", 0 if job.storage == "dense" else scratch_bytes(job.shape, job.dtype.itemsize, scratch)),
        ("adapters", adapters),
        ("gradients", 4 * buffer_numbers(job.trained_tensors)),
        ("optimizer's state", optimizer),
        # the forward pass has one, and the backward pass, which runs in autograd's thread, another
        ("matrix products' workspace", 2 * device.workspace),
        ("CUDA context" if device.cuda else "process", device.context),
    ):
        if size:
            parts[name] = size
    return parts, managed


# -- activations -------------------------------------------------------------------------------------------------------


def kept_bytes(shape: Shape, itemsize: int, keep: Keep, ranks: int = 0) -> int:
    """Bytes a token that one layer keeps for its backward pass, exactly.

    Args:
        ranks: of all adapters on all projections of the layer, summed.
    """
    width = shape.hidden  # the layer's input
    if keep == "input":
        return width * itemsize
    width += shape.queries + shape.hidden  # the attention's output, and the residual after it
    if keep == "all":
        width += shape.queries + 2 * shape.keys + 2 * shape.inner + ranks
    return width * itemsize + shape.heads * max(4, itemsize)  # with the log-sum-exp


def kept_per_token(job: Workload, keep: Sequence[Keep]) -> int:
    """Bytes a token that all layers keep, on the device or on the host."""
    layers = zip(keep, job.ranks, strict=True)
    return sum(kept_bytes(job.shape, job.dtype.itemsize, policy, ranks) for policy, ranks in layers)


@lru_cache(maxsize=1024)
def layer_bytes(
    job: Workload, tokens: int, tile: int | None, device: Device
) -> tuple[dict[Keep, int], dict[Keep | None, int], dict[Kind, int]]:
    """What one layer holds for a micro-batch: the largest of its attention's, its MLP's and its projections' moments.

    Args:
        tokens: of the micro-batch.
        tile: tokens that the MLP takes at a time; None: all.

    Returns:
        by policy, the bytes that it keeps after its forward pass;
        by policy (None: nothing is kept), those at the forward pass's peak, its input aside, what it keeps included;
        by (policy, whether what was kept was on the host), those at the backward pass's peak, the output's gradient aside,
        what was kept and the new gradients included.
    """
    s, size = job.shape, job.dtype.itemsize
    wide = max(4, size)
    tiles = 1 if tile is None else -(-tokens // tile)
    rows = tokens if tiles == 1 else tile or tokens
    keys = tokens if job.method == "sft" else round(tokens * job.keys)
    ranks = job.site_ranks
    (qkv_rank, qkv_trained), (out_rank, out_trained), (mlp_rank, mlp_trained), (down_rank, down_trained) = ranks
    qkv, both = s.queries + 2 * s.keys, 2 * s.inner
    in_qkv, _, in_mlp, _ = map(len, s.family.sites)  # matrices of a site

    def of(width: int, count: int = tokens) -> int:
        return width * count * size

    # attention: its output with the log-sum-exp, keys and values as its kernel takes them, and the kernel's workspace
    lse, d_kv, all_heads = tokens * s.heads * wide, of(s.keys, keys), of(s.queries, keys)
    attended = of(s.queries) + lse
    gathered = 2 * d_kv if keys != tokens else 0
    expanded = 2 * all_heads if s.heads != s.kv_heads else 0
    if device.backend == "flash":
        # FlashAttention-2, variable lengths: a float32 sum of dq and a row sum, each sequence padded to 128
        segments = max(1, -(-tokens // (job.segment or tokens))) + (job.method == "dpo")
        head = -(-s.head_dim // 32) * 32
        attention_forward = gathered
        attention_backward = (
            gathered + 4 * (tokens + 128 * segments) * s.heads * (1 + head) + of(s.queries) + 2 * d_kv + expanded
        )
    elif device.backend == "efficient":
        attention_forward = gathered + expanded + attended
        sums = 4 * (tokens + 2 * keys) * s.queries + 4 * tokens * s.heads  # float32, of the three gradients
        attention_backward = gathered + expanded + 2 * d_kv + lse + of(s.queries) + 2 * all_heads + sums
    else:
        attention_forward = gathered + attended
        attention_backward = gathered + bool(gathered) * 2 * d_kv + of(s.queries) + 2 * all_heads + d_kv

    if s.family.head_norms:  # q and k as the attention takes them, and the norms' numbers
        attention_forward += of(s.queries + s.keys) + wide * tokens * (s.heads + s.kv_heads)
        attention_backward += of(s.queries + s.keys)
    # of norms after the branches: the projections that they read, and a number a row
    post = bool(s.family.post_norms)
    stacked = len(job.adapters) > 1

    def concatenated(rank: int, width: int) -> int:
        """The matrices of a stack's adapters beside each other."""
        return rank * width * size * (stacked and not job.dropout)

    def numbers(rank: int, width: int, outs: int, projections: int) -> int:
        """Of a site's adapters: all A (width 0: without them), and the B of each projection."""
        return rank * width + rank * outs // projections

    def products(rank: int, trained: int, width: int, outs: int, projections: int, count: int) -> int:
        """Beside the rest while a site's adapters are differentiated: the adapters beside each other, or the gradients and the
        trained adapter's columns; the dropped input; on a CPU 16-bit factors are copied to 32 bits."""
        dropped = of(width, count) if job.dropout else 0
        columns = of(trained, count) if stacked and not job.dropout else 0
        copies = 4 * count * (max(width, outs // projections) + trained) if size < 4 and not device.cuda else 0
        return dropped + max(
            concatenated(rank, width), columns + copies + wide * numbers(trained, width, outs, projections)
        )

    # the gradients of the sites' adapters
    of_mlp = wide * numbers(mlp_trained, s.hidden, both, in_mlp)
    of_down = wide * numbers(down_trained, s.inner, s.hidden, 1)
    of_out = wide * numbers(out_trained, s.queries, s.hidden, 1)
    # the adapters in the compute dtype, which a pass of the layer makes once; in 32 bits B only, for its scale
    half = size < 4
    casts = numbers(qkv_rank, half * s.hidden, qkv, in_qkv) + numbers(out_rank, half * s.queries, s.hidden, 1)
    casts += numbers(mlp_rank, half * s.hidden, both, in_mlp) + numbers(down_rank, half * s.inner, s.hidden, 1)
    casts *= size

    forward: dict[Keep | None, int] = {}
    policies: tuple[Keep | None, ...] = (None, "input", "attention", "all")
    for policy in policies:
        whole = policy == "all"
        attention = of(s.hidden + qkv_rank + qkv) + attended + attention_forward
        # the residual before the MLP, and y, which is in its place where it is not kept
        apart = policy in ("attention", "all") or post
        held = of(qkv_rank + out_rank + s.hidden * (1 + apart)) + wide * tokens
        held += (attended + of(s.hidden) * post) * (policy in ("attention", "all")) + of(qkv) * whole
        held += of(both + mlp_rank + down_rank) * (whole and tiles > 1)
        gate_up = both if tiles == 1 or not whole else 0
        activated = of(mlp_rank + gate_up, rows) + wide * rows
        activated += max(of(s.inner, rows), of(s.hidden, rows) + concatenated(mlp_rank // in_mlp, both // in_mlp))
        down = of(down_rank + s.inner * job.dropout, rows)
        down = max(down, concatenated(down_rank, s.inner)) - of(both, rows) * (not whole)
        joined = of(mlp_rank + down_rank) * (whole and tiles > 1)  # the tiles' products, beside each other
        forward[policy] = casts + max(attention, held + max(activated + max(0, down), joined))

    kept: dict[Keep, int] = {}
    backward: dict[Kind, int] = {}
    kinds: tuple[Kind, ...] = tuple(product(KEEPS, (False, True)))
    for keep, owned in kinds:
        kept[keep] = tokens * kept_bytes(s, size, keep, max(job.ranks))
        whole = keep == "all"
        # after the recomputation the same activations are there under every policy
        there = of(2 * s.hidden + s.queries + qkv + qkv_rank + out_rank) + lse
        there += of(both + mlp_rank + down_rank) * whole + (of(s.hidden) + wide * tokens) * post
        recompute = 0
        if keep == "input":
            recompute = of(2 * s.hidden + qkv_rank + qkv) + attended + attention_forward
        work = of(both, rows) * (not (whole and owned)) + of(mlp_rank, rows) * (not whole)
        if tiles > 1:  # the whole gradient, the one of the tile before, and its adapters' gradients and their sums
            work += of(s.hidden) + of(s.hidden, rows) + min(2, tiles - 1) * (of_mlp + of_down)
        down = of(down_rank + s.inner + down_rank * (not whole), rows)
        down += products(down_rank, down_trained, s.inner, s.hidden, 1, rows)
        up = of(mlp_rank + down_rank * (not whole) + 2 * s.hidden, rows) + of_down
        up += products(mlp_rank, mlp_trained, s.hidden, both, in_mlp, rows)
        if post:  # down is computed again, before the gradient of gate and up; its gradient is there until theirs is
            down = max(down, of(s.inner + s.hidden, rows) - of(both, rows) * (whole and not owned)) + of(s.hidden, rows)
        mlp = there + work + max(down, up)
        after = there - of(s.hidden) * (owned or keep == "input" or post) - of(both) * (owned and whole)
        after += of(s.hidden) + of_mlp + of_down - of(s.hidden) * (post and (owned or keep == "input"))
        if s.family.head_norms:
            after += wide * tokens * (s.heads + s.kv_heads)
        out = of(out_rank + s.queries + s.hidden * post)
        out += products(out_rank, out_trained, s.queries, s.hidden, 1, tokens)
        attention = of(out_rank + s.queries + qkv) + of_out + attention_backward
        last = of(qkv + qkv_rank + s.hidden) + of_out
        last += max(products(qkv_rank, qkv_trained, s.hidden, qkv, in_qkv, tokens), of(2 * s.hidden))
        backward[keep, owned] = casts + max(recompute, mlp, after + max(out, attention, last))
    return kept, forward, backward


@lru_cache(maxsize=1024)
def head_bytes(job: Workload, tokens: int, stream: bool, together: bool, cuda: bool) -> tuple[int, str]:
    """(bytes at most, where) of the final norm and the output head, beside what layers keep."""
    size, wide = job.dtype.itemsize, max(4, job.dtype.itemsize)
    s, targets = job.shape, round(tokens * job.targets)
    rows, x, streams = targets * s.hidden * size, tokens * s.hidden * size, 1 + together
    chunk = max(1, min(targets, (4 * CHUNK_BYTES if cuda else CHUNK_BYTES) // (max(1, s.vocabulary) * wide)))
    if cuda and 128 < chunk < targets:
        chunk -= chunk % 128
    numbers = targets * (3 * wide + 1)  # the log-probabilities
    logits = chunk * s.vocabulary * size + 2 * chunk * s.hidden * size + 5 * wide * chunk
    copied = s.head_weights * size * stream
    return max(
        (streams * (x + 2 * rows) + 4 * targets, "final norm"),
        ((streams + 2) * rows + 4 * targets + copied + logits + numbers, "pass through the output head"),
        (3 * rows + 4 * targets + numbers, "backward pass of the output head"),
        (2 * rows + 44 * targets + x, "backward pass of the final norm"),
    )


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


def in_words(size: int) -> str:
    """``3.35 GiB``; below a tenth of one ``12.3 MiB``."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"
