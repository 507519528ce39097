"""General text: 64 short passages of many kinds, on which a model's loss shows whether training made it forget."""

from __future__ import annotations

import hashlib
from pathlib import Path

import datasets
import numpy as np

from .chat_template import ChatTemplate
from .dataset import DataReport, Examples, TokenizedDataset


def general_text(template: ChatTemplate, every: int = 1) -> TokenizedDataset:
    """The passages as plain text: every token but the first is a target; no chat template, no end-of-text token.

    Args:
        every: take one passage of so many.
    """
    passages = Path(__file__).with_name("general.txt").read_text(encoding="utf-8").split("\n%\n")
    ids = [template.text_ids(text.strip())[:-1] for text in passages[::every]]  # without eos
    table = {
        "ids": ids,
        "mask": [np.arange(len(each)) > 0 for each in ids],
        "where": [f"general.txt passage {index * every + 1}" for index in range(len(ids))],
    }
    lengths = np.array([len(each) for each in ids])
    fingerprint = hashlib.sha256(np.concatenate(ids).tobytes()).hexdigest()
    tokens, supervised = int(lengths.sum()), int(lengths.sum()) - len(ids)
    report = DataReport("general", kept=len(ids), tokens=tokens, supervised=supervised, longest=int(lengths.max()))
    return TokenizedDataset(Examples(datasets.Dataset.from_dict(table), "sft"), lengths, [], report, fingerprint)
