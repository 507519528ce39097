"""Log-probabilities of held-out conversations and pairs under the models of a chain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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
from ..model.base import FAMILIES
from ..model.loaded import LoadedModel

logger = logging.getLogger(__name__)

MICRO_TOKENS = 2048
LOGIT_ROWS = 256  # rows of logits in float32 at once
PROGRESS_SECONDS = 15.0
Done = Callable[[int], None]  # receives the number of finished rows


class Scorer(Protocol):
    """Gives the log-probability of each target of a batch (``model.decoder.Decoder``, ``PlainScorer``)."""

    @property
    def device(self) -> torch.device: ...

    def token_logps(self, batch: Batch) -> Tensor:
        """[N], in the order of ``batch.target_ids``."""


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
def row_logps(scorer: Scorer, data: TokenizedDataset, done: Done = lambda rows: None) -> Logps:
    """The log-probabilities of conversations, or of the responses of pairs given their prompt, in the order of the data."""
    pairs = isinstance(data.examples[0], PairExample)
    collate: Callable[..., Batch] = collate_pairs if pairs else collate_conversations
    groups = 2 if pairs else 1
    sums = torch.zeros(len(data.lengths), groups, dtype=torch.float64)
    tokens = torch.zeros(len(data.lengths), groups, dtype=torch.int64)
    seen = 0
    for indices in best_fit([min(int(length), MICRO_TOKENS) for length in data.lengths], MICRO_TOKENS):
        batch = collate([data.examples[i] for i in indices]).to(scorer.device)
        sums[indices] = batch.sum_by_group(scorer.token_logps(batch).double()).view(-1, groups).cpu()
        tokens[indices] = batch.group_sizes.view(-1, groups).cpu()
        done(seen := seen + len(indices))
    return Logps(sums, tokens)


def chat_loss(scorer: Scorer, data: TokenizedDataset) -> float:
    """Minus the mean log-probability, in nats, over all supervised tokens of the conversations, each counted once."""
    logps = row_logps(scorer, data)
    return float(-logps.sums.sum() / logps.tokens.sum())


def scorer_of(live: LoadedModel, model: str) -> Scorer:
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

    @property
    def device(self) -> torch.device:
        return self.stack.base.get_input_embeddings().weight.device

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
                result[here] = torch.cat(
                    [
                        -F.cross_entropy(logits[some].float(), ids, reduction="none")
                        for some, ids in zip(rows.split(LOGIT_ROWS), batch.target_ids[here].split(LOGIT_ROWS))
                    ]
                )
        return result


@dataclass
class Evaluation:
    """Result of an evaluation on held-out rows.

    Attributes:
        body: of the JSON file.
        tables: (header, rows), to print.
        missing: models that an interrupt left out.
        notes: to print below the tables.
    """

    body: dict[str, Any]
    tables: Sequence[tuple[Sequence[str], list[list[str]]]]
    missing: list[str]
    notes: list[str] = field(default_factory=list)


def score_each(live: LoadedModel, data: TokenizedDataset) -> dict[str, Logps]:
    """{model: ``row_logps``} of every model. Ctrl-C ends after the models that are done.

    Raises:
        KeyboardInterrupt: before the first was done.
    """
    found: dict[str, Logps] = {}
    try:
        for name in live.models:
            found[name] = row_logps(scorer_of(live, name), data, _progress(name, len(data.lengths)))
    except KeyboardInterrupt:
        if not found:
            raise
    return found


def roles(live: LoadedModel) -> dict[str, str]:
    """{model: its name in a table}, such as ``dpo (policy)``."""
    names = {name: name for name in live.models}
    if len(names) > 1:
        names[live.reference] = f"{live.reference} (reference)"
        names[live.policy] = f"{live.policy} (policy)"
    return names


def comparisons(live: LoadedModel, scored: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of models to compare: policy and reference, policy and base, reference and base."""
    base = next(iter(live.models))
    wanted = [(live.policy, live.reference), (live.policy, base), (live.reference, base)]
    return list(dict.fromkeys(pair for pair in wanted if pair[0] != pair[1] and set(pair) <= set(scored)))


def _progress(name: str, total: int) -> Done:
    """A callback that logs the progress and the time left, at most every ``PROGRESS_SECONDS``."""
    start = said = time.monotonic()

    def done(rows: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_SECONDS and rows < total:
            said = now
            left = duration((now - start) / rows * (total - rows))
            logger.info(f"{name}: {rows:,} of {total:,} rows, {left} left")

    return done
