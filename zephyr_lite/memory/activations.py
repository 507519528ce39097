"""Predicted bytes of what a layer and the output head keep, and of what they hold while they run.

Kept activations are exact counts. A layer's peak is the largest of several sums of tensor widths times tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

from ..model.execution import Keep
from ..model.families import Shape
from ..ops.dropout_products import matrix_gradient_sums
from ..ops.int8 import outlier_count
from ..ops.token_logps import CHUNK_BYTES
from .gpus import Device
from .workload import Workload

# what a layer may keep, and whether that goes to the host
Kind = tuple[Keep, bool]
KEEPS: tuple[Keep, ...] = ("input", "attention", "all")


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
    qkv_rank, out_rank, mlp_rank, down_rank = (rank for rank, _ in ranks)
    qkv, both = s.queries + 2 * s.keys, 2 * s.inner
    in_qkv, _, in_mlp, _ = map(len, s.family.sites)  # matrices of a site

    def of(width: int, count: int = tokens) -> int:
        return width * count * size

    def codes(width: int, count: int = tokens, *, outliers: bool = True) -> int:
        """A matrix in int8 with its scales and outlier channels, while it is multiplied."""
        return job.int8 * count * (width + 4 + outliers * size * outlier_count(width))

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
    copied = job.dropout and not device.fuses_dropout  # dropout makes a copy of an input

    def concatenated(rank: int, width: int) -> int:
        """The matrices of a stack's adapters beside each other."""
        return rank * width * size * (stacked and not job.dropout)

    # of each site: the width of its input, those of its outputs together, and its matrices
    sites = ((s.hidden, qkv, in_qkv), (s.queries, s.hidden, 1), (s.hidden, both, in_mlp), (s.inner, s.hidden, 1))
    # the gradients of the trained adapters: all A, and the B of each matrix
    gradients = [wide * (r * width + r * outs // count) for (_, r), (width, outs, count) in zip(ranks, sites)]
    _, of_out, of_mlp, of_down = gradients
    # the adapters in the compute dtype, which a pass of the layer makes once; in 32 bits B only, for its scale
    half = size < 4
    casts = size * sum(r * half * width + r * outs // count for (r, _), (width, outs, count) in zip(ranks, sites))

    def products(site: int, count: int) -> int:
        """Beside the rest while a site's adapters are differentiated: the adapters beside each other, or the gradients and the
        trained adapter's columns; the dropped input, or the sums over the tokens; on a CPU 16-bit factors are copied to 32 bits."""
        (rank, trained), (width, outs, projections) = ranks[site], sites[site]
        columns = of(trained, count) if stacked and not job.dropout else 0
        copies = 4 * count * (max(width, outs // projections) + trained) if half and not device.cuda else 0
        splits = matrix_gradient_sums(count) if job.dropout and not copied else 1
        sums = 4 * (splits + 1) * trained * width if splits > 1 else 0
        return of(width, count) * copied + max(concatenated(rank, width), columns + copies + gradients[site], sums)

    forward: dict[Keep | None, int] = {}
    policies: tuple[Keep | None, ...] = (None, "input", "attention", "all")
    for policy in policies:
        whole = policy == "all"
        attention = of(s.hidden + qkv_rank + qkv) + max(attended + attention_forward, codes(s.hidden))
        # the residual before the MLP, and y, which is in its place where it is not kept
        apart = policy in ("attention", "all") or post
        held = of(qkv_rank + out_rank + s.hidden * (1 + apart)) + wide * tokens
        held += (attended + of(s.hidden) * post) * (policy in ("attention", "all")) + of(qkv) * whole
        held += of(both + mlp_rank + down_rank) * (whole and tiles > 1)
        gate_up = both if tiles == 1 or not whole else 0
        activated = of(mlp_rank + gate_up, rows) + wide * rows
        projected = concatenated(mlp_rank // in_mlp, both // in_mlp) + codes(s.hidden, rows)
        activated += max(of(s.inner, rows), of(s.hidden, rows) + projected)
        projected = codes(s.inner, rows) + job.int8 * concatenated(down_rank, s.hidden)
        down = of(down_rank, rows) + max(of(s.inner * copied, rows), projected)
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
        down += max(products(3, rows), codes(s.hidden, rows, outliers=False))
        up = of(mlp_rank + down_rank * (not whole) + s.hidden, rows) + of_down
        trained = of(s.hidden, rows) + products(2, rows)
        up += max(trained, codes(s.inner, rows, outliers=False))
        if post:  # down is computed again, before the gradient of gate and up; its gradient is there until theirs is
            again = of(s.inner + s.hidden, rows) + codes(s.inner, rows) - of(both, rows) * (whole and not owned)
            down = max(down, again) + of(s.hidden, rows)
        mlp = there + work + max(down, up)
        after = there - of(s.hidden) * (owned or keep == "input" or post) - of(both) * (owned and whole)
        after += of(s.hidden) + of_mlp + of_down - of(s.hidden) * (post and (owned or keep == "input"))
        if s.family.head_norms:
            after += wide * tokens * (s.heads + s.kv_heads)
        out = of(out_rank + s.queries + s.hidden * post)
        out += max(products(1, tokens), codes(s.hidden, outliers=False))
        attention = of(out_rank + s.queries + qkv) + of_out + attention_backward
        last = of(qkv + qkv_rank + s.hidden) + of_out
        last += max(products(0, tokens), of(2 * s.hidden), of(s.hidden) + codes(s.queries, outliers=False))
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
