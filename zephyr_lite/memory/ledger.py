"""What operations take, byte by byte: ``ops.lora`` and ``ops.attention`` line by line, with an allocator that only counts.

See ``phases``, which does so for a whole layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..model.layer_spec import Keep
from .workload import SITES, Shape, Workload

Backend = Literal["flash", "efficient", "cpu"]


class Ledger:
    """Bytes alive by name, and the most there ever were."""

    def __init__(self) -> None:
        self.live: dict[str, int] = {}
        self.now = self.peak = 0

    def take(self, **sizes: int) -> None:
        """New tensors, one after the other. A name that is taken is bound anew: the old value goes once the new is there."""
        for name, size in sizes.items():
            self.now += size
            self.peak = max(self.peak, self.now)
            self.now -= self.live.get(name, 0)
            self.live[name] = size

    def grow(self, name: str, size: int) -> None:
        """One more tensor under a name."""
        self.now += size
        self.peak = max(self.peak, self.now)
        self.live[name] = self.live.get(name, 0) + size

    def free(self, *names: str) -> None:
        for name in names:
            self.now -= self.live.pop(name, 0)

    def bind(self, name: str, value: str) -> None:
        """name = value, where the value had another name until now."""
        self.free(name)
        self.live[name] = self.live.pop(value, 0)


@dataclass(frozen=True)
class Pair:
    """An adapter on one projection (``ops.lora.LoraPair``)."""

    projection: int
    rank: int
    scale: float
    trained: bool


@dataclass(frozen=True)
class SiteSize:
    """A site: its input's width, its projections' widths, its adapters in the groups that share a product."""

    width: int
    outs: tuple[int, ...]
    groups: tuple[tuple[bool, tuple[Pair, ...]], ...]

    @property
    def trained(self) -> bool:
        return any(pair.trained for _, pairs in self.groups for pair in pairs)


@dataclass(frozen=True)
class Run:
    """One layer over one micro-batch.

    Attributes:
        shape, sites: of the layer.
        tokens, keys: how many queries run, and how many keys attention gathers (as many: nothing is gathered).
        segments: sequences among them.
        itemsize: of the hidden states.
        tile: tokens that the MLP takes at a time, or None.
        backend: what computes attention.
        half_products: a product of 16-bit matrices with a 32-bit result needs no 32-bit copies of them (on CUDA).
    """

    shape: Shape
    sites: tuple[SiteSize, ...]
    tokens: int
    keys: int
    segments: int
    itemsize: int
    tile: int | None
    backend: Backend
    half_products: bool = True

    @property
    def wide(self) -> int:
        """Bytes of a number that sums are kept in."""
        return max(4, self.itemsize)

    def elements(self, width: int, rows: int | None = None) -> int:
        """Bytes of [T, width]."""
        return (self.tokens if rows is None else rows) * width * self.itemsize

    def kept(self, keep: Keep) -> dict[str, int]:
        """What the layer leaves for its backward pass, by name (``layer._save``): elements a token."""
        s = self.shape
        narrow = {"x": s.hidden}
        if keep != "input":
            narrow |= {"mixed": s.queries, "middle": s.hidden}
        if keep == "all":
            ranks = sum(pair.rank for site in self.sites for _, pairs in site.groups for pair in pairs)
            narrow |= {"qkv": s.queries + 2 * s.keys, "gate_up": 2 * s.inner, "products": ranks}
        sizes = {name: self.elements(width) for name, width in narrow.items()}
        return sizes if keep == "input" else sizes | {"lse": self.tokens * s.heads * self.wide}


def sites_of(job: Workload, layer: int) -> tuple[SiteSize, ...]:
    """The sites of a layer with the stack on them, as ``layer_spec.layer_of`` reads them."""
    found = []
    for names in SITES:
        pairs = []
        for spec in job.adapters:
            ranks = dict(spec.ranks[layer])
            pairs += [Pair(j, ranks[name], spec.scale, spec.trained) for j, name in enumerate(names) if name in ranks]
        groups = []
        for dropped in (False, True):
            group = [p for p in pairs if (p.trained and job.dropout) == dropped]
            if group:
                groups.append((dropped, tuple(sorted(group, key=lambda p: p.projection))))
        outs = tuple(job.shape.matrices[name][0] for name in names)
        found.append(SiteSize(job.shape.matrices[names[0]][1], outs, tuple(groups)))
    return tuple(found)


# -- ops.lora ----------------------------------------------------------------------------------------------------------


def _group_a(t: Ledger, run: Run, pairs: Sequence[Pair], width: int) -> None:
    """``_Group.a``: float32 masters beside each other, then in the dtype of the products."""
    size = sum(p.rank for p in pairs) * width
    if run.itemsize < 4:
        t.take(cat=4 * size)
        t.take(a=run.itemsize * size)
        t.free("cat")
    else:
        t.take(a=run.itemsize * size)


def _scaled_b(t: Ledger, run: Run, pairs: Sequence[Pair], out: int) -> None:
    size = out * sum(p.rank for p in pairs)
    scales = {p.scale for p in pairs}
    if len(scales) > 1:
        t.take(scaled=4 * size)
    if len(pairs) > 1:
        t.take(cat=4 * size)
    if len(scales) > 1 or scales == {1.0}:
        if run.itemsize < 4:
            t.take(b=run.itemsize * size)
    else:
        t.take(b=run.itemsize * size)
    t.free("cat", "scaled", "b")


def _by_projection(pairs: Sequence[Pair]) -> list[tuple[int, list[Pair]]]:
    found: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[pair.projection].append(pair)
    return sorted(found.items())


def low_rank(t: Ledger, run: Run, site: SiteSize, rows: int, name: str) -> None:
    """``name`` = the products of a site."""
    for dropped, pairs in site.groups:
        _group_a(t, run, pairs, site.width)
        if dropped:
            t.take(dropped=run.elements(site.width, rows))
        t.grow("result", run.elements(sum(p.rank for p in pairs), rows))
        t.free("dropped")
    t.free("a")
    t.bind(name, "result")


def project(t: Ledger, run: Run, site: SiteSize, rows: int, name: str | None) -> None:
    """``name`` = y; None: written into a tensor that is there."""
    if name is not None:
        t.take(projected=run.elements(sum(site.outs), rows))
    for _, pairs in site.groups:
        for projection, of_one in _by_projection(pairs):
            _scaled_b(t, run, of_one, site.outs[projection])
    if name is not None:
        t.bind(name, "projected")


def grad_low_rank(t: Ledger, run: Run, site: SiteSize, rows: int, name: str, need_all: bool = True) -> None:
    for _, pairs in site.groups:
        if need_all or any(p.trained for p in pairs):
            t.grow("result", run.elements(sum(p.rank for p in pairs), rows))
            for projection, of_one in _by_projection(pairs):
                _scaled_b(t, run, of_one, site.outs[projection])
    t.bind(name, "result")


def grad_input(t: Ledger, run: Run, site: SiteSize, rows: int, name: str) -> None:
    t.take(result=run.elements(site.width, rows))
    for dropped, pairs in site.groups:
        _group_a(t, run, pairs, site.width)
        if dropped:
            t.take(dropped=run.elements(site.width, rows))  # d_product · A, before the mask
            t.free("dropped")
    t.free("a")
    t.bind(name, "result")


def grad_adapters(t: Ledger, run: Run, site: SiteSize, rows: int, name: str) -> None:
    """The new gradients are added to ``name``."""

    def product(left: int, right: int, *, into: str) -> None:
        if run.itemsize < 4 and not run.half_products:
            t.take(left=4 * rows * left, right=4 * rows * right)
        t.grow(into, run.wide * left * right)
        t.free("left", "right")

    for dropped, pairs in site.groups:
        trained = [p for p in pairs if p.trained]
        if not trained:
            continue
        rank = sum(p.rank for p in trained)
        if dropped:
            t.take(source=run.elements(site.width, rows))
        if len(trained) < len(pairs):
            t.take(of_trained=run.elements(rank, rows))
        product(rank, site.width, into="result")  # one product for all A, of which each gradient is a view
        for pair in trained:
            product(site.outs[pair.projection], pair.rank, into="result")
    t.free("source", "of_trained")
    t.grow(name, 0)
    t.live[name] += t.live.pop("result", 0)


# -- ops.attention -----------------------------------------------------------------------------------------------------


def attention_forward(t: Ledger, run: Run) -> None:
    s = run.shape
    if run.keys != run.tokens:
        t.take(gathered=2 * run.elements(s.keys, run.keys))
    mixed, lse = run.elements(s.queries), run.tokens * s.heads * run.wide
    if run.backend == "efficient" and s.heads != s.kv_heads:
        t.take(repeated=2 * run.elements(s.queries, run.keys))
    t.take(mixed=mixed, lse=lse)
    if run.backend != "flash":  # a sequence, or a run of like ones, at a time
        t.take(found=mixed, padded=lse)
    t.free("gathered", "repeated", "found", "padded")


def attention_backward(t: Ledger, run: Run) -> None:
    """The workspace is that of PyTorch's kernels; theirs is not seen by any counter of tensors."""
    s = run.shape
    gathered = run.keys != run.tokens
    if gathered:
        t.take(gathered=2 * run.elements(s.keys, run.keys))
    d_kv = run.elements(s.keys, run.keys)
    wide_kv = run.elements(s.queries, run.keys)
    grouped = s.heads != s.kv_heads
    if run.backend == "flash":
        # FlashAttention-2, variable lengths: a float32 sum of dq and the rows' softmax · dsoftmax, each sequence padded
        padded, head = run.tokens + 128 * run.segments, -(-s.head_dim // 32) * 32
        t.take(softmax_d=4 * padded * s.heads, dq_sum=4 * padded * s.heads * head)
        t.take(a=run.elements(s.queries), b=d_kv, c=d_kv)
        if grouped:
            t.take(expanded=2 * wide_kv)
        t.free("softmax_d", "dq_sum", "expanded")
    elif run.backend == "efficient":
        if grouped:
            t.take(repeated=2 * wide_kv)
        t.take(b=d_kv, c=d_kv, padded=run.tokens * s.heads * run.wide)
        t.take(gq=run.elements(s.queries), gk=wide_kv, gv=wide_kv)
        # float32 sums of the three gradients, and the rows' sums of grad · out: what the kernel takes at most
        t.take(workspace=4 * (run.tokens + 2 * run.keys) * s.queries + 4 * run.tokens * s.heads)
        t.free("workspace", "gq", "gk", "gv", "repeated", "padded")
    else:
        if gathered:
            t.take(b=d_kv, c=d_kv)
        t.take(gq=run.elements(s.queries), gk=wide_kv, gv=wide_kv, summed=d_kv)
        t.free("gq", "gk", "gv", "summed")
    if gathered:
        t.take(scattered=2 * run.elements(s.keys))
    t.free("gathered", "a", "b", "c", "scattered")
