"""Log-probabilities of held-out conversations and pairs under the models of a chain: ``eval loss``, ``eval preference``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..data.batch import Batch, collate_conversations, collate_pairs
from ..data.chat_template import PairExample
from ..data.dataset import TokenizedDataset
from ..data.packing import best_fit
from ..io.text import duration
from ..model.adapters import AdapterStack
from ..model.base_folder import check_length
from ..model.decoder import Decoder
from ..model.families import FAMILIES
from ..model.loaded import LoadedModel
from .bootstrap import Bootstrap, Ratio
from .rows import HeldOut

logger = logging.getLogger(__name__)

MICRO_TOKENS = 2048
LOGIT_ROWS = 256  # rows of logits in float32 at once
RESPONSES = ("chosen", "rejected")


# -- scores of rows --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of n conversations (g = 1) or of the chosen and rejected responses of n pairs (g = 2).

    Attributes:
        sums: [n, g] float64, over the supervised tokens, in nats.
        tokens: [n, g] int64, the number of supervised tokens.
    """

    sums: Tensor
    tokens: Tensor

    def means(self) -> Tensor:
        """[n, g] nats per token: comparable between a short response and a long one."""
        return self.sums / self.tokens


@torch.no_grad()
def row_logps(scorer: Decoder | PlainScorer, data: TokenizedDataset) -> Logps:
    """The log-probabilities of conversations, or of the responses of pairs given their prompt, in the order of the data."""
    pairs = isinstance(data.examples[0], PairExample)
    collate: Callable[..., Batch] = collate_pairs if pairs else collate_conversations
    groups = 2 if pairs else 1
    sums = torch.zeros(len(data.lengths), groups, dtype=torch.float64)
    tokens = torch.zeros(len(data.lengths), groups, dtype=torch.int64)
    for indices in best_fit([min(int(length), MICRO_TOKENS) for length in data.lengths], MICRO_TOKENS):
        batch = collate([data.examples[i] for i in indices]).to(scorer.device)
        sums[indices] = batch.sum_by_group(scorer.token_logps(batch).double()).view(-1, groups).cpu()
        tokens[indices] = batch.group_sizes.view(-1, groups).cpu()
    return Logps(sums, tokens)


def chat_loss(scorer: Decoder | PlainScorer, data: TokenizedDataset) -> float:
    """Minus the mean log-probability, in nats, over all supervised tokens of the conversations, each counted once."""
    logps = row_logps(scorer, data)
    return float(-logps.sums.sum() / logps.tokens.sum())


def scorer_of(live: LoadedModel, model: str) -> Decoder | PlainScorer:
    """A scorer of one of the models: the fused decoder for its families, otherwise the model's own forward pass."""
    head = live.stack.base.get_output_embeddings()
    if live.base.model.config.model_type in FAMILIES and not isinstance(head, LoraLayer):
        return live.decoder(model)
    return PlainScorer(live.stack, live.models[model])


class PlainScorer:
    """Scores batches with ``forward`` of the live stack, one sequence at a time, for any architecture.

    Args:
        stack: base and adapters.
        names: of the active adapters, from the bottom up.
    """

    def __init__(self, stack: AdapterStack, names: Sequence[str]) -> None:
        self.stack, self.names = stack, list(names)
        self.device = stack.base.get_input_embeddings().weight.device

    @torch.no_grad()
    def token_logps(self, batch: Batch) -> Tensor:
        """[N] float32: each segment is run as the sequence that its queries see, its prefix and itself."""
        result = torch.empty(len(batch.target_ids), device=self.device)
        with self.stack.only(self.names):
            for segment in batch.segments:
                here = (batch.target_rows >= segment.start) & (batch.target_rows < segment.end)
                if not here.any():
                    continue
                ids = torch.cat([batch.tokens[start:end] for start, end in segment.key_runs()])
                logits = self.stack.model(input_ids=ids[None], use_cache=False).logits[0]
                rows = batch.target_rows[here] - segment.start + segment.keys - segment.queries
                parts = zip(rows.split(LOGIT_ROWS), batch.target_ids[here].split(LOGIT_ROWS))
                logps = [-F.cross_entropy(logits[some].float(), ids, reduction="none") for some, ids in parts]
                result[here] = torch.cat(logps)
        return result


# -- the evaluations -------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """Result of an evaluation on held-out rows."""

    body: dict[str, Any]  # of the JSON file
    tables: Sequence[tuple[Sequence[str], list[list[str]]]]  # (header, rows), to print
    notes: list[str] = field(default_factory=list)  # to print below the tables


def evaluate_loss(live: LoadedModel, held_out: HeldOut, bootstrap: Bootstrap) -> Evaluation:
    """The loss of every model on held-out conversations.

    Losses are in nats per supervised token, each token counted once. A difference is the loss of one model minus that of
    another.
    """
    logps = score_each(live, held_out)
    ratios: dict[Any, Ratio] = {name: (-of.sums[:, 0].numpy(), of.tokens[:, 0].numpy()) for name, of in logps.items()}
    pairs = comparisons(live)
    for one, other in pairs:
        ratios[one, other] = ((logps[other].sums - logps[one].sums)[:, 0].numpy(), logps[one].tokens[:, 0].numpy())
    found = bootstrap.intervals(ratios)
    body = {
        "settings": {"bootstrap": bootstrap.as_dict(), "unit": "nats per supervised token"},
        "data": held_out.as_dict(),
        "models": {name: {"loss": found[name].as_dict(), "perplexity": found[name].exp().as_dict()} for name in logps},
        "differences": [{"model": one, "minus": other, "loss": found[one, other].as_dict()} for one, other in pairs],
    }
    losses = [[roles(live)[name], found[name].text(), found[name].exp().text(".3f")] for name in logps]
    differences = [[f"{one} - {other}", found[one, other].text("+.4f")] for one, other in pairs]
    tables = [(("model", "loss", "perplexity"), losses), (("difference", "loss"), differences)]
    return Evaluation(body, tables)


def evaluate_preference(
    live: LoadedModel, held_out: HeldOut, bootstrap: Bootstrap, *, beta: float | None = None
) -> Evaluation:
    """Which responses the models prefer on held-out pairs.

    For every model the share of pairs whose chosen response is likelier, by its mean log-probability per token and by the sum
    (which favours short responses), and the mean summed log-probabilities of both. For every comparison of two models DPO's
    implicit reward β (log π(y|x) − log π_ref(y|x)) (Rafailov et al. 2023, arXiv 2305.18290, eq. 5): the share of pairs whose
    chosen response has the higher one (a tie is no success), the mean margin, and the mean gain of both responses, in nats.

    Args:
        beta: β; None: of the stage whose configuration the rows have, or unknown, and margins are in nats alone.
    """
    logps = score_each(live, held_out)
    if beta is None and held_out.stage is not None:
        beta = held_out.config.beta
    values: dict[Any, np.ndarray] = {}
    for name, of in logps.items():
        sums, means = of.sums.numpy(), of.means().numpy()
        values[name, "likelier"] = means[:, 0] > means[:, 1]
        values[name, "likelier_sum"] = sums[:, 0] > sums[:, 1]
        values[name, "logps/chosen"], values[name, "logps/rejected"] = sums.T
    pairs = comparisons(live)
    for pair in pairs:
        gained = (logps[pair[0]].sums - logps[pair[1]].sums).numpy()
        margins = gained[:, 0] - gained[:, 1]
        values[pair, "accuracy"], values[pair, "margin_nats"] = margins > 0, margins
        values[pair, "chosen_nats"], values[pair, "rejected_nats"] = gained.T
        if beta is not None:
            values[pair, "margin"] = beta * margins
    ones = np.ones(len(held_out.data.lengths))
    found = bootstrap.intervals({key: (each, ones) for key, each in values.items()})
    models = {name: {key: found[of, key].as_dict() for of, key in values if of == name} for name in logps}
    rewards, likelier = [], []
    compared: list[dict[str, Any]] = []
    for one, other in pairs:
        intervals = {key: found[of, key] for of, key in values if of == (one, other)}
        compared.append({"model": one, "against": other, **{key: each.as_dict() for key, each in intervals.items()}})
        nats, scaled = intervals["margin_nats"].text("+.3f"), "-" if beta is None else intervals["margin"].text("+.4f")
        rewards.append([f"{one} against {other}", intervals["accuracy"].text(".3f"), nats, scaled])
    for name in logps:
        shares = [found[name, key].text(".3f") for key in ("likelier", "likelier_sum")]
        sums_of = [f"{found[name, f'logps/{key}'].value:.2f}" for key in RESPONSES]
        likelier.append([roles(live)[name], *shares, *sums_of])
    body = {
        "settings": {"bootstrap": bootstrap.as_dict(), "beta": beta},
        "data": held_out.as_dict(),
        "models": models,
        "comparisons": compared,
    }
    tables = [
        (("reward", "accuracy", "margin (nats)", "margin (× β)"), rewards),
        (("model", "likelier (per token)", "likelier (sum)", "log p chosen", "rejected"), likelier),
    ]
    notes = ["margins are in nats alone: no DPO stage gives β (--beta)"] if beta is None and pairs else []
    return Evaluation(body, tables, notes)


def score_each(live: LoadedModel, held_out: HeldOut) -> dict[str, Logps]:
    """{model: ``row_logps``} of every model."""
    found: dict[str, Logps] = {}
    data, longest = held_out.data, min(held_out.config.max_length, int(max(held_out.data.lengths)))
    check_length(live.base.model.config, longest, live.source)
    for name in live.models:
        start = time.monotonic()
        found[name] = row_logps(scorer_of(live, name), data)
        logger.info(f"{name}: {len(data.lengths):,} rows in {duration(time.monotonic() - start)}")
    return found


def roles(live: LoadedModel) -> dict[str, str]:
    """{model: its name in a table}, such as ``dpo (policy)``."""
    names = {name: name for name in live.models}
    if len(names) > 1:
        names[live.reference] = f"{live.reference} (reference)"
        names[live.policy] = f"{live.policy} (policy)"
    return names


def comparisons(live: LoadedModel) -> list[tuple[str, str]]:
    """Pairs of models to compare: policy and reference, policy and base, reference and base."""
    base = next(iter(live.models))
    wanted = [(live.policy, live.reference), (live.policy, base), (live.reference, base)]
    return list(dict.fromkeys(pair for pair in wanted if pair[0] != pair[1]))
