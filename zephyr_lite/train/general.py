"""Did it forget? The loss on general text before and after a stage."""

from __future__ import annotations

import logging

import torch

from ..data.batch import collate_conversations
from ..data.dataset import general_text
from .distributed import sum_by_name, world
from .oom import OomRetry
from .stage import Metrics, Outcome, Stage

logger = logging.getLogger(__name__)
# Nats a token by which the loss may rise. In the fit of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) this is what a
# base of 7B parameters has ahead of one of 2B.
RISEN = 0.1
CPU_EVERY = 8  # a CPU, which needs milliseconds for a token, takes one passage of eight


@torch.no_grad()
def measure_general_loss(stage: Stage, outcome: Outcome, *, warns: bool) -> None:
    """Set ``outcome.general_loss``: nats a token on the general text before the stage (with the trained adapter off) and after it.
    With ``warns`` warn if it rose by more than ``RISEN``."""
    decoder = stage.decoder
    data = general_text(stage.template, 1 if decoder.device.type == "cuda" else CPU_EVERY)

    def of_group(group: list[int]) -> Metrics:
        batch = collate_conversations([data.examples[i] for i in group]).to(decoder.device)
        after, before = decoder.policy_and_reference(batch)
        return {"after": -after.double().sum().item(), "before": -before.double().sum().item()}

    sums = sum_by_name(world().all_gather(sum_by_name(OomRetry(stage).groups(data, of_group))))
    before, after = (sums[name] / data.report.supervised for name in ("before", "after"))
    outcome.general_loss = {"before": before, "after": after, "text": data.fingerprint}
    logger.info(f"general text: {before:.3f} nats a token before, {after:.3f} after")
    if after > before + RISEN and warns:
        outcome.warn(
            f"the loss on general text rose from {before:.3f} to {after:.3f} nats a token: the model forgets what it knew. "
            "A lower learning_rate or fewer epochs may help."
        )
