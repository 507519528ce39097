"""What one decoder layer holds while it runs, byte by byte: ``layer`` and ``mlp`` line by line (``ledger`` for the operations),
with an allocator that only counts.

Each function below is named after the one it follows and takes and frees what that one does, in the same order, on the
path of the kernels (their plain twins take more on the way). A tensor lives until nothing names it: what a caller's
variable still holds is not freed when its callee is done with it, and a variable that is bound anew lets go of the old
value only when the new one is there.
"""

from __future__ import annotations

from functools import lru_cache

from ..model.layer_spec import DOWN, GATE_UP, OUT, QKV, Keep
from .ledger import (
    Ledger,
    Run,
    attention_backward,
    attention_forward,
    grad_adapters,
    grad_input,
    grad_low_rank,
    low_rank,
    project,
)


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
