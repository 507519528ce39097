"""Who answers a prompt, under which system prompt, with which seed: a draw that depends on the prompt alone.

Neither the order of the prompts nor what else is asked changes it, and more completions begin with the fewer: what a
journal holds stays good.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...client.types import EndpointSpec
from ...config.strict_yaml import read_yaml
from ...errors import UserError

PRINCIPLES = Path(__file__).parent / "principles.yaml"


@dataclass(frozen=True)
class Slot:
    """One completion to ask for.

    Attributes:
        number: its place among the prompt's completions, from 0.
        endpoint: the name of the one that answers.
        principle: the name of what its system prompt asks for, or "".
        system: the system prompt as it is sent, the endpoint's own words included, or "".
        seed: for sampling.
    """

    number: int
    endpoint: str
    principle: str
    system: str
    seed: int


def seed_of(*parts: object) -> int:
    """A number below 2³¹ that belongs to these values."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def read_principles(path: Path | None = None) -> dict[str, list[str]]:
    """{principle: its system prompts}.

    Raises:
        UserError: the file cannot be read, or is not a list of texts under each name.
    """
    values = read_yaml(path or PRINCIPLES)
    for name, texts in values.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise UserError(f"{path}: {name}: expected a list of system prompts, found {str(texts)[:60]!r}.")
    if not values:
        raise UserError(f"{path}: no principle in it.", "Write `name:` and under it a list of system prompts.")
    return values


def draw_slots(
    prompt_id: str,
    models: Sequence[EndpointSpec],
    completions: int,
    principles: Mapping[str, Sequence[str]],
    use: Literal["auto", "all", "none"],
    seed: int,
) -> list[Slot]:
    """The completions of one prompt.

    With at least as many models as completions each completion is another model's; otherwise every model answers
    about equally often. Principles change from one completion to the next before one comes again.

    Args:
        prompt_id: what the draw belongs to.
        models: of different names.
        completions: how many.
        principles: of ``read_principles``.
        use: ``auto`` puts a principle before a server's model that answers this prompt more than once (a local folder
            is sampled as it is: on-policy); ``all`` before each completion; ``none`` before none.
        seed: of the job.
    """
    rng = random.Random(f"models {seed} {prompt_id}")
    order: list[EndpointSpec] = []
    while len(order) < completions:
        order.extend(rng.sample(list(models), len(models)))  # one round after the other: a prefix stays a prefix
    order = order[:completions]
    names = list(principles)
    rng = random.Random(f"principles {seed} {prompt_id}")
    rng.shuffle(names)
    often = Counter(spec.name for spec in order)
    slots = []
    for number, spec in enumerate(order):
        name = names[number % len(names)]
        words = rng.choice(list(principles[name]))  # drawn in any case, so that one slot's choice moves no other's
        steered = use == "all" or (use == "auto" and spec.path is None and often[spec.name] > 1)
        parts = [part for part in (spec.system, words if steered else None) if part]
        slots.append(
            Slot(
                number,
                spec.name,
                name if steered else "",
                "\n\n".join(parts),
                seed_of(seed, prompt_id, number),
            )
        )
    return slots
