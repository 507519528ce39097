"""Log-probabilities by the Hugging Face model's own forward pass: for any architecture, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..data.batch import Batch
from ..model.adapters import AdapterStack
from ..model.base import FAMILIES
from ..model.loaded import LoadedModel
from .likelihood import Scorer

# of the float32 copy of logits: a chunk of them at a time
CHUNK_BYTES = 64 * 2**20


def scorer(live: LoadedModel, model: str) -> Scorer:
    """One of the models: by the fused decoder where it knows the architecture, or else by the model's own forward pass."""
    head = live.stack.base.get_output_embeddings()
    if live.base.model.config.model_type in FAMILIES and not isinstance(head, LoraLayer):
        return live.decoder(model)
    return PlainScorer(live.stack, live.models[model])


class PlainScorer:
    """Scores batches with ``forward`` of the live stack (see ``likelihood.Scorer``).

    Args:
        stack: base and adapters.
        names: of the adapters that are on, from the bottom up.
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
                result[here] = logps_at(logits, rows, batch.target_ids[here])
        return result


def logps_at(logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits[row])[target] in float32, a chunk of rows at a time.

    Args:
        logits: [T, V], in any floating dtype.
        rows, targets: [N] int64.
    """
    size = max(1, CHUNK_BYTES // (4 * logits.shape[1]))
    parts = []
    for some, ids in zip(rows.split(size), targets.split(size)):
        wide = logits[some].float()
        parts.append(wide.gather(1, ids[:, None])[:, 0] - wide.logsumexp(-1))
    return torch.cat(parts)
