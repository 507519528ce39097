"""A cost model of an optimizer step, from a card's data sheet or its measured rates.

A layer's pass takes the longer of what its kernels take (matrix products at the card's rate, all other bytes at the memory's
rate) and of the processor's time to launch them; copies to and from the host run beside it. The model orders settings, and
estimates the cost of a run.
"""

from __future__ import annotations

from functools import lru_cache

from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep
from ..ops.int8 import outlier_count
from .activations import Kind, kept_bytes
from .estimate import optimizer_bytes, slab_bytes
from .gpus import Device, Gpu
from .workload import Workload

# Kernels that a layer with one adapter launches in its forward and in its backward pass, by what is kept, and how many more a
# second adapter and dropout launch; ``tests/contract/test_launches.py`` counts them.
LAUNCHES: dict[Keep, tuple[int, int]] = {"all": (23, 37), "attention": (23, 51), "input": (23, 55)}
STACKED, DROPPED = (14, 20), (0, 4)
# Seconds that the processor takes (Python and PyTorch, measured on a server's processor): for a layer's pass, and for each launch.
PASS, LAUNCH = 250e-6, 11e-6
# Attention's operations run at this share of the rate of matrix products.
ATTENTION_SHARE = 0.6
# By estimate int8 products reach this share of the card's int8 rate as 16-bit ones reach it of theirs.
INT8_SHARE = 0.75
# Share of the memory's rate that kernels reach.
BANDWIDTH_SHARE = 0.8
# Matrix products of so many tokens reach half of the card's rate.
HALF_RATE_TOKENS = 96
# Sites whose products the backward pass computes again, by what is kept (``layer``: down_proj's only where a norm follows it).
AGAIN: dict[Keep, tuple[int, ...]] = {"input": (0, 1, 2), "attention": (0, 2), "all": ()}


def step_time(job: Workload, execution: ExecutionConfig, card: Gpu) -> tuple[float, float, float]:
    """(seconds of one optimizer step, in micro-batches of the execution's tokens; tokens a second; those of a pass without
    gradients)."""
    tokens = max(execution.micro_tokens, job.longest)
    own_pass = job.live_reference and execution.reference == "own"
    layers, batch, update, no_gradients = _seconds(
        job, tokens, execution.tile, execution.stream, execution.scratch, own_pass, card
    )
    for index, keep in enumerate(execution.keep):
        batch += layers[keep, index < execution.offload]
    batches = max(1.0, (job.step_tokens or tokens) / tokens)
    step = batches * batch + update
    return step, batches * tokens / step, tokens / no_gradients


def launches(job: Workload, keep: Keep) -> tuple[int, int]:
    """Kernels that a layer launches in its forward and in its backward pass."""
    (forward, backward), stacked = LAUNCHES[keep], len(job.adapters) > 1
    more = [stacked * stack + job.dropout * drop for stack, drop in zip(STACKED, DROPPED)]
    # in int8 every projection's gradient is quantized and has a product of its own
    more[1] += job.int8 * (6 + (keep != "all") + 4 * job.dropout)
    return forward + more[0], backward + more[1]


def attention_operations(job: Workload) -> float:
    """Forward operations a token, of a layer on average: causal, so half of a sequence, and never beyond the window."""
    length, windows = min(job.segment or job.longest, job.longest), job.shape.windows or (None,)
    seen = 0.0
    for window in windows:
        seen += length / 2 if window is None or length <= window else window - window**2 / (2 * length)
    return 4 * job.shape.queries * seen / len(windows)


@lru_cache(maxsize=4096)
def _seconds(
    job: Workload, tokens: int, tile: int | None, stream: bool, scratch: ScratchMode, own_pass: bool, card: Gpu
) -> tuple[dict[Kind, float], float, float, float]:
    """(seconds of a layer and micro-batch by (policy, whether what it keeps goes to the host); the output head's; those of the
    optimizer's update, once a step; those of a micro-batch without gradients).

    Args:
        own_pass: a live reference runs in a pass of its own.
    """
    s, size, weights = job.shape, job.dtype.itemsize, job.shape.layer_weights
    # operations, bytes of the card's memory and bytes of the link to the host a second
    rate = card.rate(job.dtype) * tokens / (tokens + HALF_RATE_TOKENS)
    memory, link = card.bandwidth * 1e9 * BANDWIDTH_SHARE, card.pcie * 1e9
    # operations a token of a layer on average, by site: of the base and of the adapters (the same again for the gradient of
    # the input), and of the trained adapter's gradients
    products, trained = [], 0.0
    # operations of the base count as those of 16 bits that take the same time
    faster = card.int8 * INT8_SHARE if job.int8 else 1.0
    for site in s.family.sites:
        operations = 0.0
        for name in site:
            out, width = s.matrices[name]
            operations += 2.0 * out * width / faster + job.int8 * 2 * out * outlier_count(width)
            for adapter in job.adapters:
                for layer in adapter.ranks:
                    narrow = 2 * layer.get(name, 0) * (out + width) / s.layers
                    operations += narrow
                    trained += narrow * adapter.trained
        products.append(operations)
    forward_operations, scores = sum(products), attention_operations(job)
    # bytes a token through the card's memory beside matrix products: norms, rotations, SwiGLU, dropout, residuals
    fused = Device.of(card.capability, size == 2).fuses_dropout
    dropped = (job.dropout and not fused) * (2 * s.hidden + s.queries + s.inner)
    heads, posts = 2 * (s.queries + s.keys), len(s.family.post_norms)
    heads += heads * bool(s.family.head_norms)
    moved_forward = size * ((6 + 2 * posts) * s.hidden + heads + 3 * s.inner + 2 * dropped)
    moved_backward = size * ((10 + 3 * posts) * s.hidden + heads + 6 * s.inner + 5 * dropped)
    if job.int8:  # activations and gradients are read once more, and their codes written
        moved_forward += (size + 1) * sum(s.matrices[site[0]][1] for site in s.family.sites)
        moved_backward += (size + 1) * sum(out for out, _ in s.matrices.values())
    small = scratch == "small"
    dense = 1 if job.int8 else size  # bytes of a dequantized number
    unpacking = memory / (0.53 + dense) if card.unpacking is None else card.unpacking * 1e9
    unpacked = 0.0 if job.storage == "dense" else weights / unpacking
    gates = 2 * s.hidden * s.inner / weights  # the share of gate and up, which the small buffer takes twice
    slab = slab_bytes(job) / link if stream else 0.0

    def one_pass(operations: float, attention: float, moved: float, launched: int, extra: float) -> float:
        # products read their matrices at least once
        reads = operations / forward_operations * weights * dense / memory
        busy = max(tokens * operations / rate, reads) + tokens * attention / (rate * ATTENTION_SHARE)
        return max(busy + tokens * moved / memory + extra, PASS + launched * LAUNCH)

    launched, _ = launches(job, "all")
    alone = one_pass(forward_operations, scores, moved_forward, launched, unpacked)
    forward, waiting = alone * (1 + 2 * job.mismatched), 0.0
    if job.live_reference:
        beside = one_pass(forward_operations, scores, moved_forward, launched, unpacked if own_pass else 0.0)
        forward += beside
        waiting = max(0.0, slab - beside) if own_pass else 0.0
    # smaller products are slower, every tile launches the MLP's kernels, and with the small buffer it dequantizes gate, up and
    # down; gate and up twice on the way back
    slower = again_launched = repeated = 0.0
    if tile is not None and tile < tokens:
        tiles = -(-tokens // tile)
        share = 3 * s.hidden * s.inner / weights  # the MLP's, of all matrices
        slower = share * tokens / rate * HALF_RATE_TOKENS * (1 / tile - 1 / tokens)
        again_launched = (tiles - 1) * LAUNCH * launched / 2
        repeated = (tiles - 1) * unpacked * share * small
    in_tiles = forward_operations * slower + again_launched + repeated
    forward, alone = forward + in_tiles, alone + in_tiles
    seconds: dict[Kind, float] = {}
    for keep, again in AGAIN.items():
        backward_operations = forward_operations + trained
        for index in (*again, *([3] if posts else [])):  # a norm reads down_proj's output
            backward_operations += products[index]
        backward = one_pass(
            backward_operations,
            (3.5 if keep == "input" else 2.5) * scores,
            moved_backward + moved_forward * (keep != "all"),
            launches(job, keep)[1],
            unpacked * (1 + gates * small),
        )
        backward += backward_operations * slower + 2 * again_launched + repeated * 5 / 3
        kept = sum(kept_bytes(s, size, keep, ranks) for ranks in job.ranks)
        for leaves in (False, True):
            away = leaves * tokens * kept / s.layers / link
            # copies to the host and from the host run beside each other, those that go the same way do not
            copies = max(0.0, max(away, slab) - forward) + max(0.0, away + slab - backward)
            seconds[keep, leaves] = forward + backward + waiting + copies
    targets = tokens * job.targets
    product = s.head_weights * 2 * targets / rate
    head_forward = product + 6 * targets * s.vocabulary * size / memory
    copied = s.head_weights * size / link if stream else 0.0
    passes = 1 + job.live_reference + 2 * job.mismatched
    head = passes * head_forward + product + copied
    # AdamW reads and writes weights, gradients and states once; clipping reads and writes the gradients
    state, managed = optimizer_bytes(job.optim, job.trained_tensors)
    update = (job.parameters * 24 + 2 * state) / memory + 2 * managed / link
    return seconds, head, update, s.layers * max(alone, slab) + head_forward + copied
