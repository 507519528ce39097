"""Did it forget? The loss on general text before and after a stage."""

from __future__ import annotations

import logging
from typing import Any

import torch

from ..data.batch import collate_conversations
from ..data.dataset import general_text
from ..io.run_dir import StageDir
from .distributed import sum_by_name, world
from .oom import OomRetry
from .stage import Metrics, Outcome, Stage

logger = logging.getLogger(__name__)
# Nats a token by which the loss may rise. In the fit of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) this is what a
# base of 7B parameters has ahead of one of 2B.
RISEN = 0.1
CPU_EVERY = 8  # a CPU, which needs milliseconds for a token, takes one passage of eight


@torch.no_grad()
def measure_general_loss(stage: Stage, outcome: Outcome) -> None:
    """Set ``outcome.general_loss``: nats a token on the general text before the stage and after it. Warn if it rose by more
    than ``RISEN``. The value before is the one that the stage below recorded for the same model, or is computed in the same
    pass, with the trained adapter off."""
    decoder = stage.decoder
    data = general_text(stage.template, 1 if decoder.device.type == "cuda" else CPU_EVERY)
    known = _recorded_below(stage, data.fingerprint)

    def of_group(group: list[int]) -> Metrics:
        batch = collate_conversations([data.examples[i] for i in group]).to(decoder.device)
        if known is None:
            after, before = decoder.policy_and_reference(batch)
            return {"after": -after.double().sum().item(), "before": -before.double().sum().item()}
        return {"after": -decoder.token_logps(batch).double().sum().item()}

    sums = sum_by_name(world().all_gather(sum_by_name(OomRetry(stage).groups(data, of_group))))
    found = {name: value / data.report.supervised for name, value in sums.items()}
    before, after = found["before"] if known is None else known, found["after"]
    outcome.general_loss = {"before": before, "after": after, "text": data.fingerprint}
    logger.info(f"general text: {before:.3f} nats a token before, {after:.3f} after")
    if after > before + RISEN:
        warning = (
            f"the loss on general text rose from {before:.3f} to {after:.3f} nats a token: the model forgets what it knew. "
            "A lower learning_rate or fewer epochs may help."
        )
        outcome.warnings.append(warning)
        logger.warning(warning)


def _recorded_below(stage: Stage, fingerprint: str) -> float | None:
    """The loss that stage.json of the stage below has for exactly the model that this stage started from, or None."""
    if not stage.frozen:
        return None
    info: dict[str, Any] = StageDir(stage.frozen[-1].path.parent).info() or {}
    general = (info.get("result") or {}).get("general_loss") or {}
    adapters = [*(info.get("adapters") or []), info.get("own") or {}]
    same = [each.get("sha256") for each in adapters] == [adapter.sha256 for adapter in stage.frozen]
    same = same and info["base"] == stage.base.describe() and general.get("text") == fingerprint
    same = same and info["plan"].get("int8", False) == stage.plan.int8
    return general["after"] if same else None
