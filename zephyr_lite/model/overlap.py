"""Whether one adapter contains another, by their weights; and the model that an adapter's card names as its start.

Both decide which adapters may be on together: training that continued an adapter contains it, and both together count it
twice; an adapter that was trained on top of another is wrong without it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.strict_yaml import read_front_matter
from ..io.text import is_file, read_text
from .files import in_hub_cache
from .peft_io import CARD, AdapterFile, LoraWeights

# smallest share of the other's ΔW in a continued or composed adapter: 1 if contained, near 0 if trained independently
HELD = 0.5
# smallest share of the other's A in the span of its rows: near 1 from the same draw, rank / width for independent draws
SPANNED = 0.5
_TUNED = re.compile(
    r"fine-tuned version of\s+[*`]*(?:\[[*`]*(?P<link>[^\]\s*`]+)[*`]*\]|(?P<bare>[\w./-]+))", re.IGNORECASE
)
# what card templates write for an unknown model: "[None](…)", "an unknown base", "the base model"
_NO_MODEL = {"none", "unknown", "an", "a", "the", "this", "model", ""}


class Overlap(NamedTuple):
    """Whether an adapter contains another one.

    Attributes:
        contains: continued from it, a copy of it, or composed of it.
        evidence: the numbers that say so.
    """

    contains: bool
    evidence: str


def overlap(one: AdapterFile, other: AdapterFile) -> Overlap:
    """Whether the first adapter contains the other.

    A is random and moves little in training, so the span of its rows identifies the draw. Equal A alone do not mean that one
    continued the other: scripts that set the same seed for every stage draw the same A. The share of the other's ΔW = s·B·A
    in the first one tells them apart.
    """
    shared = total = 0.0
    span = 1.0
    for name, weights in other.modules.items():
        total += inner(weights, weights)
        mine = one.modules.get(name)
        if mine is not None:
            span = min(span, _spanned(mine.a, weights.a))
            shared += inner(mine, weights)
    share = shared / total if total else 0.0
    told = (
        f"against {other.path}: at least {span:.2f} of its A lies in the span of this one's (independent draws: rank / width); "
        f"⟨ΔW, ΔW'⟩ / ‖ΔW'‖² = {share:.2f} (contained: 1, independent: near 0)"
    )
    return Overlap(span >= SPANNED and share >= HELD, told)


def inner(x: LoraWeights | None, y: LoraWeights | None) -> float:
    """⟨s B A, s' B' A'⟩ = s s' ⟨B'ᵀB, A'Aᵀ⟩."""
    if x is None or y is None or x.shape != y.shape:
        return 0.0
    left: Tensor = y.b.double().T @ x.b.double()
    right: Tensor = y.a.double() @ x.a.double().T
    return x.scale * y.scale * float((left * right).sum())


def _spanned(a: Tensor, other: Tensor) -> float:
    """The share of the other matrix in the span of the first one's rows: 0 to 1."""
    if a.shape[1] != other.shape[1]:
        return 0.0
    rows = torch.linalg.qr(a.double().T).Q
    return float((other.double() @ rows).square().sum() / other.double().square().sum())


def tuned_from(folder: Path) -> str | None:
    """The model or adapter that an adapter's card names as its start; None where it names none."""
    if not is_file(folder / CARD):
        return None
    front, body = read_front_matter(read_text(folder / CARD))
    match = _TUNED.search(body)
    found = (match["link"] or match["bare"]).rstrip(".") if match else front.get("base_model")
    return found if isinstance(found, str) and found.lower() not in _NO_MODEL else None


def same_name(one: str, other: str) -> bool:
    """Whether two names have the same last part, without the endings of quantized copies."""

    def plain(name: str) -> str:
        path = Path(name)
        last = (path.parent.parent.name.rpartition("--")[2] if in_hub_cache(path) else path.name).lower()
        for ending in ("-unsloth-bnb-4bit", "-bnb-4bit", "-4bit"):
            last = last.removesuffix(ending)
        return last

    return plain(one) == plain(other)
