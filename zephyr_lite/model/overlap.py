"""Whether one adapter contains another, by their weights; and the model that an adapter's card names as its start.

Both decide which adapters may be on together: training that continued an adapter contains it, and both together count it
twice; an adapter that was trained on top of another is wrong without it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.strict_yaml import read_front_matter
from ..io.text import is_file, read_text
from .files import in_hub_cache
from .peft_io import CARD, AdapterFile, LoraWeights

# largest normwise difference of two A from the same draw; independent draws differ by √2
SAME_ORIGIN = 0.7
# smallest share of the other's B (or product) in a continued adapter: 1 if continued, near 0 with the same seed only
HELD = 0.5
# smallest share of the other's A in the span of its rows: 1 in a concatenation, rank / width for independent draws
SPANNED = 0.9
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
    """Whether the first adapter contains the other."""
    if (origin := compare_origins(one, other)) is not None:
        distance, share = origin
        told = (
            f"‖A − A'‖ / ‖A'‖ = {distance:.3f} against {other.path} (independent draws: 1.41); {share:.2f} of its B is held "
            "(continued: 1, newly drawn: near 0)"
        )
        return Overlap(distance < SAME_ORIGIN and share >= HELD, told)
    shared = total = 0.0
    for name, weights in other.modules.items():
        total += inner(weights, weights)
        mine = one.modules.get(name)
        if mine is not None:
            if _spanned(mine.a, weights.a) < SPANNED:
                return Overlap(False, f"the rows of its A are not those of {other.path}")
            shared += inner(mine, weights)
    share = shared / total if total else 0.0
    told = f"⟨ΔW, ΔW'⟩ / ‖ΔW'‖² = {share:.2f} against {other.path} (composed of it: 1, independent: near 0)"
    return Overlap(share >= HELD, told)


def compare_origins(one: AdapterFile, other: AdapterFile) -> tuple[float, float] | None:
    """‖A − A'‖ / ‖A'‖ and ⟨B, B'⟩ / ‖B'‖² over all modules of two adapters of the same shapes; None where the shapes differ.

    A is random and moves little in training, so the first number identifies the draw. Equal A alone do not mean that one
    continued the other: scripts that set the same seed for every stage draw the same A, and start from B = 0. The second
    number, the share of the other's B in the first, tells them apart (1 where the other's B is 0).
    """
    if set(one.modules) != set(other.modules):
        return None
    apart = total = shared = squares = 0.0
    for name, mine in one.modules.items():
        theirs = other.modules[name]
        if mine.a.shape != theirs.a.shape or mine.b.shape != theirs.b.shape:
            return None
        a, b = theirs.a.double(), theirs.b.double()
        apart += float((mine.a.double() - a).square().sum())
        total += float(a.square().sum())
        shared += float((mine.b.double() * b).sum())
        squares += float(b.square().sum())
    return math.sqrt(apart / total), shared / squares if squares else 1.0


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
