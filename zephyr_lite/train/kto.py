"""KTO: preference optimization from answers that are good or bad by themselves (Ethayarajh et al. 2024, arXiv 2402.01306).

An answer with a label is a pair of which one side is empty, so packing, reference and cache are DPO's; a pair is two answers.
The loss compares an answer's log-ratio with z0, which estimates the policy's divergence from the reference: the mean log-ratio
of prompts with the answers of other rows of the step, at least 0. It is computed before the step, without gradients and
dropout, and is one number for the whole step (TRL has one for each micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch, collate_pairs
from ..data.chat_template import PairExample
from ..data.dataset import TokenizedDataset
from .distributed import world
from .dpo import DpoObjective, PairTotals
from .losses import Preference, kto_loss
from .stage import Metrics, Stage
from .steps import micro_batches


class KtoObjective(DpoObjective):
    """Loss and metrics of KTO (see ``Objective``). An answer with label true is a chosen one, with false a rejected one."""

    unit = "answers"

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.collapse = None  # the loss rises if desirable answers become less likely
        self.answers = self.data.answers()
        self.z0 = 0.0  # of the current step or evaluation
        self.counts = self.answers[:0]  # the current step's part of ``answers``

    def num_targets(self, examples: Sequence[int]) -> PairTotals:
        return PairTotals(int(self.answers[examples].sum()), 0)

    def begin_step(self, examples: Sequence[int]) -> None:
        self.counts = self.answers[examples]
        self.z0 = self._divergence(self.data, examples, shared=True)

    def metrics(self, sums: Metrics, total: PairTotals) -> Metrics:
        means = self._means(sums, self.counts)
        return {"loss": sums["loss"], **means, "num_tokens": sums["num_tokens"], "num_answers": float(total.pairs)}

    def evaluate(self) -> Metrics:
        """As DPO's; z0 is of all held-out rows, and every process computes it."""
        assert self.stage.eval_data is not None
        self.z0 = self._divergence(self.stage.eval_data, range(len(self.stage.eval_data.lengths)), shared=False)
        return super().evaluate()

    def eval_metrics(self, sums: Metrics) -> Metrics:
        assert self.stage.eval_data is not None
        answers = self.stage.eval_data.answers()
        means = {"loss": sums["loss"] / answers.sum(), **self._means(sums, answers)}
        return {f"eval_{name}": float(value) for name, value in means.items()}

    def _means(self, sums: Metrics, answers: np.ndarray) -> Metrics:
        """TRL's metrics, and the accuracy: the share of rows with a positive margin. Answers that there are none of count 0."""
        means = {"rewards/accuracies": sums["rewards/accuracies"] / len(answers), "kl": self.z0}
        for side, count in zip(("chosen", "rejected"), answers.sum(0).tolist()):
            means |= {name: sums[name] / max(1, count) for name in (f"rewards/{side}", f"logps/{side}")}
        return {**means, "rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}

    def _preference(self, policy: Tensor, reference: Tensor | None, batch: Batch, total: PairTotals) -> Preference:
        assert reference is not None
        config, there = self.stage.config, batch.group_sizes.view(-1, 2) > 0
        reference, weights = reference.to(policy.dtype), (config.desirable_weight, config.undesirable_weight)
        losses = kto_loss(policy, reference, self.z0, beta=config.beta, weights=weights) * there
        return Preference(losses.sum(1), *(config.beta * (policy.detach() - reference)).unbind(1))

    @torch.no_grad()
    def _divergence(self, data: TokenizedDataset, examples: Sequence[int], *, shared: bool) -> float:
        """z0 of these examples.

        Args:
            shared: every process computes a part of it, in a collective call.
        """
        rows = mismatched([data.examples[index] for index in examples], self.stage.config.max_length)
        lengths = [len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows]
        own, total = world().shard(range(len(rows)), lengths) if shared else list(range(len(rows))), 0.0
        for attempt in self.oom.attempts():
            total = 0.0
            with attempt:
                for group in micro_batches(own, lengths, self.stage.plan.micro_tokens):
                    self.oom.begin(data, [rows[place].index for place in group], training=False)
                    policy, reference = self._sums(collate_pairs([rows[i] for i in group]).to(self.decoder.device))
                    assert reference is not None
                    total += (policy - reference).double().sum().item()
        parts = world().all_gather(total) if shared else [total]
        count = sum(len(ids) > 0 for row in rows for ids in (row.chosen_ids, row.rejected_ids))
        return max(0.0, sum(parts) / max(1, count))


def mismatched(pairs: Sequence[PairExample], max_length: int) -> list[PairExample]:
    """The prompt of each row with the answers of the row before it, of the first with the last one's; of a single row nothing."""
    rows = []
    for place, pair in enumerate(pairs if len(pairs) > 1 else []):
        other, room = pairs[place - 1], max_length - len(pair.prompt_ids)
        arrays = (other.chosen_ids, other.chosen_mask, other.rejected_ids, other.rejected_mask)
        chosen, chosen_mask, rejected, rejected_mask = (array[:room] for array in arrays)
        rows.append(PairExample(pair.prompt_ids, chosen, chosen_mask, rejected, rejected_mask, pair.where, pair.index))
    return rows
