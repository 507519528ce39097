"""Distilled direct preference optimization (dDPO; Rafailov et al. 2023, arXiv 2305.18290) on AI feedback.

The policy is base + frozen adapters + the adapter under training; the reference is the same weights with that
adapter's columns set to zero. Prompts are computed once for both responses.
The reference is live, or computed once and kept on disk, or there is none, if no loss needs it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from torch import Tensor

from ..data.batch import Batch, collate_pairs
from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..model.decoder import Dropout
from .losses import Preference, loss_of
from .main import run
from .monitors import DpoCollapseMonitor
from .reference import ReferenceCache, pair_sums
from .stage import Metrics, Objective, Stage

logger = logging.getLogger(__name__)

# Allowed difference of policy and reference at step 0, where both are the same function, in nats per token. A live
# reference runs the same products in the same order; a cached one ran in other micro-batches and rounds differently.
START_TOLERANCE = {"live": 1e-6, "cached": 5e-2}


class PairTotals(NamedTuple):
    """The denominators of a step's losses: the number of its pairs, and of the supervised tokens of their chosen responses."""

    pairs: int
    chosen_tokens: int


class DpoObjective(Objective):
    """Loss and metrics of preference optimization (see ``Objective``)."""

    unit = "pairs"

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.collapse = DpoCollapseMonitor()
        self.cache = self._fill_cache() if stage.config.precompute_ref_log_probs is True else None

    @cached_property
    def eval_total(self) -> PairTotals:
        assert self.stage.eval_data is not None
        return _totals(self.stage.eval_data, range(len(self.stage.eval_data.lengths)))

    def num_targets(self, examples: Sequence[int]) -> PairTotals:
        return _totals(self.data, examples)

    def loss(self, examples: Sequence[int], step: int, total: Any) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        self.oom.begin(self.data, examples, training=True)
        batch = self._batch(self.data, examples)
        config = self.stage.config
        policy, reference = self._sums(batch, Dropout(config.lora_dropout, config.seed, step), self.cache)
        if step == 0 and reference is not None:
            self._check_start(policy.detach(), reference, batch)
        found = self._preference(policy, reference, batch, total)
        sums = _metric_sums(found, policy.detach())
        return found.losses.sum() / total.pairs, {**sums, "num_tokens": float(len(batch))}

    def metrics(self, sums: Metrics, total: PairTotals) -> Metrics:
        means = {k: v / total.pairs for k, v in sums.items() if k.startswith(("rewards/", "logps/"))}
        return {"loss": sums["loss"], **means, "num_tokens": sums["num_tokens"], "num_pairs": float(total.pairs)}

    def eval_sums(self, group: list[int]) -> Metrics:
        assert self.stage.eval_data is not None
        batch = self._batch(self.stage.eval_data, group)
        policy, reference = self._sums(batch)
        found = self._preference(policy, reference, batch, self.eval_total)
        sums = {"loss": found.losses.sum(), **_metric_sums(found, policy)}
        return {name: value.item() for name, value in sums.items()}

    def eval_metrics(self, sums: Metrics) -> Metrics:
        assert self.stage.eval_data is not None
        count = len(self.stage.eval_data.lengths)
        return {f"eval_{name}": value / count for name, value in sums.items()}

    def _batch(self, data: TokenizedDataset, examples: Sequence[int]) -> Batch:
        return collate_pairs([data.examples[i] for i in examples]).to(self.decoder.device)

    def _preference(self, policy: Tensor, reference: Tensor | None, batch: Batch, total: PairTotals) -> Preference:
        reference = None if reference is None else reference.to(policy.dtype)
        size = total.chosen_tokens / total.pairs
        return loss_of(self.stage.config, policy, reference, batch.group_sizes.view(-1, 2), size)

    def _sums(
        self, batch: Batch, dropout: Dropout | None = None, cache: ReferenceCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[P, 2] summed log-probabilities of policy and reference, None if no loss needs one; a live reference runs in the
        policy's pass or in its own, as the plan says."""
        keep = self.stage.plan.keep
        if not self.stage.config.needs_reference:
            return pair_sums(self.decoder, batch, keep=keep, dropout=dropout), None
        if cache is None and self.stage.plan.reference == "together":
            both = self.decoder.policy_and_reference(batch, keep=keep, dropout=dropout)
            policy, reference = (batch.sum_by_group(logps).view(-1, 2) for logps in both)
            return policy, reference
        if cache is not None:
            reference = cache(batch.indices, self.decoder.device)
        else:
            reference = pair_sums(self.decoder, batch, reference=True, dropout=dropout)
        return pair_sums(self.decoder, batch, keep=keep, dropout=dropout), reference

    def _check_start(self, policy: Tensor, reference: Tensor, batch: Batch) -> None:
        """At step 0 the adapter's B is zero, so policy and reference are the same function."""
        kind = "live" if self.cache is None else "cached"
        apart = ((policy - reference).abs() / batch.group_sizes.clamp(min=1).view(-1, 2)).max().item()
        if math.isfinite(apart) and apart > START_TOLERANCE[kind]:  # the loop handles what is not finite
            raise UserError(
                f"step 1: policy and {kind} reference differ by {apart:.2e} nats a token before the first update, where "
                "they must be the same.",
                "Please report this." if self.cache is None else f"Delete {self.cache.path}.",
            )

    def _fill_cache(self) -> ReferenceCache:
        stage = self.stage
        cache = ReferenceCache(
            stage.dir.path,
            len(self.data.lengths),
            rows=stage.data.fingerprint,
            template=stage.template.text,
            base={k: v for k, v in stage.base.describe().items() if k not in ("name_or_path", "revision")},
            adapters=[a.sha256 for a in stage.frozen],
            **({"compute": "int8"} if stage.plan.int8 else {}),
        )
        if cache.load():
            logger.info(f"reference log-probabilities read from {cache.path}")
            return cache
        logger.info(f"computing the reference log-probabilities of {cache.missing:,} pairs once")
        cache.compute(self.decoder, self.data, self.oom)
        return cache


def _totals(data: TokenizedDataset, examples: Sequence[int]) -> PairTotals:
    return PairTotals(len(examples), sum(int(data.examples[i].chosen_mask.sum()) for i in examples))


def _metric_sums(found: Preference, policy: Tensor) -> dict[str, Tensor]:
    """A micro-batch's sums of what TRL's metrics average; but a tie, as at step 0 with a live reference, is half right,
    where TRL's is wrong."""
    chosen, rejected = found.chosen_rewards, found.rejected_rewards
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (0.5 + 0.5 * (chosen - rejected).sign()).sum(),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": policy[:, 0].sum(),
        "logps/rejected": policy[:, 1].sum(),
    }


def preference_objective(stage: Stage) -> DpoObjective:
    """The objective of a stage's ``loss_type``."""
    if stage.config.loss_type != "kto":
        return DpoObjective(stage)
    from .kto import KtoObjective  # which builds on this module

    return KtoObjective(stage)


# Train the stage of a configuration, from its last checkpoint if there is one (see ``main.run``).
run_dpo = partial(run, "dpo", preference_objective)
