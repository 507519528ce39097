"""Which answers the models of a chain prefer on held-out pairs: the implicit reward of DPO, and plain likelihood.

The implicit reward of a response is β (log π(y|x) − log π_ref(y|x)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5 without the
term that depends on the prompt alone). Accuracy is the share of pairs whose chosen response has the higher one (a tie is no
success, as in training's own evaluation), the margin is the mean difference: in nats, and times β.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..model.loaded import LoadedModel, Say
from .bootstrap import Bootstrap, Interval, Ratio
from .likelihood import PairLogps, pair_logps, score_each
from .loss import comparisons, roles
from .rows import HeldOut

HEADER = ("reward", "accuracy", "margin (nats)", "margin (× β)")
LIKELIER = ("model", "likelier (per token)", "likelier (sum)", "log p chosen", "rejected")


@dataclass(frozen=True)
class Comparison:
    """The implicit reward of one model against another.

    Attributes:
        accuracy: share of pairs.
        margin: mean of chosen minus rejected, in nats.
        chosen, rejected: mean gain in log-probability of either response, in nats.
    """

    accuracy: Interval
    margin: Interval
    chosen: Interval
    rejected: Interval


@dataclass(frozen=True)
class Likelier:
    """The preference of a model by its own log-probabilities.

    Attributes:
        share: of pairs whose chosen response has the higher mean log-probability a token.
        share_sum: the same with summed log-probabilities, which favour short responses.
        chosen, rejected: mean summed log-probability of the responses, in nats.
    """

    share: Interval
    share_sum: Interval
    chosen: Interval
    rejected: Interval


@dataclass
class PreferenceResult:
    """The preferences of some models on the same pairs.

    Attributes:
        beta: of the stage that the rows belong to, or as given; None: unknown, and margins are in nats alone.
        roles: {model: its name in a table} (``loss.roles``).
        comparisons: {(one, other): reward of one against other}.
        models: {model: its own preference}.
        missing: models that an interrupt left out.
    """

    held_out: HeldOut
    bootstrap: Bootstrap
    beta: float | None
    roles: dict[str, str]
    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    models: dict[str, Likelier] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """For ``results.write_result``."""
        comparisons = []
        for (one, other), found in self.comparisons.items():
            margin = {} if self.beta is None else {"margin": found.margin.scaled(self.beta).as_dict()}
            nats = {f"{name}_nats": getattr(found, name).as_dict() for name in ("margin", "chosen", "rejected")}
            comparisons.append({"model": one, "against": other, "accuracy": found.accuracy.as_dict(), **nats, **margin})
        names = {
            "share": "likelier",
            "share_sum": "likelier_sum",
            "chosen": "logps/chosen",
            "rejected": "logps/rejected",
        }
        return {
            "settings": {"bootstrap": self.bootstrap.as_dict(), "beta": self.beta},
            "data": self.held_out.as_dict(),
            "models": {
                model: {key: getattr(found, name).as_dict() for name, key in names.items()}
                for model, found in self.models.items()
            },
            "comparisons": comparisons,
        }

    def rows(self) -> list[list[str]]:
        """Under ``HEADER``."""
        return [
            [
                f"{one} against {other}",
                found.accuracy.text(".3f"),
                found.margin.text("+.3f"),
                "-" if self.beta is None else found.margin.scaled(self.beta).text("+.4f"),
            ]
            for (one, other), found in self.comparisons.items()
        ]

    def likelier_rows(self) -> list[list[str]]:
        """Under ``LIKELIER``."""
        return [
            [
                self.roles.get(name, name),
                found.share.text(".3f"),
                found.share_sum.text(".3f"),
                f"{found.chosen.value:.2f}",
                f"{found.rejected.value:.2f}",
            ]
            for name, found in self.models.items()
        ]


def evaluate_preference(
    live: LoadedModel,
    held_out: HeldOut,
    *,
    beta: float | None = None,
    models: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
    say: Say = lambda line: None,
) -> PreferenceResult:
    """Score the models one after the other; Ctrl-C ends after those that are done (``missing`` names the others).

    Args:
        held_out: pairs (method dpo).
        beta: β; None: of the stage whose configuration the rows have.
        models: names in ``live.models``; None: all.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    names = list(models if models is not None else live.models)
    found: dict[str, PairLogps] = score_each(live, names, held_out.data, "pairs", pair_logps, say)
    if beta is None and held_out.stage is not None:
        beta = held_out.config.beta
    missing = [name for name in names if name not in found]
    result = PreferenceResult(held_out, bootstrap or Bootstrap(), beta, roles(live), missing=missing)
    means: dict[Any, np.ndarray] = {}
    for name, logps in found.items():
        sums, rates = logps.sums.numpy(), logps.means().numpy()
        means[name, "share"] = rates[:, 0] > rates[:, 1]
        means[name, "share_sum"] = sums[:, 0] > sums[:, 1]
        means[name, "chosen"], means[name, "rejected"] = sums.T
    for one, other in (pairs := comparisons(live, list(found))):
        gained = (found[one].sums - found[other].sums).numpy()
        margins = gained[:, 0] - gained[:, 1]
        means[one, other, "accuracy"], means[one, other, "margin"] = margins > 0, margins
        means[one, other, "chosen"], means[one, other, "rejected"] = gained.T
    ones = np.ones(len(held_out.data.lengths))
    ratios: dict[Any, Ratio] = {key: (values, ones) for key, values in means.items()}
    intervals = result.bootstrap.intervals(ratios)
    for name in found:
        parts = ("share", "share_sum", "chosen", "rejected")
        result.models[name] = Likelier(*(intervals[name, part] for part in parts))
    for pair in pairs:
        of_pair = ("accuracy", "margin", "chosen", "rejected")
        result.comparisons[pair] = Comparison(*(intervals[*pair, part] for part in of_pair))
    return result
