"""The loss of every model of a chain on held-out conversations, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..model.loaded import LoadedModel, Say
from .bootstrap import Bootstrap, Interval, Ratio
from .likelihood import ChatLogps, chat_logps, score_each
from .rows import HeldOut

HEADER = ("model", "loss", "perplexity")
DIFFERENCES = ("difference", "loss")


@dataclass
class LossResult:
    """Of some models on the same conversations.

    Attributes:
        losses: model → nats a supervised token, every token counted once.
        differences: (one, other) → loss of one minus loss of the other, over the same draws of conversations.
        missing: models that an interrupt left out.
        roles: model → how a table calls it (``roles``).
    """

    held_out: HeldOut
    bootstrap: Bootstrap
    roles: dict[str, str]
    losses: dict[str, Interval] = field(default_factory=dict)
    differences: dict[tuple[str, str], Interval] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """For ``results.write_result``."""
        return {
            "settings": {"bootstrap": self.bootstrap.as_dict(), "unit": "nats per supervised token"},
            "data": self.held_out.as_dict(),
            "models": {
                name: {"loss": loss.as_dict(), "perplexity": loss.exp().as_dict()} for name, loss in self.losses.items()
            },
            "differences": [
                {"model": one, "minus": other, "loss": gap.as_dict()} for (one, other), gap in self.differences.items()
            ],
        }

    def rows(self) -> list[list[str]]:
        """Under ``HEADER``."""
        return [[self.roles.get(name, name), x.text(), x.exp().text(".3f")] for name, x in self.losses.items()]

    def difference_rows(self) -> list[list[str]]:
        """Under ``DIFFERENCES``."""
        return [[f"{one} - {other}", gap.text("+.4f")] for (one, other), gap in self.differences.items()]


def evaluate_loss(
    live: LoadedModel,
    held_out: HeldOut,
    *,
    models: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
    say: Say = lambda line: None,
) -> LossResult:
    """Score the models one after the other; Ctrl-C ends after those that are done (``missing`` names the others).

    Args:
        held_out: conversations (method sft).
        models: names in ``live.models``; None: all.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    names = list(models if models is not None else live.models)
    found: dict[str, ChatLogps] = score_each(live, names, held_out.data, "conversations", chat_logps, say)
    missing = [name for name in names if name not in found]
    result = LossResult(held_out, bootstrap or Bootstrap(), roles(live), missing=missing)
    ratios: dict[Any, Ratio] = {name: (-logps.sums.numpy(), logps.tokens.numpy()) for name, logps in found.items()}
    pairs = comparisons(live, list(found))
    for one, other in pairs:
        gap: np.ndarray = (found[other].sums - found[one].sums).numpy()
        ratios[one, other] = (gap, found[one].tokens.numpy())
    intervals = result.bootstrap.intervals(ratios)
    result.losses = {name: intervals[name] for name in found}
    result.differences = {pair: intervals[pair] for pair in pairs}
    return result


def roles(live: LoadedModel) -> dict[str, str]:
    """model → ``dpo (policy)``, as a table calls it."""
    names = list(live.models)
    told = {} if len(names) == 1 else {live.reference: "reference", live.policy: "policy"}
    return {name: f"{name} ({told[name]})" if name in told else name for name in names}


def comparisons(live: LoadedModel, names: Sequence[str]) -> list[tuple[str, str]]:
    """(one, other) to be compared: the policy with its reference and with the base, and the reference with the base."""
    order = list(live.models)
    wanted = [(live.policy, live.reference), (live.policy, order[0]), (live.reference, order[0])]
    return list(dict.fromkeys(pair for pair in wanted if pair[0] != pair[1] and set(pair) <= set(names)))
