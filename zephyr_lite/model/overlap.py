"""Whether one adapter contains another, by their weights; and the model that an adapter's card names as its start.

Both decide which adapters may be on together: training that continued an adapter contains it, and both together count it
twice; an adapter that was trained on top of another is wrong without it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor

from ..config.strict_yaml import read_front_matter
from ..io.text import is_file, read_text
from .peft_io import AdapterFile, LoraWeights
from .shards import in_hub_cache

CARD = "README.md"
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


def holds(one: AdapterFile, other: AdapterFile) -> tuple[bool, str]:
    """Whether the first adapter contains the other (continued from it, a copy, or composed of it), and the evidence."""
    distance = origin_distance(one, other)
    if distance is not None:
        share = held_share(one, other)
        told = f"‖A − A'‖ / ‖A'‖ = {distance:.3f} against {other.path} (independent draws: 1.41); {held(share)}"
        return distance < SAME_ORIGIN and share >= HELD, told
    common = [name for name in other.modules if name in one.modules]
    shared = total = 0.0
    for name in other.modules:
        weights = other.modules[name]
        total += inner(weights, weights)
        if name in common:
            mine = one.modules[name]
            if _spanned(mine.a, weights.a) < SPANNED:
                return False, f"the rows of its A are not those of {other.path}"
            shared += inner(mine, weights)
    share = shared / total if total else 0.0
    return (
        share >= HELD,
        f"⟨ΔW, ΔW'⟩ / ‖ΔW'‖² = {share:.2f} against {other.path} (composed of it: 1, independent: near 0)",
    )


def held(share: float) -> str:
    return f"{share:.2f} of its B is held (continued: 1, newly drawn: near 0)"


def origin_distance(one: AdapterFile, other: AdapterFile) -> float | None:
    """‖A − A'‖ / ‖A'‖ over all modules of two adapters of the same shapes; None where the shapes differ.

    A is random and moves little in training, so it identifies the draw.
    """
    if set(one.modules) != set(other.modules):
        return None
    apart = total = 0.0
    for name in one.modules:
        a, b = one.modules[name].a, other.modules[name].a
        if a.shape != b.shape:
            return None
        apart += float((a.double() - b.double()).square().sum())
        total += float(b.double().square().sum())
    return math.sqrt(apart / total) if total else None


def held_share(one: AdapterFile, other: AdapterFile) -> float:
    """⟨B, B'⟩ / ‖B'‖² over all modules of two adapters of the same shapes: the share of the other's B in the first.

    Equal A alone do not mean that one continued the other: scripts that set the same seed for every stage draw the same A,
    and start from B = 0. 1 where the other's B is 0.
    """
    shared = total = 0.0
    for name in one.modules:
        b, mine = other.modules[name].b.double(), one.modules[name].b.double()
        shared += float((mine * b).sum())
        total += float(b.square().sum())
    return shared / total if total else 1.0


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
