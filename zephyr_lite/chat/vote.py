"""Votes on answers whose models are hidden, kept as preference pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .generate import Message
from .rows import append_rows, check_file
from .session import Answer


class Ballot:
    """A file of votes, and their counts in this session.

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
        self.before = check_file(path, "dpo", "--vote")
        self.likes: Counter[str] = Counter()
        self.ties = self.skipped = self.pairs = 0

    @property
    def votes(self) -> int:
        return sum(self.likes.values()) + self.ties

    def order(self, question: str, turn: int, models: int) -> list[int]:
        """The model shown at each place: a function of the seed, the file's length, the turn and the question."""
        places = list(range(models))
        random.Random(f"{self._seed} {self.before} {turn} {question}").shuffle(places)
        return places

    def best(self, prompt: list[Message], models: Sequence[str], answers: Sequence[Answer], liked: int) -> int:
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
