"""Rows that chat adds to a JSONL file, new or with rows of the same kind in it: conversations, and votes as preference pairs."""

from __future__ import annotations

import json
import random
from collections import Counter
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

    Raises:
        UserError: its folder is missing, it is not JSONL, or its first row has no such column.
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
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        text = "\n" + text
    append_line(path, text)
    sync_file(path)


class Ballot:
    """Votes on answers whose models are hidden, in a file of preference pairs; and their counts in this session.

    Attributes:
        likes, ties, skipped: votes for each model, ties, and questions without a vote.
        pairs: preference pairs written.

    Args:
        path: a JSONL file, new or with preference pairs in it.
        seed: of the order in which answers are shown.
        source: the run or model that answers; written into the rows.

    Raises:
        UserError: the file holds something else.
    """

    def __init__(self, path: Path, seed: int, source: str) -> None:
        self.path, self._seed, self._source = path, seed, source
        check_file(path, "chosen", "--vote")
        self.likes: Counter[str] = Counter()
        self.ties = self.skipped = self.pairs = 0

    @property
    def votes(self) -> int:
        return sum(self.likes.values()) + self.ties

    def order(self, question: str, turn: int, models: int) -> list[int]:
        """The model shown at each place: a function of the seed, the turn and the question."""
        places = list(range(models))
        random.Random(f"{self._seed} {turn} {question}").shuffle(places)
        return places

    def best(self, prompt: list[Message], models: Sequence[str], answers: Sequence[Drawn], liked: int) -> int:
        """Write the pairs of a vote: the liked answer against each other one that differs. An empty answer makes no pair,
        since training cannot use it.

        Args:
            prompt: the conversation that was answered; its last turn is the user's.
            liked: index of the liked answer.

        Returns:
            the number of pairs written.
        """
        chosen = answers[liked]
        rows = [
            {
                "prompt": next(turn["content"] for turn in prompt if turn["role"] == "user"),
                "chosen": [*prompt, {"role": "assistant", "content": chosen.text}],
                "rejected": [*prompt, {"role": "assistant", "content": answer.text}],
                "vote": {
                    "chosen_model": models[liked],
                    "rejected_model": model,
                    "source": self._source,
                    "chosen_finish": chosen.finish,
                    "rejected_finish": answer.finish,
                },
            }
            for model, answer in zip(models, answers)
            if answer.text != chosen.text and answer.text and chosen.text
        ]
        if rows:
            append_rows(self.path, rows)
        self.likes[models[liked]] += 1
        self.pairs += len(rows)
        return len(rows)
