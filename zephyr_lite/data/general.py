"""General text: 64 short passages of many kinds, on which a model's loss shows whether training made it forget."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from .chat_template import ChatTemplate, Example
from .dataset import DataReport, TokenizedDataset


def general_text(template: ChatTemplate, every: int = 1) -> TokenizedDataset:
    """The passages as plain text: every token but the first is a target; no chat template, no end-of-text token.

    Args:
        every: take one passage of so many.
    """
    passages = Path(__file__).with_name("general.txt").read_text(encoding="utf-8").split("\n%\n")
    examples = []
    for index, text in enumerate(passages[::every]):
        ids = template.text_ids(text.strip())[:-1]  # without eos
        examples.append(Example(ids, np.arange(len(ids)) > 0, f"general.txt passage {index * every + 1}", index))
    lengths = np.array([len(example.ids) for example in examples])
    fingerprint = hashlib.sha256(np.concatenate([example.ids for example in examples]).tobytes()).hexdigest()
    tokens, supervised = int(lengths.sum()), int(lengths.sum()) - len(examples)
    report = DataReport("general", kept=len(examples), tokens=tokens, supervised=supervised, longest=int(lengths.max()))
    return TokenizedDataset(examples, lengths, [], report, fingerprint)  # type: ignore[arg-type]
