"""Predicted time of a step: operations, bytes through the card's memory, bytes between main memory and card.

A model, not a measurement: matrix products at a share of the data sheet's rate (or at the measured rate), everything that
only moves bytes at the memory's rate, and copies to and from the host beside them. It orders settings, and tells roughly what
a run costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    """Seconds of one optimizer step.

    Attributes:
        step: all of it.
        waiting: for copies from and to the host that computing does not hide.
        tokens_per_second: through the policy.
    """

    step: float
    waiting: float
    tokens_per_second: float


def layer_operations(job: Workload, keep: Keep) -> tuple[float, float]:
    """(forward, backward) operations a token of one layer on average, attention's scores aside."""
    frozen, narrow, trained = _site_operations(job)
    forward = sum(frozen) + sum(narrow)
    again = sum(frozen[i] + narrow[i] for i in AGAIN[keep])
    return forward, forward + again + trained


def _site_operations(job: Workload) -> tuple[list[float], list[float], float]:
    """Operations a token of one layer on average: of the base's matrices and of the adapters', by site (the same again for the
    gradient of the input), and of the trained adapter's gradients."""
    if "operations" not in job.memo:
        s = job.shape
        frozen = [2.0 * sum(s.matrices[n][0] * s.matrices[n][1] for n in site) for site in SITES]
        narrow, trained = [0.0] * 4, 0.0
        for adapter in job.adapters:
            for place, site in enumerate(SITES):
                sizes = [ranks.get(n, 0) * sum(s.matrices[n]) for ranks in adapter.ranks for n in site]
                narrow[place] += 2 * sum(sizes) / s.layers
                trained += 2 * sum(sizes) / s.layers * adapter.trained
        job.memo["operations"] = frozen, narrow, trained
    return job.memo["operations"]


def attention_operations(job: Workload) -> float:
    """Forward operations a token, of a layer on average: causal, so half of a sequence, and never beyond the window."""
    s, length = job.shape, min(job.segment or job.longest, job.longest)
    seen = [length / 2 if w is None or length <= w else w - w**2 / (2 * length) for w in s.windows or (None,)]
    return 4 * s.queries * sum(seen) / len(seen)


def _bytes_moved(job: Workload) -> tuple[float, float]:
    """(forward, backward) bytes a token through the card's memory beside matrix products: norms, rotations, SwiGLU,
    dropout, residuals."""
    s, size = job.shape, job.dtype.itemsize
    rotated = 2 * (s.queries + s.keys)
    forward = 6 * s.hidden + rotated + 3 * s.inner
    backward = 10 * s.hidden + rotated + 6 * s.inner
    if job.dropout:
        inputs = 2 * s.hidden + s.queries + s.inner
        forward, backward = forward + 2 * inputs, backward + 5 * inputs
    return size * forward, size * backward


def _rates(job: Workload, tokens: int, card: Gpu) -> tuple[float, float, float]:
    """(operations, bytes of the card's memory, bytes of the link to the host) a second."""
    rate = card.rate(job.dtype) * tokens / (tokens + HALF_RATE_TOKENS)
    return rate, card.bandwidth * 1e9 * BANDWIDTH_SHARE, card.pcie * 1e9


def _layer_times(job: Workload, tokens: int, execution: ExecutionConfig, card: Gpu) -> dict[Kind, tuple[float, float]]:
    """(computing, waiting) seconds of a layer in one micro-batch, by (policy, whether what it keeps goes to the host)."""
    s, weights, size = job.shape, job.shape.layer_weights, job.dtype.itemsize
    rate, memory, link = _rates(job, tokens, card)
    moved_forward, moved_backward = _bytes_moved(job)
    scores = attention_operations(job)
    together, small = execution.reference == "together", execution.scratch == "small"
    unpacking = memory / (0.53 + size) if card.unpacking is None else card.unpacking * 1e9
    unpacked = 0.0 if job.storage == "dense" else weights / unpacking
    gates = 2 * s.hidden * s.inner / weights  # the share of gate and up, which the small buffer takes twice
    slab = slab_bytes(job) / link if execution.stream else 0.0

    def one_pass(
        operations: float, attention: float, moved: float, launches: int, passes: float, extra: float
    ) -> float:
        # products read their matrices at least once
        products = max(tokens * operations / rate, passes * weights * size / memory)
        busy = products + tokens * attention / (rate * ATTENTION_SHARE) + tokens * moved / memory + extra
        return max(busy, launches * LAUNCH)

    times: dict[Kind, tuple[float, float]] = {}
    for keep in AGAIN:
        forward_ops, backward_ops = layer_operations(job, keep)
        forward = one_pass(forward_ops, scores, moved_forward, LAUNCHES["forward"], 1, unpacked)
        waiting = 0.0
        if job.live_reference:
            beside = one_pass(forward_ops, scores, moved_forward, LAUNCHES["forward"], 1, 0.0 if together else unpacked)
            forward += beside
            waiting = 0.0 if together else max(0.0, slab - beside)
        backward = one_pass(
            backward_ops,
            (3.5 if keep == "input" else 2.5) * scores,
            moved_backward + moved_forward * (keep != "all"),
            LAUNCHES["backward"],
            backward_ops / forward_ops,
            unpacked * (1 + gates * small),
        )
        if execution.tile is not None and execution.tile < tokens:
            tiles = -(-tokens // execution.tile)
            share = 3 * s.hidden * s.inner / weights  # the MLP's, of all matrices
            # smaller products are slower, every tile launches the MLP's kernels, and with the small buffer it dequantizes gate,
            # up and down; gate and up twice on the way back
            slower = share * tokens / rate * HALF_RATE_TOKENS * (1 / execution.tile - 1 / tokens)
            launched = (tiles - 1) * LAUNCH * LAUNCHES["forward"] / 2
            again = (tiles - 1) * unpacked * share * small
            forward += forward_ops * slower + launched + again
            backward += backward_ops * slower + 2 * launched + again * 5 / 3
        kept = sum(kept_bytes(s, size, keep, ranks) for ranks in job.ranks) / s.layers
        for leaves in (False, True):
            away = leaves * tokens * kept / link
            # copies to the host and from the host run beside each other, those that go the same way do not
            copies = max(0.0, max(away, slab) - forward) + max(0.0, away + slab - backward)
            times[keep, leaves] = forward + backward, waiting + copies
    return times


def step_time(job: Workload, execution: ExecutionConfig, card: Gpu) -> Time:
    """One optimizer step, in micro-batches of the execution's tokens."""
    counts = {(keep, away): count for keep, away, _, count in segments(execution.keep, execution.offload)}
    return time_of_layers(job, execution, card, counts)


def time_of_layers(job: Workload, execution: ExecutionConfig, card: Gpu, counts: Mapping[Kind, Any]) -> Time:
    """As ``step_time``, whatever the execution's layers keep.

    Args:
        counts: number of layers of each kind; arrays of numbers give arrays of times.
    """
    s, size, tokens = job.shape, job.dtype.itemsize, max(execution.micro_tokens, job.longest)
    key = (tokens, execution.tile, execution.stream, execution.scratch, execution.reference, card)
    if key not in job.memo:
        rate, memory, link = _rates(job, tokens, card)
        targets = tokens * job.targets
        head = s.head_weights * 2 * targets * (2 + job.live_reference) / rate
        head += 6 * targets * (1 + job.live_reference) * s.vocabulary * size / memory
        copied = s.head_weights * size / link if execution.stream else 0.0
        # AdamW reads and writes weights, gradients and states once; clipping reads and writes the gradients
        state, managed = optimizer_bytes(job.optim, job.trained_tensors)
        update = (job.parameters * 24 + 2 * state) / memory + 2 * managed / link
        job.memo[key] = _layer_times(job, tokens, execution, card), head, copied, update
    times, computing, waiting, update = job.memo[key]
    for kind, count in counts.items():
        computing = computing + count * times[kind][0]
        waiting = waiting + count * times[kind][1]
    batches = max(1.0, (job.step_tokens or tokens) / tokens)
    step = batches * (computing + waiting) + update
    return Time(step, batches * waiting, batches * tokens / step)
