"""Rows whose lengths are those of the real data sets, in tokens of ``mistral.make_tokenizer``, where a byte is a token.

The words are random letters: what a step costs depends on lengths alone. The lengths are in ``lengths.json``, which says
where they come from. A run shorter than what the chat template writes around it becomes that long.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from pathlib import Path
from typing import Any

from zephyr_lite.data.chat_template import ChatTemplate

LENGTHS = Path(__file__).with_name("lengths.json")

Message = dict[str, str]


def lengths(name: str) -> list[list[int]]:
    """``sft_conversations``: runs of unsupervised and supervised tokens in turn; ``dpo_pairs``: prompt, chosen, rejected."""
    return json.loads(LENGTHS.read_text(encoding="utf-8"))[name]


def write_conversations(path: Path, template: ChatTemplate, tokens: int, scale: float) -> None:
    """A JSONL of conversations of at least so many tokens in all, the real lengths times ``scale`` over and over."""
    rng = random.Random(0)
    first, later, reply = _around(template)
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for runs in itertools.cycle(lengths("sft_conversations")):
            sizes = [int(run * scale) for run in runs]
            around = [reply if place % 2 else later if place else first for place in range(len(sizes))]
            messages = [_message(n, _words(rng, size - extra)) for n, (size, extra) in enumerate(zip(sizes, around))]
            file.write(json.dumps({"messages": messages}) + "\n")
            written += sum(sizes)
            if written >= tokens:
                break


def write_pairs(path: Path, template: ChatTemplate, pairs: int, scale: float) -> None:
    """A JSONL of preference pairs, the real lengths times ``scale`` over and over."""
    rng = random.Random(0)
    first, _, reply = _around(template)
    with path.open("w", encoding="utf-8") as file:
        for prompt, *responses in itertools.islice(itertools.cycle(lengths("dpo_pairs")), pairs):
            question = _message(0, _words(rng, int(prompt * scale) - first))
            row: dict[str, Any] = {"prompt": question["content"]}
            for name, response in zip(("chosen", "rejected"), responses):
                answer = _words(rng, int(response * scale) - reply - 1)  # and the template's last newline
                row[name] = [question, _message(1, name[0] + answer[1:])]  # two first letters: nothing more is shared
            file.write(json.dumps(row) + "\n")


def _around(template: ChatTemplate) -> tuple[int, int, int]:
    """Tokens that the template writes around a first question, a later one, and an answer."""
    _, mask = template.encode([_message(i, "x") for i in range(4)])
    runs = [len(list(group)) for _, group in itertools.groupby(mask.tolist())]
    return runs[0] - 1, runs[2] - 1, runs[1] - 1


def _message(place: int, content: str) -> Message:
    return {"role": "assistant" if place % 2 else "user", "content": content}


def _words(rng: random.Random, length: int) -> str:
    """So many characters (one at least): words of random letters, with no space at either end."""
    letters = rng.choices(string.ascii_lowercase, k=max(1, length))
    letters[6:-1:7] = " " * len(letters[6:-1:7])
    return "".join(letters)
