"""Distilled supervised fine-tuning (dSFT): the base learns to answer as the teacher did.

Supports: packed rows of conversations, loss on the assistant's turns (or the last, or all tokens), LoRA dropout,
frozen adapters below (a second SFT), evaluation with the token-weighted mean loss, best checkpoint and early stopping.

Raises ``UserError`` for anything of the user's that does not fit, and ``StageComplete`` for a finished stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config.load import Loaded
from ..data.batch import Batch, collate_conversations
from ..data.dataset import TokenizedDataset
from ..memory.plan import Plan
from ..model.decoder import Dropout
from .losses import sft_loss
from .main import OnMetrics, run, train
from .objective import Metrics, Outcome, Shares
from .observer import Observer
from .oom import OomRetry
from .stage import Say, Stage
from .steps import Lengths


def run_sft(
    loaded: Loaded,
    *,
    say: Say = print,
    on_metrics: OnMetrics = lambda step, total, metrics: None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train the stage that the configuration describes, from its last checkpoint if there is one."""
    return run("sft", loaded, train_sft, say=say, on_metrics=on_metrics, observers=observers)


def train_sft(
    stage: Stage,
    *,
    say: Say = print,
    on_metrics: OnMetrics = lambda step, total, metrics: None,
    observers: Sequence[Observer] = (),
) -> Outcome:
    """Train an opened stage and write its adapter."""
    return train(stage, SftObjective(stage, say), say=say, on_metrics=on_metrics, observers=observers)


class SftObjective:
    """Losses and rows of supervised fine-tuning (see ``task.Task``)."""

    unit = "tokens"

    def __init__(self, stage: Stage, say: Say = print) -> None:
        self.stage = stage
        self.data = stage.data
        self.decoder = stage.decoder
        self.guard = OomRetry(stage, say)

    def follow(self, plan: Plan) -> None:
        self.guard.follow(plan)

    def rows(self) -> Sequence[Sequence[int]]:
        return self.data.rows

    def lengths(self) -> Lengths:
        return self.data.lengths

    def where(self, example: int) -> str:
        return self.data.examples[example].where

    def count(self, examples: Sequence[int]) -> int:
        return sum(int(self.data.examples[i].mask[1:].sum()) for i in examples)

    def loss(self, examples: Sequence[int], step: int, total: int) -> tuple[Tensor, Shares]:
        self.guard.begin(self.data, examples, training=True)
        batch = self._batch(self.data, examples)
        config = self.stage.config
        logps, stats = self.decoder.token_stats(
            batch, keep=self.stage.plan.keep, dropout=Dropout(config.lora_dropout, config.seed, step)
        )
        return sft_loss(logps, total), {
            "entropy": stats.entropy.sum(),
            "mean_token_accuracy": stats.correct.sum(),
            "num_tokens": float(len(batch)),
        }

    def summarize(self, sums: Metrics, total: int) -> Metrics:
        means = {name: sums[name] / total for name in ("entropy", "mean_token_accuracy")}
        return {"loss": sums["loss"], **means, "num_tokens": sums["num_tokens"], "num_targets": float(total)}

    def measure(self) -> Metrics:
        """Sums over this process's held-out rows' supervised tokens, each counted once: loss, entropy, top-1 hits."""
        data = self.stage.eval_data
        if data is None:
            return {}
        sums = {"loss": 0.0, "mean_token_accuracy": 0.0, "entropy": 0.0, "targets": 0.0}

        @torch.no_grad()
        def add(group: list[int]) -> None:
            logps, stats = self.decoder.token_stats(self._batch(data, group))
            found = (-logps.double().sum().item(), stats.correct.sum().item(), stats.entropy.double().sum().item())
            for name, value in zip(sums, found):
                sums[name] += value
            sums["targets"] += logps.numel()

        self.guard.over(data, add)
        return sums

    def evaluation(self, sums: Metrics) -> Metrics:
        means = {f"eval_{name}": value / sums["targets"] for name, value in sums.items() if name != "targets"}
        return {**means, "eval_targets": sums["targets"]} if sums else {}

    def _batch(self, data: TokenizedDataset, examples: Sequence[int]) -> Batch:
        return collate_conversations([data.examples[i] for i in examples]).to(self.decoder.device)
