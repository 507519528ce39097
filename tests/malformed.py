"""The table of malformed inputs: what a user gave, and the exact words that came back.

A case makes its files in an empty folder, which is the working directory while its command runs. ``tests/malformed_data``
and ``tests/malformed_model`` hold the cases, ``tests/data/test_messages.py`` runs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Fixtures:
    """What the cases share; they read it, or work on copies.

    Attributes:
        base: a tiny model's folder with its tokenizer, in the hub's layout.
        chat: a JSONL of conversations; pairs: one of preference pairs.
        run: makes ``runs/t`` with a complete sft and dpo stage; copy it before something is broken in it.
    """

    base: Path
    chat: Path
    pairs: Path
    run: Callable[[], Path]


@dataclass(frozen=True)
class Case:
    """One malformed input.

    Attributes:
        name: what is malformed, in a few words; the test's name.
        make: (an empty folder, the shared fixtures) → the words of the command, without ``zephyr-lite``.
        message: the exact text behind ``error: ``; ``{tmp}`` stands for the folder, ``{base}``, ``{chat}``, ``{pairs}``
            for the fixtures' paths, ``{root}`` for this checkout.
        hint: the exact line(s) below it, "" where there is none.
        code: the exit code.
        leaves: files below ``runs/`` that the refused command may leave behind.
    """

    name: str
    make: Callable[[Path, Fixtures], list[str]]
    message: str
    hint: str = ""
    code: int = 2
    leaves: frozenset[str] = field(default_factory=frozenset)

    def expected(self) -> str:
        return f"error: {self.message}\n" + (f"{self.hint}\n" if self.hint else "")


def said(err: str, tmp: Path, fixtures: Fixtures) -> str:
    """Standard error with the paths of this session replaced."""
    places = {
        "root": Path(__file__).parent.parent,
        "tmp": tmp,
        "base": fixtures.base,
        "chat": fixtures.chat,
        "pairs": fixtures.pairs,
    }
    for name, path in places.items():
        err = err.replace(str(path), "{" + name + "}")
    return err


def sft(fixtures: Fixtures, **changes: object) -> list[str]:
    """The words of a tiny sft stage with some keys changed."""
    keys = {
        "model_name_or_path": fixtures.base,
        "dataset": fixtures.chat,
        "max_length": 128,
        "batch_size": 4,
        "lora_r": 4,
    }
    return ["sft", *(f"{key}={value}" for key, value in {**keys, "max_steps": 1, **changes}.items())]


def dpo(fixtures: Fixtures, **changes: object) -> list[str]:
    """The words of a tiny dpo stage, on the bare base, with some keys changed."""
    keys = {"model_name_or_path": fixtures.base, "dataset": fixtures.pairs, "max_length": 128, "max_prompt_length": 64}
    rest = {"batch_size": 4, "lora_r": 4, "max_steps": 1, "adapters": "none"}
    return ["dpo", *(f"{key}={value}" for key, value in {**keys, **rest, **changes}.items())]


def show(fixtures: Fixtures, **changes: object) -> list[str]:
    """The words that print the first row as sft sees it; no model is loaded for it, only a tokenizer."""
    keys = {"model_name_or_path": fixtures.base, "dataset": fixtures.chat, "max_length": 128}
    return ["data", "show", "sft", *(f"{key}={value}" for key, value in {**keys, **changes}.items())]


def row(*contents: str) -> str:
    """A line of a JSONL: the user's turns and the assistant's, one after the other."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return json.dumps({"messages": turns}) + "\n"
