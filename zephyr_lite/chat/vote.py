"""Votes on answers whose authors are hidden, kept as preference pairs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .model import Message
from .rows import append_rows, check_file
from .session import Answer


@dataclass
class Tally:
    """What was voted: how often each model was liked best, ties, and questions without a vote.

    Attributes:
        against: (liked, other) → how often, for every pair that was written.
    """

    best: Counter[str] = field(default_factory=Counter)
    ties: int = 0
    skipped: int = 0
    pairs: int = 0
    against: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def votes(self) -> int:
        return sum(self.best.values()) + self.ties


class Ballot:
    """A file of votes.

    Args:
        path: a JSONL file, new or with preference pairs in it.
        seed: of the order in which answers are shown.
        source: what was talked to; written into the rows.

    Raises:
        UserError: the file is something else.
    """

    def __init__(self, path: Path, seed: int, source: str) -> None:
        self.path, self._seed, self._source = path, seed, source
        self.before = check_file(path, "dpo", "--vote")
        self.tally = Tally()

    def order(self, question: str, turn: int, models: int) -> list[int]:
        """Which model's answer stands at which place: by the seed and the question, in no order one could learn."""
        places = list(range(models))
        random.Random(f"{self._seed} {self.before} {turn} {question}").shuffle(places)
        return places

    def best(self, prompt: list[Message], models: Sequence[str], answers: Sequence[Answer], liked: int) -> int:
        """Write the pairs of a vote: the answer that was liked against each other one that differs.

        An empty answer makes no pair, since nothing can be trained on it.

        Args:
            prompt: the conversation that was answered, its last turn the user's.
            liked: the place of the answer, among ``answers``.

        Returns:
            how many pairs were written.
        """
        chosen = answers[liked]
        rows: list[dict[str, Any]] = []
        others = []
        for model, answer in zip(models, answers):
            if answer.text == chosen.text or not answer.text or not chosen.text:
                continue
            sides = [[*prompt, {"role": "assistant", "content": side.text}] for side in (chosen, answer)]
            vote = {
                "chosen_model": models[liked],
                "rejected_model": model,
                "source": self._source,
                "chosen_finish": chosen.finish,
                "rejected_finish": answer.finish,
            }
            first = next(turn["content"] for turn in prompt if turn["role"] == "user")
            rows.append({"prompt": first, "chosen": sides[0], "rejected": sides[1], "vote": vote})
            others.append(model)
        if rows:
            append_rows(self.path, rows)
        self.tally.best[models[liked]] += 1
        self.tally.against.update((models[liked], other) for other in others)
        self.tally.pairs += len(rows)
        return len(rows)

    def tie(self) -> None:
        self.tally.ties += 1

    def skip(self) -> None:
        self.tally.skipped += 1
