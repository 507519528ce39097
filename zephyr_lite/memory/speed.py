"""How long a step takes: operations, bytes through the card's memory, bytes between main memory and card.

A model, not a measurement: matrix products at a share of the data sheet's rate (or at the measured rate), everything that
only moves bytes at the memory's rate, and copies to and from the host beside them. It is there to choose between settings,
and to say what a run will roughly cost.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..model.layer_spec import Keep
from .account import Setting, kept_per_token, optimizer_bytes, slab_bytes
from .gpus import Gpu
from .workload import SITES, Workload

# Kernels that a layer launches in a pass, and what the processor takes for each (Python and driver), seconds.
LAUNCHES = {"forward": 70, "backward": 130}
LAUNCH = 7e-6
# Attention's operations run at this share of the rate of matrix products.
ATTENTION_SHARE = 0.6
# Memory's rate that kernels reach.
BANDWIDTH_SHARE = 0.8
# What a micro-batch of so many tokens loses to matrix products that do not fill the card: halved at this many.
HALF_RATE_TOKENS = 96
# Which sites' products the backward pass computes again, by what is kept (``layer``: never down_proj's).
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


def layer_operations(job: Workload, keep: Keep, layer: int = 0) -> tuple[float, float]:
    """(forward, backward) operations a token of one layer, attention's scores aside."""
    s = job.shape
    frozen = [2 * sum(s.matrices[n][0] * s.matrices[n][1] for n in site) for site in SITES]
    narrow = [0] * 4  # of the adapters: forward, and the same again for the gradient of the input
    trained = 0
    for adapter in job.adapters:
        ranks = dict(adapter.ranks[layer])
        for place, site in enumerate(SITES):
            size = 2 * sum(ranks[n] * sum(s.matrices[n]) for n in site if n in ranks)
            narrow[place] += size
            trained += size if adapter.trained else 0
    forward = sum(frozen) + sum(narrow)
    again = sum(frozen[i] + narrow[i] for i in AGAIN[keep])
    return forward, forward + again + trained


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


def _kept_per_layer(job: Workload, keep: Keep) -> float:
    """Bytes a token, of a layer on average."""
    if ("kept", keep) not in job.memo:
        job.memo["kept", keep] = kept_per_token(job, (keep,) * job.shape.layers) / job.shape.layers
    return job.memo["kept", keep]


def step_time(job: Workload, setting: Setting, card: Gpu) -> Time:
    """One optimizer step, in micro-batches of the setting's tokens."""
    s, tokens = job.shape, setting.tokens
    rate = card.rate(job.dtype) * tokens / (tokens + HALF_RATE_TOKENS)
    memory, link = card.bandwidth * 1e9 * BANDWIDTH_SHARE, card.pcie * 1e9
    moved = _bytes_moved(job)
    scores = attention_operations(job)
    weights = s.layer_weights
    unpacking = memory / (0.53 + job.dtype.itemsize) if card.unpacking is None else card.unpacking * 1e9
    unpacked = 0.0 if job.storage == "dense" else weights / unpacking
    gates = 2 * s.hidden * s.inner / weights  # the share of gate and up, which the small scratch takes twice
    slab = slab_bytes(job) / link if setting.stream else 0.0
    per_token = {keep: _kept_per_layer(job, keep) for keep in set(setting.keep)}

    def reading(passes: float) -> float:
        """Products read their matrices at least once."""
        return passes * weights * job.dtype.itemsize / memory

    def one_pass(
        operations: float, attention: float, moved: float, launches: int, passes: float, extra: float
    ) -> float:
        products = max(tokens * operations / rate, reading(passes))
        busy = products + tokens * attention / (rate * ATTENTION_SHARE) + tokens * moved / memory + extra
        return max(busy, launches * LAUNCH)

    computing = waiting = 0.0
    groups = Counter(
        (job.kind_of[index], keep, index < setting.offload) for index, keep in enumerate(setting.keep)
    )  # like layers take alike
    for (kind, keep, leaves), count in groups.items():
        forward_ops, backward_ops = layer_operations(job, keep, job.kinds[kind])
        away = tokens * per_token[keep] / link if leaves else 0.0
        forward = one_pass(forward_ops, scores, moved[0], LAUNCHES["forward"], 1, unpacked)
        if job.live_reference:
            shared = 0.0 if setting.together else unpacked
            beside = one_pass(forward_ops, scores, moved[0], LAUNCHES["forward"], 1, shared)
            forward += beside
            waiting += count * (0.0 if setting.together else max(0.0, slab - beside))
        again = (1 if keep == "input" else 0) * scores
        small = unpacked * gates if setting.scratch == "small" else 0.0
        backward = one_pass(
            backward_ops,
            2.5 * scores + again,
            sum(moved) if keep != "all" else moved[1],
            LAUNCHES["backward"],
            backward_ops / forward_ops,
            unpacked + small,
        )
        tiles = 1 if setting.tile is None else max(1, -(-tokens // setting.tile))
        if tiles > 1 and setting.tile is not None:
            share = 3 * s.hidden * s.inner / weights  # the MLP's, of all matrices
            # smaller products are slower, and every tile launches the MLP's kernels anew
            slower = share * tokens / rate * HALF_RATE_TOKENS * (1 / setting.tile - 1 / tokens)
            launched = (tiles - 1) * LAUNCH * LAUNCHES["forward"] / 2
            forward, backward = (
                forward + forward_ops * slower + launched,
                backward + backward_ops * slower + 2 * launched,
            )
            if setting.scratch == "small":  # and each dequantizes gate, up and down; gate and up twice on the way back
                each = (tiles - 1) * unpacked * share
                forward, backward = forward + each, backward + each * 5 / 3
        computing += count * (forward + backward)
        # to the host and from the host go beside each other, what goes the same way does not
        waiting += count * (max(0.0, max(away, slab) - forward) + max(0.0, away + slab - backward))
    targets = tokens * job.targets
    head = s.head_weights * 2 * targets * (2 + job.live_reference) / rate
    head += 6 * targets * (1 + job.live_reference) * s.vocabulary * job.dtype.itemsize / memory
    if setting.stream:
        waiting += s.head_weights * job.dtype.itemsize / link
    micro = computing + waiting + head
    batches = max(1.0, (job.step_tokens or tokens) / tokens)
    # AdamW reads and writes weights, gradients and states once; clipping reads and writes the gradients
    if "states" not in job.memo:
        job.memo["states"] = optimizer_bytes(job.optim, job.trained_tensors)
    state, managed = job.memo["states"]
    update = (job.parameters * 24 + 2 * state) / memory + 2 * managed / link
    step = batches * micro + update
    return Time(step, batches * waiting, batches * tokens / step)
