"""Predicted time of a step: operations, bytes through the card's memory, bytes between main memory and card.

A model, not a measurement: matrix products at a share of the data sheet's rate (or at the measured rate), everything that
only moves bytes at the memory's rate, and copies to and from the host beside them. It orders settings, and estimates the
cost of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.execution import ExecutionConfig, Keep
from ..model.families import SITES
from .estimate import Kind, kept_bytes, optimizer_bytes, segments, slab_bytes
from .gpus import Gpu
from .workload import Workload

# Kernels that a layer launches in a pass, and the processor's time for each (Python and driver), in seconds.
LAUNCHES = {"forward": 70, "backward": 130}
LAUNCH = 7e-6
# Attention's operations run at this share of the rate of matrix products.
ATTENTION_SHARE = 0.6
# Share of the memory's rate that kernels reach.
BANDWIDTH_SHARE = 0.8
# Matrix products of so many tokens reach half of the card's rate.
HALF_RATE_TOKENS = 96
# Sites whose products the backward pass computes again, by what is kept (``layer``: never down_proj's).
AGAIN: dict[Keep, tuple[int, ...]] = {"input": (0, 1, 2), "attention": (0, 2), "all": ()}


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step."""

    step: float  # all of it
    waiting: float  # for copies from and to the host that computing does not hide
    tokens_per_second: float  # through the policy


def step_time(job: Workload, execution: ExecutionConfig, card: Gpu) -> Time:
    """One optimizer step, in micro-batches of the execution's tokens."""
    tokens = max(execution.micro_tokens, job.longest)
    key = (tokens, execution.tile, execution.stream, execution.scratch, execution.reference, card)
    if key not in job.memo:
        job.memo[key] = _micro_batch(job, tokens, execution, card)
    times, computing, waiting, update = job.memo[key]
    for keep, away, _, count in segments(execution.keep, execution.offload):
        computing += count * times[keep, away][0]
        waiting += count * times[keep, away][1]
    batches = max(1.0, (job.step_tokens or tokens) / tokens)
    step = batches * (computing + waiting) + update
    return Time(step, batches * waiting, batches * tokens / step)


def attention_operations(job: Workload) -> float:
    """Forward operations a token, of a layer on average: causal, so half of a sequence, and never beyond the window."""
    s, length = job.shape, min(job.segment or job.longest, job.longest)
    seen = [length / 2 if w is None or length <= w else w - w**2 / (2 * length) for w in s.windows or (None,)]
    return 4 * s.queries * sum(seen) / len(seen)


def _micro_batch(
    job: Workload, tokens: int, execution: ExecutionConfig, card: Gpu
) -> tuple[dict[Kind, tuple[float, float]], float, float, float]:
    """Seconds of a micro-batch: ((computing, waiting) of a layer by (policy, whether what it keeps goes to the host), the output
    head's, waiting for its copy), and the optimizer's of a step."""
    s, size, weights = job.shape, job.dtype.itemsize, job.shape.layer_weights
    # operations, bytes of the card's memory and bytes of the link to the host a second
    rate = card.rate(job.dtype) * tokens / (tokens + HALF_RATE_TOKENS)
    memory, link = card.bandwidth * 1e9 * BANDWIDTH_SHARE, card.pcie * 1e9
    # operations a token of a layer on average, by site: of the base and of the adapters (the same again for the gradient of
    # the input), and of the trained adapter's gradients
    products, trained = [2.0 * sum(s.matrices[n][0] * s.matrices[n][1] for n in site) for site in SITES], 0.0
    for adapter in job.adapters:
        for place, site in enumerate(SITES):
            narrow = 2 * sum(ranks.get(n, 0) * sum(s.matrices[n]) for ranks in adapter.ranks for n in site) / s.layers
            products[place] += narrow
            trained += narrow * adapter.trained
    forward_operations, scores = sum(products), attention_operations(job)
    # bytes a token through the card's memory beside matrix products: norms, rotations, SwiGLU, dropout, residuals
    dropped = job.dropout * (2 * s.hidden + s.queries + s.inner)
    moved_forward = size * (6 * s.hidden + 2 * (s.queries + s.keys) + 3 * s.inner + 2 * dropped)
    moved_backward = size * (10 * s.hidden + 2 * (s.queries + s.keys) + 6 * s.inner + 5 * dropped)
    together, small = execution.reference == "together", execution.scratch == "small"
    unpacking = memory / (0.53 + size) if card.unpacking is None else card.unpacking * 1e9
    unpacked = 0.0 if job.storage == "dense" else weights / unpacking
    gates = 2 * s.hidden * s.inner / weights  # the share of gate and up, which the small buffer takes twice
    slab = slab_bytes(job) / link if execution.stream else 0.0

    def one_pass(operations: float, attention: float, moved: float, launches: int, extra: float) -> float:
        # products read their matrices at least once
        reads = operations / forward_operations * weights * size / memory
        busy = max(tokens * operations / rate, reads) + tokens * attention / (rate * ATTENTION_SHARE)
        return max(busy + tokens * moved / memory + extra, launches * LAUNCH)

    times: dict[Kind, tuple[float, float]] = {}
    for keep, again in AGAIN.items():
        backward_operations = forward_operations + sum(products[i] for i in again) + trained
        forward = one_pass(forward_operations, scores, moved_forward, LAUNCHES["forward"], unpacked)
        waiting = 0.0
        if job.live_reference:
            extra = 0.0 if together else unpacked
            beside = one_pass(forward_operations, scores, moved_forward, LAUNCHES["forward"], extra)
            forward += beside
            waiting = 0.0 if together else max(0.0, slab - beside)
        backward = one_pass(
            backward_operations,
            (3.5 if keep == "input" else 2.5) * scores,
            moved_backward + moved_forward * (keep != "all"),
            LAUNCHES["backward"],
            unpacked * (1 + gates * small),
        )
        if execution.tile is not None and execution.tile < tokens:
            tiles = -(-tokens // execution.tile)
            share = 3 * s.hidden * s.inner / weights  # the MLP's, of all matrices
            # smaller products are slower, every tile launches the MLP's kernels, and with the small buffer it dequantizes gate,
            # up and down; gate and up twice on the way back
            slower = share * tokens / rate * HALF_RATE_TOKENS * (1 / execution.tile - 1 / tokens)
            launched = (tiles - 1) * LAUNCH * LAUNCHES["forward"] / 2
            repeated = (tiles - 1) * unpacked * share * small
            forward += forward_operations * slower + launched + repeated
            backward += backward_operations * slower + 2 * launched + repeated * 5 / 3
        kept = sum(kept_bytes(s, size, keep, ranks) for ranks in job.ranks) / s.layers
        for leaves in (False, True):
            away = leaves * tokens * kept / link
            # copies to the host and from the host run beside each other, those that go the same way do not
            copies = max(0.0, max(away, slab) - forward) + max(0.0, away + slab - backward)
            times[keep, leaves] = forward + backward, waiting + copies
    targets = tokens * job.targets
    head = s.head_weights * 2 * targets * (2 + job.live_reference) / rate
    head += 6 * targets * (1 + job.live_reference) * s.vocabulary * size / memory
    # AdamW reads and writes weights, gradients and states once; clipping reads and writes the gradients
    state, managed = optimizer_bytes(job.optim, job.trained_tensors)
    update = (job.parameters * 24 + 2 * state) / memory + 2 * managed / link
    return times, head, s.head_weights * size / link if execution.stream else 0.0, update
