"""TRL's collators, fed with this package's tokenized rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.dataset import TokenizedDataset

LENGTHS = "packed_seq_lengths"  # Unsloth's name of the lengths of a packed row's sequences


def places(data: TokenizedDataset) -> datasets.Dataset:
    """A data set of row numbers; the collators read the rows themselves, so that nothing is copied. TRL keeps reference
    log-probabilities under a hash of the data set's content, which the fingerprint is for."""
    return datasets.Dataset.from_dict({"place": range(len(data.rows)), "of": [data.fingerprint] * len(data.rows)})


class Rows(DataCollatorForLanguageModeling):
    """TRL's collator, fed with packed rows: one flat row of conversations (``packed``), or a padded batch of them. ``with_lengths``
    adds the lengths of a packed row's conversations, int32 [conversations]."""

    def __init__(
        self, parts: Sequence[TokenizedDataset], pad: int, *, packed: bool, with_lengths: bool = False
    ) -> None:
        super().__init__(pad_token_id=pad, padding_free=packed)
        self.parts = {data.fingerprint: data for data in parts}
        self.with_lengths = packed and with_lengths

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = []
        for data, index in ((d, i) for e in examples for d in [self.parts[e["of"]]] for i in d.rows[e["place"]]):
            example = data.examples[index]
            labels = torch.from_numpy(example.ids.astype("int64"))
            ids = labels.tolist()
            labels[torch.from_numpy(~example.mask)] = -100
            labels[0] = -100  # nothing predicts it
            rows.append({"input_ids": ids, "labels": labels.tolist()})
        batch = super().torch_call(rows)
        if self.with_lengths:
            batch[LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32)
        return batch


class Pairs(DataCollatorForPreference):
    """TRL's collator, fed with pairs; unsupervised tokens of a response are not counted as completion."""

    def __init__(self, parts: Sequence[TokenizedDataset], pad: int) -> None:
        super().__init__(pad_token_id=pad)
        self.parts = {data.fingerprint: data for data in parts}

    def torch_call(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        pairs = [self.parts[e["of"]].examples[e["place"]] for e in examples]  # a pair is a row
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        fed = [{**e, **{name: getattr(p, name).tolist() for name in names}} for e, p in zip(examples, pairs)]
        batch = super().torch_call(fed)
        masks = [p.chosen_mask for p in pairs] + [p.rejected_mask for p in pairs]
        for row, mask, pair in zip(batch["completion_mask"], masks, [*pairs, *pairs]):
            start = len(pair.prompt_ids)
            row[start : start + len(mask)] = torch.from_numpy(mask.astype("int64"))
        return batch
