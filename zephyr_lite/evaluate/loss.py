"""The loss of every model of a chain on held-out conversations, with confidence intervals."""

from __future__ import annotations

from typing import Any

from ..model.loaded import LoadedModel
from .bootstrap import Bootstrap, Ratio
from .likelihood import Evaluation, comparisons, roles, score_each
from .rows import HeldOut


def evaluate_loss(live: LoadedModel, held_out: HeldOut, bootstrap: Bootstrap) -> Evaluation:
    """Score the models one after the other; Ctrl-C ends after those that are done.

    Losses are in nats per supervised token, each token counted once. A difference is the loss of one model minus that of
    another.

    Args:
        held_out: conversations (method sft).

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    logps = score_each(live, held_out.data)
    ratios: dict[Any, Ratio] = {name: (-of.sums[:, 0].numpy(), of.tokens[:, 0].numpy()) for name, of in logps.items()}
    pairs = comparisons(live, logps)
    for one, other in pairs:
        ratios[one, other] = ((logps[other].sums - logps[one].sums)[:, 0].numpy(), logps[one].tokens[:, 0].numpy())
    found = bootstrap.intervals(ratios)
    body = {
        "settings": {"bootstrap": bootstrap.as_dict(), "unit": "nats per supervised token"},
        "data": held_out.as_dict(),
        "models": {name: {"loss": found[name].as_dict(), "perplexity": found[name].exp().as_dict()} for name in logps},
        "differences": [{"model": one, "minus": other, "loss": found[one, other].as_dict()} for one, other in pairs],
    }
    shown = roles(live)
    losses = [[shown[name], found[name].text(), found[name].exp().text(".3f")] for name in logps]
    differences = [[f"{one} - {other}", found[one, other].text("+.4f")] for one, other in pairs]
    tables = [(("model", "loss", "perplexity"), losses), (("difference", "loss"), differences)]
    return Evaluation(body, tables, [name for name in live.models if name not in logps])
