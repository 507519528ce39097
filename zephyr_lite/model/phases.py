"""What one decoder layer holds while it runs, byte by byte: ``layer``, ``mlp``, ``ops.lora`` and ``ops.attention`` line by
line, with an allocator that only counts.

Each function below is named after the one it follows and takes and frees what that one does, in the same order, on the
path of the kernels (their plain twins take more on the way). A tensor lives until nothing names it: what a caller's
variable still holds is not freed when its callee is done with it, and a variable that is bound anew lets go of the old
value only when the new one is there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .job import SITES, Job, Shape
from .layer_spec import DOWN, GATE_UP, OUT, QKV, Keep

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


def sites_of(job: Job, layer: int) -> tuple[SiteSize, ...]:
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


# -- layer, mlp --------------------------------------------------------------------------------------------------------


def _forward(t: Ledger, run: Run, keep: Keep | None) -> None:
    """``layer._forward``; x is the caller's."""
    s, sites, rows = run.shape, run.sites, run.tokens
    x, inverse = run.elements(s.hidden), run.wide * rows
    t.take(normed=x, _=inverse)
    low_rank(t, run, sites[QKV], rows, "qkv_products")
    project(t, run, sites[QKV], rows, "qkv")
    attention_forward(t, run)
    t.free("normed")
    if keep != "all":
        t.free("qkv")
    low_rank(t, run, sites[OUT], rows, "o_products")
    project(t, run, sites[OUT], rows, "out")
    if keep in (None, "input"):
        t.free("mixed", "lse")
    _mlp_forward(t, run, whole=keep == "all")


def _tiles(run: Run) -> list[int]:
    if run.tile is None or run.tile >= run.tokens:
        return [run.tokens]
    # the third and all later ones are alike, but for a shorter one at the end
    whole, rest = divmod(run.tokens, run.tile)
    return [run.tile] * min(whole, 3) + ([rest] if rest and whole < 3 else [])


def _mlp_forward(t: Ledger, run: Run, *, whole: bool) -> None:
    """``mlp.mlp_forward``."""
    s, pieces = run.shape, _tiles(run)
    if len(pieces) == 1:
        _piece(t, run, run.tokens, whole)
        return
    t.take(y=run.elements(s.hidden))
    ranks = [sum(p.rank for _, pairs in run.sites[i].groups for p in pairs) for i in (GATE_UP, DOWN)]
    if whole:
        # at the last whole piece the products of those that are left out above are there
        left_out = (run.tokens - sum(pieces)) // pieces[0] * pieces[0]
        t.take(gate_up=run.elements(2 * s.inner), of_pieces=run.elements(sum(ranks), left_out))
    for rows in pieces:
        _piece(t, run, rows, whole, into=True)
        t.bind("piece", "middle")
    if whole:  # the products of all pieces, and then beside each other
        t.free("gate_up_products", "down_products", "of_pieces")
        t.take(of_pieces=run.elements(sum(ranks)))
        t.take(gate_up_products=run.elements(ranks[0]), down_products=run.elements(ranks[1]))


def _piece(t: Ledger, run: Run, rows: int, whole: bool, into: bool = False) -> None:
    """``mlp._piece``; ``middle`` is the caller's from then on."""
    s, sites = run.shape, run.sites
    t.take(normed=run.elements(s.hidden, rows), middle=run.elements(s.hidden, rows), inverse=run.wide * rows)
    low_rank(t, run, sites[GATE_UP], rows, "gate_up_products_")
    in_place = into and whole
    project(t, run, sites[GATE_UP], rows, None if in_place else "both")
    t.free("normed")
    t.take(act=run.elements(s.inner, rows))
    if not whole:
        t.free("both")
    low_rank(t, run, sites[DOWN], rows, "down_products_")
    project(t, run, sites[DOWN], rows, None if into else "y")
    t.free("act", "inverse")
    if whole:
        for name in ("gate_up_products", "down_products"):
            t.grow(name, 0)
            t.live[name] += t.live.pop(f"{name}_", 0)
    else:
        t.free("gate_up_products_", "down_products_")


def _recompute(t: Ledger, run: Run, have: set[str], freed: set[str]) -> None:
    """``layer._recompute``. What is computed here goes when it was read."""
    s, sites, rows = run.shape, run.sites, run.tokens
    if "qkv" not in have:
        t.take(normed=run.elements(s.hidden), _=run.wide * rows)
        low_rank(t, run, sites[QKV], rows, "qkv_products")
        project(t, run, sites[QKV], rows, "qkv")
        if "mixed" not in have:
            attention_forward(t, run)
        t.free("normed")
        freed |= {"qkv", "mixed", "lse"} - have
    if "products" not in have:
        low_rank(t, run, sites[OUT], rows, "o_products")
    if "middle" not in have:
        freed.add("middle")
        project(t, run, sites[OUT], rows, "middle")
    t.free("_")


def _backward(t: Ledger, run: Run, have: set[str], freed: set[str], owned: bool, need_x: bool) -> None:
    """``layer._backward``; grad is the caller's."""
    s, sites, rows = run.shape, run.sites, run.tokens
    x = run.elements(s.hidden)
    _mlp_backward(t, run, kept="gate_up" in have, owned=owned)
    t.free(*freed & {"gate_up", "middle"})

    grad_low_rank(t, run, sites[OUT], rows, "d_products")
    grad_input(t, run, sites[OUT], rows, "d_mixed")
    if sites[OUT].trained:
        grad_adapters(t, run, sites[OUT], rows, "grads")
    t.take(d_qkv=run.elements(s.queries + 2 * s.keys))
    attention_backward(t, run)
    t.free("d_mixed")

    grad_low_rank(t, run, sites[QKV], rows, "d_products", need_x)
    t.take(normed=x, inverse=run.wide * rows)
    if sites[QKV].trained:
        grad_adapters(t, run, sites[QKV], rows, "grads")
    if need_x:
        grad_input(t, run, sites[QKV], rows, "d_normed")
        t.take(d_x=x)


def _mlp_backward(t: Ledger, run: Run, *, kept: bool, owned: bool) -> None:
    """``mlp.mlp_backward``."""
    s, pieces = run.shape, _tiles(run)
    if len(pieces) == 1:
        _piece_backward(t, run, run.tokens, kept, owned)
        t.bind("d_middle", "part_")
        t.grow("grads", 0)
        t.live["grads"] += t.live.pop("piece_grads", 0)
        return
    t.take(d_middle=run.elements(s.hidden))
    for place, rows in enumerate(pieces):
        _piece_backward(t, run, rows, kept, owned)
        t.bind("part", "part_")
        # the sums begin as the first piece's gradients; later ones live until the next are bound
        t.bind("grads" if place == 0 else "new_grads", "piece_grads")
    t.free("part", "new_grads")


def _piece_backward(t: Ledger, run: Run, rows: int, kept: bool, owned: bool) -> None:
    """``mlp._piece_backward``; leaves ``part_`` and ``piece_grads``."""
    s, sites = run.shape, run.sites
    x = run.elements(s.hidden, rows)
    if not kept:
        t.take(normed=x, _=run.wide * rows)
        low_rank(t, run, sites[GATE_UP], rows, "gate_up_products_")
        project(t, run, sites[GATE_UP], rows, "both")
        t.free("normed")
    grad_low_rank(t, run, sites[DOWN], rows, "d_products_")
    grad_input(t, run, sites[DOWN], rows, "d_act")
    if kept and not owned:
        t.take(both=run.elements(2 * s.inner, rows))
    if sites[DOWN].trained:
        if not kept:
            low_rank(t, run, sites[DOWN], rows, "down_products_")
        grad_adapters(t, run, sites[DOWN], rows, "piece_grads")
    t.free("d_act")
    grad_low_rank(t, run, sites[GATE_UP], rows, "d_products_")
    grad_input(t, run, sites[GATE_UP], rows, "d_normed_")
    t.take(normed=x)
    t.free("_")
    t.take(inverse=run.wide * rows)
    if sites[GATE_UP].trained:
        grad_adapters(t, run, sites[GATE_UP], rows, "piece_grads")
    t.free("both", "normed")
    t.take(part_=x)
    t.free("d_normed_", "inverse", "d_products_", "down_products_", "gate_up_products_")


@lru_cache(maxsize=4096)
def forward_peak(run: Run, keep: Keep | None) -> int:
    """The most bytes alive in a forward pass of a layer, its input aside, its output and what it keeps among them."""
    t = Ledger()
    _forward(t, run, keep)
    return t.peak


@lru_cache(maxsize=4096)
def backward_peak(run: Run, keep: Keep, owned: bool, need_x: bool = True) -> int:
    """The most bytes alive in a backward pass of a layer, the gradient of its output aside; what was kept is counted, and
    so are the new gradients.

    Args:
        owned: what was kept was on the host, and goes when it was read; else it stays until the layer is done.
    """
    t, kept = Ledger(), run.kept(keep)
    t.take(**kept)
    have = set(kept)
    freed = set(kept) if owned else set()
    _recompute(t, run, have, freed)
    _backward(t, run, have, freed, owned, need_x)
    return t.peak
