"""The merged folder compared with the live stack, on held-out conversations.

Merged onto NF4's weights, the folder equals the live stack up to rounding: KL is near zero, whichever model is better. Merged
onto the 16-bit base it differs, since the base's own rounding is undone. The held-out loss tells which of the two is better.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import ChatTemplate, Example
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..evaluate.bootstrap import Bootstrap, Interval, Ratio
from ..evaluate.rows import held_out
from ..model.chain import Chain
from ..model.families import FAMILIES
from ..model.loaded import live_of

logger = logging.getLogger(__name__)

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

    def line(self) -> str:
        """For the console."""
        return f"merged against live, {self.tokens} tokens: mean |Δ log p| {self.mean:.2e}, largest {self.max:.2e}"


def compare_logps(live: Sequence[Tensor], merged: Sequence[Tensor]) -> LogpDifference:
    """The difference of two lists of per-token log-probabilities, row by row of the same shape [T - 1].

    Raises:
        ValueError: the lists are not of the same rows, or are empty.
    """
    if [x.shape for x in live] != [x.shape for x in merged] or not live:
        raise ValueError("the two lists hold different rows, or none")
    gaps = (torch.cat(list(live)).float().cpu() - torch.cat(list(merged)).float().cpu()).abs()
    return LogpDifference(float(gaps.mean()), float(gaps.max()), gaps.numel())


@dataclass
class MergeMeasure:
    """The live stack and the folders merged from it, on the same supervised tokens. Intervals are over conversations.

    Attributes:
        origin: where the rows come from.
        rows, tokens: conversations, and supervised tokens in them.
        live: loss of the live stack, nats per token.
        ways: "base", "nf4" → kl: KL(live ‖ merged) over the whole vocabulary, nats per token; top1_agreement: share of
            tokens with the same most likely token; loss: of the merged folder; loss_minus_live: over the same draws.
        logps: way → |Δ log p| of the target tokens.
        between: loss of base minus loss of nf4, where both were measured.
        missing: way → reason why it was not measured.
    """

    origin: str
    rows: int
    tokens: int
    live: Interval
    bootstrap: Bootstrap
    ways: dict[str, dict[str, Interval]]
    logps: dict[str, LogpDifference]
    between: Interval | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For zephyr_lite.json, key ``measured``."""
        told: dict[str, Any] = {
            "data": {"origin": self.origin, "rows": self.rows, "supervised_tokens": self.tokens},
            "bootstrap": self.bootstrap.as_dict(),
            "live": {"loss": asdict(self.live)},
            "base_minus_nf4": None if self.between is None else {"loss": asdict(self.between)},
            "missing": self.missing,
        }
        for name, way in self.ways.items():
            told[name] = {key: asdict(interval) for key, interval in way.items()}
            told[name]["mean_abs_logp_difference"] = self.logps[name].mean
            told[name]["max_abs_logp_difference"] = self.logps[name].max
        return told

    def lines(self) -> list[str]:
        """For the console."""
        told = [f"on {self.tokens:,} supervised tokens of {self.rows:,} conversations ({self.origin}):"]
        told.append(f"live: held-out loss {self.live.text()}")
        for name, way in self.ways.items():
            told.append(
                f"--onto {name}: KL(live ‖ merged) {way['kl'].value:.2e} nats a token, the same top token at "
                f"{way['top1_agreement'].value:.2%}, held-out loss {way['loss'].text()} "
                f"({way['loss_minus_live'].text('+.4f')} to live)"
            )
        told += [f"--onto {name}: not measured: {why}" for name, why in self.missing.items()]
        if (gap := self.between) is not None:
            better = f"--onto {'base' if gap.value < 0 else 'nf4'} is the better model on these rows"
            if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
                better = "these rows do not tell the two apart; base is the default"
            told.append(f"loss of base minus nf4 {gap.text('+.4f')}: {better}")
        return told


@torch.no_grad()
def measure(chain: Chain, folders: Mapping[str, str | Path], *, rows: int = CHECK_ROWS) -> MergeMeasure:
    """Compare merged folders with the live stack, one after the other: never two models in memory.

    The rows are the chain's held-out conversations, or the demo's if those cannot be read. Of the live stack only the last
    hidden states are kept, so that no [tokens, vocabulary] is ever held.

    Args:
        folders: "base" and/or "nf4" → a folder merged that way.
        rows: most conversations.

    Raises:
        UserError: the base or an adapter is not the one that the chain's stage was trained with.
    """
    live = live_of(chain, chat_template="auto")
    data, origin = _rows(chain, live.template, rows)
    examples = list(data.examples)
    targets = [torch.from_numpy(e.ids[1:][e.mask[1:]].astype(np.int64)) for e in examples]
    tokens = np.array([len(t) for t in targets], dtype=np.float64)
    device, dtype = live.base.device, live.dtype
    live_states = _states(live.stack.base, examples, device)
    del live
    ratios: dict[str, Ratio] = {}
    logps: dict[str, LogpDifference] = {}
    for name in sorted(folders):
        gc.collect()  # the model before this one
        if device.type == "cuda":
            torch.cuda.empty_cache()
        with open_folder(folders[name], device, dtype) as model:
            found = _compare(live_states, _states(model, examples, device), targets)
            del model
        kl, same, at_live, at_merged = (np.array([float(t.sum()) for t in values]) for values in found)
        ratios |= {"live": (-at_live, tokens), f"{name} kl": (kl, tokens), f"{name} top1_agreement": (same, tokens)}
        ratios |= {f"{name} loss": (-at_merged, tokens), f"{name} loss_minus_live": (at_live - at_merged, tokens)}
        logps[name] = compare_logps(found[2], found[3])
    if len(logps) == 2:
        ratios["between"] = (ratios["base loss"][0] - ratios["nf4 loss"][0], tokens)
    bootstrap = Bootstrap()
    intervals = bootstrap.intervals(ratios)
    keys = ("kl", "top1_agreement", "loss", "loss_minus_live")
    return MergeMeasure(
        origin=origin,
        rows=len(tokens),
        tokens=int(tokens.sum()),
        live=intervals["live"],
        bootstrap=bootstrap,
        ways={name: {key: intervals[f"{name} {key}"] for key in keys} for name in logps},
        logps=logps,
        between=intervals.get("between"),
    )


def _rows(chain: Chain, template: ChatTemplate, limit: int) -> tuple[TokenizedDataset, str]:
    """The held-out conversations, and where they come from."""
    try:
        found = held_out(chain, template, "sft", limit=limit, max_length=MAX_TOKENS)
        return found.data, found.origin
    except (UserError, OSError) as error:
        logger.info(f"no held-out conversations of the chain's own ({str(error).splitlines()[0]}); taking the demo's")
    specs = [DatasetSpec(path=str(DEMO_ROWS), limit=limit)]
    data = prepare(specs, "sft", RunConfig(max_length=MAX_TOKENS), template, what="held-out")
    return data, "the demo's conversations"


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


def _compare(live: States, merged: States, targets: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Per token, of each example [N_i] float64: KL; 1 where the top token is the same; log p of the target, live and merged."""
    found = []
    for *states, ids in zip(live[0], merged[0], targets):
        parts = []
        for one, other, at in zip(*(tensor.split(CHUNK) for tensor in (*states, ids[:, None]))):
            p, q = live[1](one).float().log_softmax(-1), merged[1](other).float().log_softmax(-1)
            at = at.to(p.device)
            values = (_kl(p, q), p.argmax(-1) == q.argmax(-1), p.gather(1, at)[:, 0], q.gather(1, at)[:, 0])
            parts.append([value.double().cpu() for value in values])
        found.append([torch.cat(values) for values in zip(*parts)])
    return tuple(map(list, zip(*found)))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[n] from log-probabilities [n, V]: Σ p (log p - log q) - p + q, the same sum with no term below zero, so that rounding
    does not give a negative divergence where the two are nearly equal."""
    gap, weight = p - q, p.exp()
    near = weight * (gap + torch.expm1(-gap.clamp(-1, 1)))
    terms = torch.where(gap.abs() < 0.1, near, weight * gap - weight + q.exp())
    return terms.clamp_min(0).sum(-1)


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
