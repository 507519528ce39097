"""Rows whose lengths are those of the real data sets, in tokens of ``mistral.make_tokenizer``, where a byte is a token.

The words are random letters: what a step costs depends on lengths alone. The lengths are in ``lengths.json``, which says
where they come from. A run shorter than what the chat template writes around it becomes that long.
"""

from __future__ import annotations

import itertools
import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zephyr_lite.data.chat_template import ChatTemplate

LENGTHS = Path(__file__).with_name("lengths.json")

Message = dict[str, str]


def lengths(name: str) -> list[list[int]]:
    """``sft_conversations``: runs of unsupervised and supervised tokens in turn; ``dpo_pairs``: prompt, chosen, rejected."""
    return json.loads(LENGTHS.read_text(encoding="utf-8"))[name]


def write_conversations(path: Path, template: ChatTemplate, tokens: int, *, scale: float = 1.0, seed: int = 0) -> int:
    """A JSONL of conversations of at least so many tokens in all, the real lengths over and over. Returns how many."""
    rng = random.Random(seed)
    first, later, reply = _around(template)
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        for runs in itertools.cycle(lengths("sft_conversations")):
            messages: list[Message] = []
            for place, run in enumerate(runs):
                extra = reply if place % 2 else later if place else first
                messages.append(_message(place, _words(rng, int(run * scale) - extra)))
            file.write(json.dumps({"messages": messages}) + "\n")
            written += sum(int(run * scale) for run in runs)
            count += 1
            if written >= tokens:
                return count
    raise AssertionError("cycle() never ends")


def write_pairs(path: Path, template: ChatTemplate, pairs: int, *, scale: float = 1.0, seed: int = 0) -> None:
    """A JSONL of preference pairs, the real lengths over and over."""
    rng = random.Random(seed)
    first, _, reply = _around(template)
    with path.open("w", encoding="utf-8") as file:
        for prompt, *responses in itertools.islice(itertools.cycle(lengths("dpo_pairs")), pairs):
            question = _message(0, _words(rng, int(prompt * scale) - first))
            row: dict[str, Any] = {"prompt": question["content"]}
            for name, response in zip(("chosen", "rejected"), responses):
                answer = _words(rng, int(response * scale) - reply - 1)  # and the template's last newline
                row[name] = [question, _message(1, name[0] + answer[1:])]  # two first letters: nothing more is shared
            file.write(json.dumps(row) + "\n")


def pair_sizes(pairs: int, max_length: int, max_prompt_length: int) -> list[int]:
    """Tokens of the longer side of each pair that ``write_pairs`` writes, cut as the recipe cuts."""
    sizes = []
    for prompt, chosen, rejected in itertools.islice(itertools.cycle(lengths("dpo_pairs")), pairs):
        response = max(chosen, rejected)
        if prompt + response > max_length:
            prompt = min(prompt, max_prompt_length)
        sizes.append(min(prompt + response, max_length))
    return sizes


def seed_with_longest_first(sizes: list[int], batch_size: int) -> int:
    """A seed whose first step takes the longest row, so that what does not fit shows at once (see ``loop.rows_of_step``)."""
    from zephyr_lite.config.load import RunConfig
    from zephyr_lite.train.steps import rows_of_step

    longest = int(np.argmax(sizes))
    config = RunConfig(batch_size=batch_size)
    for seed in itertools.count():
        if longest in rows_of_step(config.model_copy(update={"seed": seed}), len(sizes), 0):
            return seed
    raise AssertionError("count() never ends")


def _around(template: ChatTemplate) -> tuple[int, int, int]:
    """Tokens that the template writes around a first question, a later one, and an answer."""
    _, mask = template.encode([_message(i, "x") for i in range(4)])
    runs = [len(list(group)) for _, group in itertools.groupby(mask.tolist())]
    return runs[0] - 1, runs[2] - 1, runs[1] - 1


def _message(place: int, content: str) -> Message:
    return {"role": "assistant" if place % 2 else "user", "content": content}


def _words(rng: random.Random, length: int) -> str:
    """So many characters (one at least): words of random letters, with no space at either end."""
    return "".join(_letters(rng, max(1, length)))


def _letters(rng: random.Random, length: int) -> Iterator[str]:
    for place in range(length):
        yield " " if place % 7 == 6 and place < length - 1 else rng.choice(string.ascii_lowercase)
