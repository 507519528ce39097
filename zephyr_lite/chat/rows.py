"""Rows that chat adds to a JSONL file, new or with rows of the same kind in it: conversations, and votes as preference pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.atomic import append_line, sync_file
from .generate import Drawn, Message


def check_file(path: Path, column: str, option: str) -> None:
    """Check that rows may be added to a file.

    Args:
        column: what each row has: "messages" (conversations) or "chosen" (preference pairs).
        option: what names the file, for messages.
    """
    if path.suffix.lower() != ".jsonl":
        raise UserError(f"{option} {path}: training reads such rows from a .jsonl file.", f"Name it {path.stem}.jsonl.")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}.", "Make it first.")
    first = path.open(encoding="utf-8", errors="replace").readline() if path.exists() else ""
    if first and f'"{column}"' not in first:
        raise UserError(f"{option} {path}: its first row has no {column}.", "Choose another file.")


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows, all of them or none; they are on the disk when this returns. Raises OSError, which names ``path``."""
    if not rows:
        return
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        text = "\n" + text
    append_line(path, text)
    sync_file(path)


def vote_rows(
    prompt: list[Message], models: Sequence[str], answers: Sequence[Drawn], liked: int, source: str
) -> list[dict[str, Any]]:
    """The preference pairs of a vote: the liked answer against each other one that differs. An empty answer makes no pair,
    since training cannot use it.

    Args:
        prompt: the conversation that was answered; its last turn is the user's.
        models: of the answers.
        liked: index of the liked answer.
        source: the run or model that answered.
    """
    chosen = answers[liked]
    return [
        {
            "prompt": next(turn["content"] for turn in prompt if turn["role"] == "user"),
            "chosen": [*prompt, {"role": "assistant", "content": chosen.text}],
            "rejected": [*prompt, {"role": "assistant", "content": answer.text}],
            "vote": {
                "chosen_model": models[liked],
                "rejected_model": model,
                "source": source,
                "chosen_finish": chosen.finish,
                "rejected_finish": answer.finish,
            },
        }
        for model, answer in zip(models, answers)
        if answer.text != chosen.text and answer.text and chosen.text
    ]
