"""The grid of topics and kinds of text material over which dialogues are spread."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config.strict_yaml import read_yaml
from ...errors import UserError

GRID = Path(__file__).parent / "grid.yaml"
_PARTS = ("topics", "kinds", "manners", "moves")


@dataclass(frozen=True)
class Cell:
    """A topic, its parts, a kind of text, and what that means in words."""

    topic: str
    parts: tuple[str, ...]
    kind: str
    meaning: str


@dataclass(frozen=True)
class Grid:
    """Cells in the order in which they are filled, ways to put an opening, and what a user does next."""

    cells: tuple[Cell, ...]
    manners: tuple[str, ...]
    moves: tuple[str, ...]

    def cell(self, number: int) -> Cell:
        """The cell of a dialogue: round after round through all of them, so their counts differ by one at most."""
        return self.cells[number % len(self.cells)]


def read_grid(path: Path | None, seed: int) -> Grid:
    """The built-in grid, or one's own: topics {name: [parts]} (or a list of names), kinds {name: meaning} (or a list),
    manners and moves (lists of sentences; the built-in ones where they are left out).

    Args:
        path: a YAML file; None: the built-in one.
        seed: of the cells' order.

    Raises:
        UserError: the file cannot be read, or is of another form.
    """
    values = read_yaml(path or GRID)
    where = str(path or GRID)
    if unknown := [key for key in values if key not in _PARTS]:
        raise UserError(f"{where}: there is no key {unknown[0]!r}.", f"A grid has {', '.join(_PARTS)}.")
    if missing := [key for key in ("topics", "kinds") if not values.get(key)]:
        raise UserError(
            f"{where}: {missing[0]} missing.", f"A grid has {', '.join(_PARTS)}; the last two may be left out."
        )
    topics = {
        name: _texts(parts, f"{where}: topics: {name}") for name, parts in _mapping(values["topics"], where).items()
    }
    kinds = {}
    for name, meaning in _mapping(values["kinds"], where).items():
        if meaning is not None and not isinstance(meaning, str):
            raise UserError(f"{where}: kinds: {name}: expected a text, found {str(meaning)[:60]!r}.")
        kinds[name] = meaning or name
    rest = {key: _texts(values.get(key), f"{where}: {key}") for key in ("manners", "moves")}
    if path is not None and not all(rest.values()):
        built_in = read_yaml(GRID)
        rest = {key: texts or tuple(built_in[key]) for key, texts in rest.items()}
    cells = [Cell(topic, topics[topic], kind, kinds[kind]) for topic, kind in spread(list(topics), list(kinds), seed)]
    return Grid(tuple(cells), rest["manners"], rest["moves"])


def spread(topics: list[str], kinds: list[str], seed: int) -> list[tuple[str, str]]:
    """Every (topic, kind) once, in an order of which each beginning has all topics about equally often, and all kinds:
    both go round side by side, and one steps aside whenever they would meet again."""
    rng = random.Random(f"cells {seed}")
    topics, kinds = rng.sample(topics, len(topics)), rng.sample(kinds, len(kinds))
    round_ = math.lcm(len(topics), len(kinds))
    return [
        (topics[place % len(topics)], kinds[(place + place // round_) % len(kinds)])
        for place in range(len(topics) * len(kinds))
    ]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value)
    if not isinstance(value, dict) or not all(isinstance(key, str) and key.strip() for key in value):
        raise UserError(f"{where}: topics and kinds are names, in a list or before a colon; found {str(value)[:60]!r}.")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise UserError(f"{where}: expected a list of texts, found {str(value)[:60]!r}.")
    return tuple(value)
