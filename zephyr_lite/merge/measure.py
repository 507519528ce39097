"""What a merge changed, in numbers: the merged folder against the live stack, on held-out conversations.

Merged onto NF4's weights the folder says what the live stack said, up to rounding: KL is near zero by definition, and says
nothing about which is better. Merged onto the 16-bit base it says something else, since the base's own rounding is undone.
Which of the two answers better is what the held-out loss tells.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import ChatTemplate, Example
from ..data.dataset import TokenizedDataset, prepare
from ..demo import CONVERSATIONS_TEST
from ..errors import UserError
from ..evaluate.bootstrap import Bootstrap, Interval, Ratio
from ..evaluate.rows import held_out
from ..model.base import FAMILIES
from ..model.chain import Chain
from ..model.loaded import live_of
from .check import LogpDifference, compare_logps, open_folder

Say = Callable[[str], None]
CHECK_ROWS, MEASURE_ROWS = 8, 64
MAX_TOKENS = 512  # of each row
MICRO_TOKENS = 2048  # run at once, padding included
CHUNK_BYTES = 32 * 2**20  # of one float32 copy of logits
HEADER = ("", "KL (live ‖ merged)", "same top token", "held-out loss", "merged - live")


@dataclass(frozen=True)
class Way:
    """What one way of merging came to. Intervals are over conversations.

    Attributes:
        kl: KL(live ‖ merged) over the whole vocabulary, nats a token.
        agreement: share of tokens at which both find the same token likeliest.
        loss: of the merged folder, nats a token.
        gap: its loss minus the live stack's, over the same draws.
        logps: |Δ log p| of the tokens that stand there.
    """

    kl: Interval
    agreement: Interval
    loss: Interval
    gap: Interval
    logps: LogpDifference

    def as_dict(self) -> dict[str, Any]:
        return {
            "kl": self.kl.as_dict(),
            "top1_agreement": self.agreement.as_dict(),
            "loss": self.loss.as_dict(),
            "loss_minus_live": self.gap.as_dict(),
            "mean_abs_logp_difference": self.logps.mean,
            "max_abs_logp_difference": self.logps.max,
        }


@dataclass
class MergeMeasure:
    """The live stack and folders merged from it, on the same supervised tokens.

    Attributes:
        origin: where the rows come from.
        rows, tokens: conversations, and supervised tokens in them.
        live: its loss.
        ways: "base", "nf4" → what it came to.
        between: loss of base minus loss of nf4, where both are there.
        missing: way → why it was not measured.
    """

    origin: str
    rows: int
    tokens: int
    live: Interval
    bootstrap: Bootstrap
    ways: dict[str, Way] = field(default_factory=dict)
    between: Interval | None = None
    missing: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For zephyr_lite.json, key ``measured``."""
        return {
            "data": {"origin": self.origin, "rows": self.rows, "supervised_tokens": self.tokens},
            "bootstrap": self.bootstrap.as_dict(),
            "live": {"loss": self.live.as_dict()},
            **{name: way.as_dict() for name, way in self.ways.items()},
            "base_minus_nf4": None if self.between is None else {"loss": self.between.as_dict()},
            "missing": self.missing,
        }

    def table(self) -> list[list[str]]:
        """Under ``HEADER``."""
        rows = [["live", "", "", self.live.text(), ""]]
        for name, way in self.ways.items():
            rows.append(
                [
                    f"--onto {name}",
                    f"{way.kl.value:.2e}",
                    f"{way.agreement.value:.2%}",
                    way.loss.text(),
                    way.gap.text("+.4f"),
                ]
            )
        return rows

    def lines(self) -> list[str]:
        """For the console: the same without a table, and what follows from it."""
        told = [f"on {self.tokens:,} supervised tokens of {self.rows:,} conversations ({self.origin}):"]
        told.append(f"live: held-out loss {self.live.text()}")
        for name, way in self.ways.items():
            told.append(
                f"--onto {name}: KL(live ‖ merged) {way.kl.value:.2e} nats a token, the same top token at "
                f"{way.agreement.value:.2%}, held-out loss {way.loss.text()} ({way.gap.text('+.4f')} to live)"
            )
        told += [f"--onto {name}: not measured: {why}" for name, why in self.missing.items()]
        if self.between is not None:
            told.append(self.verdict())
        return told

    def verdict(self) -> str:
        """Which way has the lower held-out loss, if these rows can tell."""
        gap = self.between
        if gap is None:
            return ""
        if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
            return (
                f"loss of base minus nf4 {gap.text('+.4f')}: these rows do not tell the two apart; base is the default"
            )
        better = "base" if gap.value < 0 else "nf4"
        return f"loss of base minus nf4 {gap.text('+.4f')}: --onto {better} is the better model on these rows"


@torch.no_grad()
def measure(
    chain: Chain,
    folders: Mapping[str, str | Path],
    *,
    rows: int = CHECK_ROWS,
    max_tokens: int = MAX_TOKENS,
    bootstrap: Bootstrap | None = None,
    say: Say = lambda line: None,
) -> MergeMeasure:
    """Compare merged folders with the live stack, one after the other: never two models in memory.

    The rows are the chain's held-out conversations; the demo's where those cannot be read. What is kept of the live stack
    is its last hidden states, so that no [tokens, vocabulary] is ever held.

    Args:
        folders: "base" and/or "nf4" → a folder merged that way.
        rows: conversations at most.
        max_tokens: of each.

    Raises:
        UserError: the base or an adapter is not what the chain's stage was trained with.
    """
    live = live_of(chain, chat_template="auto", say=say)
    data, origin = _rows(chain, live.template, rows, max_tokens, say)
    examples = list(data.examples)
    targets = [_targets(example) for example in examples]
    device, dtype = live.base.device, live.dtype
    with ExitStack() as kept:
        kept_live = _states(live.stack.base, examples, device, kept)
        del live
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        sums: dict[str, np.ndarray] = {"tokens": np.array([len(t) for t in targets], dtype=np.float64)}
        logps: dict[str, list[Tensor]] = {}
        for name, folder in folders.items():
            with open_folder(folder, device, dtype) as model, ExitStack() as its:
                found = _compare(kept_live, _states(model, examples, device, its), targets)
                del model
            gc.collect()
            sums |= {f"{name} {key}": np.array([float(t.sum()) for t in found[key]]) for key in ("kl", "same", "logp")}
            logps[name], logps["live"] = found["logp"], found["live"]
    sums["live"] = np.array([float(t.sum()) for t in logps["live"]])
    return _measured(sums, logps, list(folders), origin, bootstrap or Bootstrap())


def _measured(
    sums: dict[str, np.ndarray], logps: dict[str, list[Tensor]], names: list[str], origin: str, bootstrap: Bootstrap
) -> MergeMeasure:
    tokens = sums["tokens"]
    ratios: dict[str, Ratio] = {"live": (-sums["live"], tokens)}
    for name in names:
        logp = sums[f"{name} logp"]
        ratios |= {f"{name} kl": (sums[f"{name} kl"], tokens), f"{name} same": (sums[f"{name} same"], tokens)}
        ratios |= {f"{name} loss": (-logp, tokens), f"{name} gap": (sums["live"] - logp, tokens)}
    both = {"base", "nf4"} <= set(names)
    if both:
        ratios["between"] = (sums["nf4 logp"] - sums["base logp"], tokens)
    found = bootstrap.intervals(ratios)
    ways = {}
    for name in names:
        kl, same, loss, gap = (found[f"{name} {key}"] for key in ("kl", "same", "loss", "gap"))
        ways[name] = Way(kl, same, loss, gap, compare_logps(logps["live"], logps[name]))
    between = found["between"] if both else None
    return MergeMeasure(origin, len(tokens), int(tokens.sum()), found["live"], bootstrap, ways, between)


def _rows(chain: Chain, template: ChatTemplate, limit: int, max_tokens: int, say: Say) -> tuple[TokenizedDataset, str]:
    try:
        found = held_out(chain, template, "sft", limit=limit, max_length=max_tokens)
        return found.data, found.origin
    except (UserError, OSError, ValueError) as error:
        say(f"no held-out conversations of the chain's own ({str(error).splitlines()[0]}); taking the demo's")
    specs = [DatasetSpec(path=str(CONVERSATIONS_TEST), limit=limit)]
    return prepare(
        specs, "sft", RunConfig(max_length=max_tokens), template, what="held-out"
    ), "the demo's conversations"


def _targets(example: Example) -> Tensor:
    """[N] int64, the tokens to be predicted."""
    return torch.from_numpy(example.ids[1:][example.mask[1:]].astype(np.int64))


@dataclass
class _States:
    """Of each example what its targets are predicted from.

    Attributes:
        tensors: [N_i, D] each, on the CPU.
        head: [n, D] → logits [n, V].
    """

    tensors: list[Tensor]
    head: Callable[[Tensor], Tensor]
    device: torch.device


def _states(model: Any, examples: list[Example], device: torch.device, stack: ExitStack) -> _States:
    """By the model's own forward pass, for live and merged alike, so that nothing but the weights differs."""
    known = model.config.model_type in FAMILIES
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    for group in _groups(examples) if known else [[place] for place in range(len(examples))]:
        longest = max(len(examples[i].ids) for i in group)
        ids = torch.zeros(len(group), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(group):  # padded on the right, where causal attention never looks
            ids[row, : len(examples[i].ids)] = torch.from_numpy(examples[i].ids.astype(np.int64))
            mask[row, : len(examples[i].ids)] = 1
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
        hidden = model.model(**inputs).last_hidden_state if known else model(**inputs).logits
        for row, i in enumerate(group):
            places = torch.from_numpy(np.flatnonzero(examples[i].mask[1:]))
            found = hidden[row][places.to(hidden.device)].cpu()
            result[i] = found if known else _on_disk(found, stack)
    if not known:  # what other architectures do to their logits is theirs: the logits themselves are kept
        return _States(result, lambda logits: logits, device)
    return _States(result, model.get_output_embeddings(), device)


def _on_disk(logits: Tensor, stack: ExitStack) -> Tensor:
    """The same numbers, in a file that is mapped and goes with the stack."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zephyr-lite-"))
    kept = torch.from_file(f"{folder}/logits", shared=True, size=logits.numel(), dtype=logits.dtype).view(logits.shape)
    return kept.copy_(logits)


def _groups(examples: list[Example]) -> Iterator[list[int]]:
    """Examples of like length, so that padding is little."""
    group: list[int] = []
    for i in sorted(range(len(examples)), key=lambda i: -len(examples[i].ids)):
        if group and (len(group) + 1) * len(examples[group[0]].ids) > MICRO_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _compare(live: _States, merged: _States, targets: list[Tensor]) -> dict[str, list[Tensor]]:
    """Per token, of each example [N_i] float64: kl, same (1 or 0), and the log-probability of the target in both."""
    found: dict[str, list[Tensor]] = {"kl": [], "same": [], "live": [], "logp": []}
    for one, other, ids in zip(live.tensors, merged.tensors, targets):
        parts: dict[str, list[Tensor]] = {key: [] for key in found}
        start = 0
        size = 1  # until the vocabulary is known
        while start < len(ids):
            here = slice(start, start + size)
            p = live.head(one[here].to(live.device)).float().log_softmax(-1)
            q = merged.head(other[here].to(merged.device)).float().to(p.device).log_softmax(-1)
            at = ids[here, None].to(p.device)
            parts["live"].append(p.gather(1, at)[:, 0].double().cpu())
            parts["logp"].append(q.gather(1, at)[:, 0].double().cpu())
            parts["same"].append((p.argmax(-1) == q.argmax(-1)).double().cpu())
            parts["kl"].append(_kl(p, q).double().cpu())
            start += size
            size = max(1, CHUNK_BYTES // (4 * p.shape[-1]))
        for key, values in parts.items():
            found[key].append(torch.cat(values))
    return found


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """[n] of log-probabilities [n, V]: Σ p (log p - log q) - p + q, which is the same sum, with terms that are none below zero:
    rounding does not add up to a negative divergence where the two are nearly equal."""
    gap, weight = p - q, p.exp()
    near = weight * (gap + torch.expm1(-gap.clamp(-1, 1)))
    terms = torch.where(gap.abs() < 0.1, near, weight * gap - weight + q.exp())
    return terms.clamp_min(0).sum(-1)
