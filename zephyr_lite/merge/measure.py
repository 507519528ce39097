"""The merged folder compared with the live stack, on held-out conversations and on trained ones.

Merged onto NF4's weights, the folder equals the live stack up to rounding. Merged onto the 16-bit base it differs, since the
base's own rounding is undone. Whether that is better depends on the run: the held-out loss tells, and the loss of trained
conversations, since a run that learned few rows by heart can lose them and be better on others.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import Example
from ..data.dataset import prepare
from ..errors import UserError
from ..evaluate.bootstrap import Bootstrap, Interval
from ..evaluate.rows import held_out
from ..io.text import counted
from ..model.chain import Chain
from ..model.families import FAMILIES
from ..model.loaded import live_of
from .weights import Way

NAMES: dict[Way, str] = {"base": "the 16-bit base", "nf4": "the 4-bit weights"}
CHECK_ROWS, MEASURE_ROWS = 8, 64
MAX_TOKENS = 512  # of each row
BATCH = 4  # rows run at once
CHUNK = 64  # tokens whose logits are computed at once: 32 MB in float32 with a vocabulary of 128k
DEMO_ROWS = Path(__file__).parents[1] / "demo" / "conversations_test.jsonl"


@dataclass(frozen=True)
class LogpDifference:
    """|Δ| of two lists of per-token log-probabilities: mean, largest, and the number of tokens."""

    mean: float
    max: float
    tokens: int


def compare_logps(live: Sequence[Tensor], merged: Sequence[Tensor]) -> LogpDifference:
    """The difference of two lists of per-token log-probabilities, row by row of the same shape [T - 1].

    Raises:
        ValueError: the lists are not of the same rows, or are empty.
    """
    if [x.shape for x in live] != [x.shape for x in merged] or not live:
        raise ValueError("the two lists hold different rows, or none")
    gaps = (torch.cat(list(live)).float().cpu() - torch.cat(list(merged)).float().cpu()).abs()
    return LogpDifference(float(gaps.mean()), float(gaps.max()), gaps.numel())


class MergeMeasure:
    """The live stack and folders merged from it, on the same supervised tokens of held-out conversations.

    Never two models in memory: of the live stack only the last hidden states are kept, so that no [tokens, vocabulary] is ever
    held.

    Attributes:
        origin: where the rows come from.
        trained: number of trained conversations that are compared as well.
        lost: why they are not the chain's own held-out rows but the demo's; None: they are its own.
        rows, tokens: conversations, and supervised tokens in them.
        numbers: "live" → loss, nats per token; each way that was added → loss; loss_minus_live; the same of the trained
            conversations, trained_loss and trained_loss_minus_live, where there are any; kl: KL(live ‖ merged) over the
            whole vocabulary, nats per token; top1_agreement: share of tokens with the same most likely token; "base_minus_nf4"
            → loss, once both were added. Intervals are over conversations, all on the same draws.
        logps: way → |Δ log p| of the target tokens.
    """

    @torch.no_grad()
    def __init__(self, chain: Chain, rows: int = CHECK_ROWS, *, trained: bool = False) -> None:
        """Load the live stack, run the rows through it, and free it.

        Args:
            rows: most conversations.
            trained: add as many trained conversations.

        Raises:
            UserError: the base or an adapter is not the one that the chain's stage was trained with.
        """
        live = live_of(chain, chat_template="auto")
        self.lost: str | None = None
        seen: list[Example] = []
        try:
            found = held_out(chain, live.template, "sft", limit=rows, max_length=MAX_TOKENS)
            data, self.origin = found.data, found.origin
            if trained:
                specs = [
                    each.model_copy(update={"limit": min(rows, each.limit or rows)}) for each in found.config.dataset
                ]
                seen = list(prepare(specs, "sft", found.config, live.template, what="training").examples)
        except (UserError, OSError) as error:
            self.lost, self.origin = str(error).splitlines()[0], "the demo's conversations"
            specs = [DatasetSpec(path=str(DEMO_ROWS), limit=rows)]
            data = prepare(specs, "sft", RunConfig(max_length=MAX_TOKENS), live.template, what="held-out")
        self._examples = [*data.examples, *seen]
        self._targets = [torch.from_numpy(e.ids[1:][e.mask[1:]].astype(np.int64)) for e in self._examples]
        counts = np.array([len(t) for t in self._targets], dtype=np.float64)
        self.rows, self.trained = len(data.examples), len(seen)
        self.tokens = int(counts[: self.rows].sum())
        self._counts, self._device, self._dtype = counts, live.base.device, live.base.dtype
        self._live = _states(live.stack.base, self._examples, self._device)
        self._sums: dict[tuple[str, str], np.ndarray] = {}  # over each conversation's tokens
        self.numbers: dict[str, dict[str, Interval]] = {}
        self.logps: dict[str, LogpDifference] = {}

    @torch.no_grad()
    def add(self, way: Way, folder: str | Path) -> None:
        """Measure a folder that was merged that way."""
        gc.collect()  # the model before this one
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        with open_folder(folder, self._device, self._dtype) as model:
            found = _compare(self._live, _states(model, self._examples, self._device), self._targets)
            del model
        rows = self.rows
        kl, same, live, merged = torch.stack([values.sum(1) for values in found], dim=1).numpy()
        self._sums |= {("live", "loss"): -live, (way, "kl"): kl, (way, "top1_agreement"): same}
        self._sums |= {(way, "loss"): -merged, (way, "loss_minus_live"): live - merged}
        self.logps[way] = compare_logps([values[2] for values in found[:rows]], [values[3] for values in found[:rows]])
        if len(self.logps) == 2:
            self._sums["base_minus_nf4", "loss"] = self._sums["base", "loss"] - self._sums["nf4", "loss"]
        self.numbers = {}
        for prefix, part in (("", slice(rows)), ("trained_", slice(rows, None)))[: 1 + bool(self.trained)]:
            sums = {key: (total[part], self._counts[part]) for key, total in self._sums.items()}
            for (name, key), interval in Bootstrap().intervals(sums).items():
                if not prefix or "loss" in key:
                    self.numbers.setdefault(name, {})[prefix + key] = interval

    def as_dict(self) -> dict[str, Any]:
        """For zephyr_lite.json, key ``measured``."""
        told: dict[str, Any] = {
            name: {key: asdict(interval) for key, interval in numbers.items()} for name, numbers in self.numbers.items()
        }
        for way, gap in self.logps.items():
            told[way] |= {"mean_abs_logp_difference": gap.mean, "max_abs_logp_difference": gap.max}
        data = {"origin": self.origin, "rows": self.rows, "supervised_tokens": self.tokens}
        return {"data": data, "bootstrap": Bootstrap().as_dict(), **told}

    def live_line(self) -> str:
        """The live stack's loss, for the console."""
        numbers = self.numbers["live"]
        rows = f"{counted(self.rows, 'held-out conversation')} ({self.origin})"
        if self.lost is not None:
            rows = f"{counted(self.rows, 'conversation')} of zephyr-lite's demo, since none of its own are held out"
        told = f"loss as trained: {numbers['loss'].value:.3f}, on {rows}"
        if self.trained:
            told += f"; {numbers['trained_loss'].value:.3f}, on {counted(self.trained, 'trained one')}"
        return told

    def line(self, way: Way) -> str:
        """A folder's loss, for the console."""
        numbers = self.numbers[way]
        told = f"merged onto {NAMES[way]}: {numbers['loss'].value:.3f} ({numbers['loss_minus_live'].text('+.3f')})"
        if self.trained:
            gap = numbers["trained_loss_minus_live"].text("+.3f")
            told += f"; {numbers['trained_loss'].value:.3f} ({gap}) on the trained ones"
        return told

    def is_worse(self, way: Way) -> bool:
        """Whether a folder has a higher loss than the live stack, on the held-out conversations or the trained ones."""
        return any(
            (gap.value if gap.low is None else gap.low) > 0  # of one conversation there is no interval
            for key, gap in self.numbers[way].items()
            if key.endswith("loss_minus_live")
        )

    def closeness(self, way: Way) -> str:
        """How close a folder is to the live stack, for the console."""
        gap, kl, same = self.logps[way].mean, self.numbers[way]["kl"].value, self.numbers[way]["top1_agreement"].value
        return f"--onto {way}: mean |Δ log p| {gap:.2e}, KL {kl:.2e} nats, same top token {same:.2%}"


# the states [N_i, D] on the CPU that each example's targets are predicted from, and the head: [n, D] → logits [n, V]
States = tuple[list[Tensor], Callable[[Tensor], Tensor]]


def _states(model: Any, examples: list[Example], device: torch.device) -> States:
    """By the model's own forward pass, for live and merged alike, so that only the weights differ.

    Other architectures than the fused engine's may change their logits after the head: of those the logits are kept.
    """
    known = model.config.model_type in FAMILIES
    result: list[Tensor] = []
    for start in range(0, len(examples), BATCH):
        group = examples[start : start + BATCH]
        ids = [torch.from_numpy(example.ids.astype(np.int64)) for example in group]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True),  # on the right, which causal attention never reads
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        inputs = {name: value.to(device) for name, value in inputs.items()}
        outputs = model.model(**inputs, use_cache=False) if known else model(**inputs, use_cache=False)
        states = outputs.last_hidden_state if known else outputs.logits
        for row, example in enumerate(group):
            places = torch.from_numpy(np.flatnonzero(example.mask[1:])).to(states.device)
            result.append(states[row][places].cpu())
    head = model.get_output_embeddings() if known else torch.nn.Identity()
    return result, lambda states: head(states.to(device))


def _compare(live: States, merged: States, targets: list[Tensor]) -> list[Tensor]:
    """Of each example [4, N_i] float64: KL; 1 where the top token is the same; log p of the target, live and merged."""
    found = []
    for *states, ids in zip(live[0], merged[0], targets):
        parts = []
        for one, other, at in zip(*(tensor.split(CHUNK) for tensor in (*states, ids[:, None]))):
            p, q = live[1](one).double().log_softmax(-1), merged[1](other).double().log_softmax(-1)
            kl, same, at = (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1), at.to(p.device)
            parts.append(torch.stack([kl, same.double(), p.gather(1, at)[:, 0], q.gather(1, at)[:, 0]]).cpu())
        found.append(torch.cat(parts, dim=1))
    return found


@contextmanager
def open_folder(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    memory: int | None = None,
) -> Iterator[Any]:
    """A model folder, loaded with plain transformers, for as long as the block runs.

    Layers that do not fit in the free memory stay on the disk (accelerate's offload).

    Args:
        device: where to compute.
        dtype: to load in.
        memory: most bytes to use; None: all that is free.
    """
    device = torch.device(device)
    limits: dict[int | str, int] = {"cpu": psutil.virtual_memory().available if memory is None else memory}
    if device.type == "cuda":
        limits[device.index or 0] = torch.cuda.mem_get_info(device)[0] if memory is None else memory
    # a fifth is for activations, logits and the loader's own copies
    limits = {place: int(size * 0.8) for place, size in limits.items()}
    with tempfile.TemporaryDirectory(prefix="zephyr-lite-") as offload:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            device_map="auto",
            max_memory=limits,
            offload_folder=offload,
        ).eval()
        yield model
        del model
