"""Distilled supervised fine-tuning (dSFT): the base learns from a teacher's answers.

Rows are packed conversations, the loss is on the assistant's turns (or the last, or all tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from ..data.batch import Batch, collate_conversations
from ..data.dataset import TokenizedDataset
from ..model.decoder import Dropout
from .losses import sft_loss
from .main import run
from .stage import Metrics, Objective


class SftObjective(Objective):
    """Loss and metrics of supervised fine-tuning (see ``Objective``)."""

    unit = "tokens"

    def num_targets(self, examples: Sequence[int]) -> int:
        return sum(int(self.data.examples[i].mask[1:].sum()) for i in examples)

    def loss(self, examples: Sequence[int], step: int, total: int) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self.oom.begin(self.data, examples, training=True)
        batch = self._batch(self.data, examples)
        config = self.stage.config
        dropout = Dropout(config.lora_dropout, config.seed, step, config.neftune_noise_alpha or 0.0)
        logps, stats = self.decoder.token_stats(batch, keep=self.stage.plan.keep, dropout=dropout)
        return sft_loss(logps, total), {
            "entropy": stats.entropy.sum(),
            "mean_token_accuracy": stats.correct.sum(),
            "num_tokens": float(len(batch)),
        }

    def metrics(self, sums: Metrics, total: int) -> Metrics:
        return {
            "loss": sums["loss"],
            "entropy": sums["entropy"] / total,
            "mean_token_accuracy": sums["mean_token_accuracy"] / total,
            "num_tokens": sums["num_tokens"],
            "num_targets": float(total),
        }

    def eval_sums(self, group: list[int]) -> Metrics:
        assert self.stage.eval_data is not None
        logps, stats = self.decoder.token_stats(self._batch(self.stage.eval_data, group))
        return {
            "loss": -logps.double().sum().item(),
            "mean_token_accuracy": stats.correct.sum().item(),
            "entropy": stats.entropy.double().sum().item(),
            "targets": float(logps.numel()),
        }

    def eval_metrics(self, sums: Metrics) -> Metrics:
        means = {f"eval_{name}": value / sums["targets"] for name, value in sums.items()}
        return {**means, "eval_targets": sums["targets"]}

    def _batch(self, data: TokenizedDataset, examples: Sequence[int]) -> Batch:
        return collate_conversations([data.examples[i] for i in examples]).to(self.decoder.device)


# Train the stage of a configuration, from its last checkpoint if there is one (see ``main.run``).
run_sft = partial(run, "sft", SftObjective)
