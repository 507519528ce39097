"""Our rows in TRL's collators, and our order in TRL's trainers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import nn
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.peft_io import read_adapter
from ..train.recorder import Order
from .trl import ADAPTER, REFERENCE

# In nats a token, {32 bits: ...}: TRL's two passes round alike, but those of a precomputed reference ran in other batches.
START_TOLERANCE = {True: 1e-4, False: 5e-2}
LENGTHS = "packed_seq_lengths"  # what Unsloth's attention calls the lengths of a packed row's sequences


def places(data: TokenizedDataset) -> datasets.Dataset:
    """A data set of places; the collators read the rows themselves, so that nothing is copied. The fingerprint is there
    because TRL keeps reference log-probabilities under a hash of the data set's content."""
    return datasets.Dataset.from_dict({"place": range(len(data.rows)), "of": [data.fingerprint] * len(data.rows)})


def targets(data: TokenizedDataset) -> int:
    """Supervised tokens of all conversations."""
    return sum(int(e.mask[1:].sum()) for e in data.examples)


def sees_only_itself(model: Any, *, with_lengths: bool = False) -> bool:
    """Whether positions that start again at 0 keep two sequences of one row apart, as TRL's packing takes for granted.

    True of every architecture of transformers whose masks come from ``create_causal_mask``; the model is asked, as it
    trains and as it evaluates, dropout aside.

    Args:
        with_lengths: also say how long the sequences are, in Unsloth's argument.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            return all(_apart(model, training, with_lengths) for training in (False, True))
    finally:
        model.train(was_training)


def _apart(model: Any, training: bool, with_lengths: bool) -> bool:
    device = next(model.parameters()).device
    first, second = (torch.arange(a, a + 12, device=device) % 100 for a in (3, 40))
    positions = torch.arange(12, device=device)
    lengths = {LENGTHS: torch.tensor([12, 12], dtype=torch.int32, device=device)} if with_lengths else {}
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    try:
        alone = model(input_ids=second[None], position_ids=positions[None], use_cache=False).logits[0].float()
        both = (
            model(
                input_ids=torch.cat([first, second])[None],
                position_ids=torch.cat([positions, positions])[None],
                use_cache=False,
                **lengths,
            )
            .logits[0, 12:]
            .float()
        )
    except TypeError:  # it takes no positions
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    return ((both - alone).norm() / alone.norm()).item() < tolerance


class Rows(DataCollatorForLanguageModeling):
    """TRL's collator, fed with packed rows: one flat row of conversations, or a padded batch of them.

    Args:
        parts: the data sets that places may be of.
        pad: the padding token's id.
        packed: one flat row.
        with_lengths: say in a packed batch how long its conversations are, int32 [conversations].
    """

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
            labels[0] = -100  # nothing stands before it
            rows.append({"input_ids": ids, "labels": labels.tolist()})
        batch = super().torch_call(rows)
        if self.with_lengths:
            batch[LENGTHS] = torch.tensor([len(row["input_ids"]) for row in rows], dtype=torch.int32)
        return batch


class Pairs(DataCollatorForPreference):
    """TRL's collator, fed with pairs; tokens of a response that nobody supervises are no completion."""

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


class _OurRows:
    """What both trainers change: rows come as they are, in our order, and nothing is sent or written beside the run."""

    order: Order

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Of a checkpoint with several adapters transformers loads those in sub-folders only: the reference, and not
        the policy, which would start over against it."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        model = self.model if model is None else model  # type: ignore[attr-defined]
        if REFERENCE in getattr(model, "peft_config", {}):
            AdapterStack(model).load(ADAPTER, read_adapter(resume_from_checkpoint).modules)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run folder says what it is."""

    def _send_telemetry(self) -> None:
        """A run tells nobody."""


class Sft(_OurRows, SFTTrainer):
    """TRL's SFT on our rows."""

    eval_items: float  # supervised held-out tokens a row

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """The mean over rows that transformers takes of this is the mean over all supervised tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs, num_items_in_batch=self.eval_items), None, None


class Dpo(_OurRows, DPOTrainer):
    """TRL's DPO on our rows. Before the first update policy and reference are one function, or training is refused."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and self.state.global_step == 0:
            tokens = inputs["completion_mask"].sum().item() / len(inputs["completion_mask"])
            rewards = (self._metrics["train"][f"rewards/{side}"][-1] for side in ("chosen", "rejected"))
            apart = max(map(abs, rewards)) / self.beta / tokens
            if not apart <= START_TOLERANCE[self.model.dtype in (torch.float32, torch.float64)]:
                raise UserError(
                    f"step 1: policy and reference differ by {apart:.2e} nats a token before the first update, where they "
                    "must be the same: TRL's reference is not the model below.",
                    "Set engine=fused, and please report this.",
                )
        return found
