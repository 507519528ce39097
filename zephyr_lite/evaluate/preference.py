"""Which answers the models of a chain prefer on held-out pairs: the implicit reward of DPO, and plain likelihood.

The implicit reward of a response is β (log π(y|x) − log π_ref(y|x)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5 without the
term that depends on the prompt alone). Accuracy is the share of pairs whose chosen response has the higher one (a tie is no
success, as in training's own evaluation), the margin is the mean difference: in nats, and times β.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model.loaded import LoadedModel
from .bootstrap import Bootstrap
from .likelihood import Evaluation, comparisons, roles, score_each
from .rows import HeldOut

REWARDS = ("reward", "accuracy", "margin (nats)", "margin (× β)")
LIKELIER = ("model", "likelier (per token)", "likelier (sum)", "log p chosen", "rejected")
RESPONSES = ("chosen", "rejected")


def evaluate_preference(
    live: LoadedModel, held_out: HeldOut, bootstrap: Bootstrap, *, beta: float | None = None
) -> Evaluation:
    """Score the models one after the other; Ctrl-C ends after those that are done.

    For every model the share of pairs whose chosen response is likelier, by its mean log-probability per token and by the sum
    (which favours short responses), and the mean summed log-probabilities of both. For every comparison of two models the
    accuracy and the margin of the reward, and the mean gain in log-probability of both responses, in nats.

    Args:
        held_out: pairs (method dpo).
        beta: β; None: of the stage whose configuration the rows have, or unknown, and margins are in nats alone.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    logps = score_each(live, held_out.data)
    if beta is None and held_out.stage is not None:
        beta = held_out.config.beta
    values: dict[Any, np.ndarray] = {}
    for name, of in logps.items():
        sums, means = of.sums.numpy(), of.means().numpy()
        values[name, "likelier"] = means[:, 0] > means[:, 1]
        values[name, "likelier_sum"] = sums[:, 0] > sums[:, 1]
        values[name, "logps/chosen"], values[name, "logps/rejected"] = sums.T
    pairs = comparisons(live, logps)
    for pair in pairs:
        gained = (logps[pair[0]].sums - logps[pair[1]].sums).numpy()
        margins = gained[:, 0] - gained[:, 1]
        values[pair, "accuracy"], values[pair, "margin_nats"] = margins > 0, margins
        values[pair, "chosen_nats"], values[pair, "rejected_nats"] = gained.T
    ones = np.ones(len(held_out.data.lengths))
    found = bootstrap.intervals({key: (each, ones) for key, each in values.items()})
    models = {name: {key: found[of, key].as_dict() for of, key in values if of == name} for name in logps}
    rewards = []
    compared: list[dict[str, Any]] = []
    for one, other in pairs:
        intervals = {key: found[of, key] for of, key in values if of == (one, other)}
        if beta is not None:
            intervals["margin"] = intervals["margin_nats"].scaled(beta)
        compared.append({"model": one, "against": other, **{key: each.as_dict() for key, each in intervals.items()}})
        nats, scaled = intervals["margin_nats"].text("+.3f"), "-" if beta is None else intervals["margin"].text("+.4f")
        rewards.append([f"{one} against {other}", intervals["accuracy"].text(".3f"), nats, scaled])
    likelier = []
    for name in logps:
        shares = [found[name, key].text(".3f") for key in ("likelier", "likelier_sum")]
        likelier.append(
            [roles(live)[name], *shares, *(f"{found[name, f'logps/{key}'].value:.2f}" for key in RESPONSES)]
        )
    body = {
        "settings": {"bootstrap": bootstrap.as_dict(), "beta": beta},
        "data": held_out.as_dict(),
        "models": models,
        "comparisons": compared,
    }
    notes = ["margins are in nats alone: no DPO stage gives β (--beta)"] if beta is None and pairs else []
    missing = [name for name in live.models if name not in logps]
    return Evaluation(body, [(REWARDS, rewards), (LIKELIER, likelier)], missing, notes)
