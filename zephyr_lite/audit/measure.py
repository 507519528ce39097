"""Checks that need the model: the template, the adapters below, the end token, BOS, and DPO's step 0.

BOS and template are judged by differences of differences, row by row: the effect of a doubled BOS (or of another template) on
the model with the adapter, minus its effect on the model below it. A base may prefer one text to another; training shows in
what the adapter changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import collate_conversations
from ..data.chat_template import ChatTemplate, Example
from ..data.dataset import TokenizedDataset
from ..data.messages import RowError
from ..data.packing import best_fit
from ..errors import UserError
from ..evaluate.likelihood import row_logps
from ..model.loaded import LoadedModel
from .files import LN2, Audit, Level

Messages = list[dict[str, str]]
MICRO_TOKENS = 2048
MAX_TOKENS = 1024  # of a row
# median probability of the end token after an answer: below the first it was not learned, below the second hardly
NEVER, HARDLY = 0.02, 0.1
OTHER_TEMPLATE = 0.02  # nats a token by which another template has to be better
_MODELS = {
    "base": "the bare base",
    "start": "the start of training",
    "below": "without it",
    "policy": "with it",
    "alone": "it alone on the bare base",
}
_QUESTION: Messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


@dataclass(frozen=True)
class RowSums:
    """Log-probabilities of the answers of R conversations, in nats.

    Attributes:
        text: [R] float64, sums over the answers' tokens without end tokens; tokens: [R] float64, their number.
        ends: [E] float64, of every end token.
    """

    text: Tensor
    tokens: Tensor
    ends: Tensor

    @property
    def loss(self) -> float:
        """Nats a token of the answers' text."""
        return float(-self.text.sum() / self.tokens.sum())

    @property
    def end_probability(self) -> float | None:
        """The median probability of the end tokens; None if no answer ends within ``MAX_TOKENS``."""
        return math.exp(float(self.ends.median())) if len(self.ends) else None


class Gap(NamedTuple):
    """A mean difference over rows in nats a token, and its standard error (infinite for a single row)."""

    mean: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether it is above zero by three standard errors and by more than rounding."""
        return self.mean > max(3 * self.error, 0.005)

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f} nats a token"


def gap(of: RowSums, against: RowSums, *below: RowSums) -> Gap:
    """By how much the answers' text costs less in ``of`` than in ``against``.

    Args:
        below: the same two without the adapter; their difference is subtracted.
    """
    means = [sums.text / sums.tokens.clamp(min=1) for sums in (of, against, *below)]
    differences = means[0] - means[1] - (means[2] - means[3] if below else 0)
    n = len(differences)
    return Gap(float(differences.mean()), float(differences.std() / math.sqrt(n)) if n > 1 else math.inf)


def gaps(of: dict[str, RowSums], own: dict[str, RowSums]) -> tuple[Gap, Gap]:
    """By how much the adapter does better on changed rows than on its own, and by how much it changed that difference."""
    rows = of["policy"], own["policy"]
    return gap(*rows), gap(*rows, of["below"], own["below"])


def examples_of(template: ChatTemplate, rows: Sequence[Messages]) -> list[Example]:
    """The rows that a template can render and that have an answer, cut to ``MAX_TOKENS``."""
    found = []
    for place, messages in enumerate(rows):
        with suppress(RowError):
            ids, mask = template.encode(messages)
            if mask[:MAX_TOKENS].any():
                found.append(Example(ids[:MAX_TOKENS], mask[:MAX_TOKENS], "", place))
    return found


@torch.no_grad()
def row_sums(
    live: LoadedModel, template: ChatTemplate, examples: Sequence[Example], models: Sequence[str] = ("policy", "below")
) -> dict[str, RowSums]:
    """{model: sums of each row}; end tokens are separate, as templates have different ones."""
    result = {}
    end_ids = torch.tensor(list(template.end_token_ids))
    for model in models:
        decoder = live.decoder(model)
        text, tokens = torch.zeros(2, len(examples), dtype=torch.float64)
        ends = []
        for group in best_fit([len(example.ids) for example in examples], MICRO_TOKENS):
            batch = collate_conversations([examples[i] for i in group]).to(decoder.device)
            targets = [torch.from_numpy(examples[i].ids[examples[i].mask].astype(np.int64)) for i in group]
            logps = decoder.token_logps(batch).double().cpu().split([len(each) for each in targets])
            for row, own, ids in zip(group, logps, targets):
                is_end = torch.isin(ids, end_ids)
                text[row], tokens[row] = own[~is_end].sum(), float((~is_end).sum())
                ends.append(own[is_end])
        result[model] = RowSums(text, tokens, torch.cat(ends))
    return result


def with_bos(example: Example, bos: int, count: int) -> Example:
    """The row with this many BOS tokens at its start; the first token is never supervised."""
    ids, mask = example.ids, example.mask
    while len(ids) and ids[0] == bos:
        ids, mask = ids[1:], mask[1:]
    ids = np.concatenate([np.full(count, bos, dtype=np.int32), ids])
    mask = np.concatenate([np.zeros(count, dtype=bool), mask])
    mask[:1] = False
    return replace(example, ids=ids, mask=mask)


def check_rows(
    live: LoadedModel, templates: dict[str, ChatTemplate], recorded: bool, rows: list[Messages], found: Audit
) -> None:
    """Check on conversations: the template, then with it the adapters below, the end token and BOS.

    Args:
        live: its models are base, start, below, policy, and alone if there are adapters below.
        templates: own, if it has one, base, and the known ones.
        recorded: stage.json says that it was trained with its own.
    """
    name = _check_template(live, templates, recorded, rows, found)
    template = templates[name]
    examples = examples_of(template, rows)
    sums = row_sums(live, template, examples, [model for model in _MODELS if model in live.models])
    measured = {model: {"loss": s.loss, "end_token_median": s.end_probability} for model, s in sums.items()}
    found.numbers["rows"] = {**measured, "count": len(examples), "template": name}
    _check_below(sums, found)
    _check_end(sums, template, found)
    _check_bos(live, template, examples, sums, found)


def check_pairs(
    live: LoadedModel, data: TokenizedDataset, claimed: str, beta: float, started: str, documented: bool, found: Audit
) -> None:
    """DPO's loss before its first step, against the claimed and other references (Rafailov et al. 2023, arXiv 2305.18290,
    eq. 7).

    Args:
        claimed: the reference: start, base, or another of the models.
        started: the adapters that training started from, in words.
        documented: a stage.json says so.
    """
    policy, start = (row_logps(live.decoder(model), data).sums for model in ("policy", "start"))
    labels = {"start": f"the start of training ({started})", "base": "the bare base"}
    facts, numbers = [], {}
    identical = False  # the claimed reference is the start itself
    for model in dict.fromkeys(("start", "base", claimed)):
        same = live.models[model] == live.models["start"]
        reference = start if same else row_logps(live.decoder(model), data).sums
        identical |= model == claimed and torch.equal(reference, start)
        at_start, now = (beta * ((of - reference) @ torch.tensor([1.0, -1.0]).double()) for of in (start, policy))
        won = (now > 0).double()
        loss, accuracy, margin = float(F.softplus(-at_start).mean()), float(won.mean()), float(now.mean())
        error = float(won.std() / math.sqrt(len(won))) if len(won) > 1 else math.inf
        measured = {"loss": loss, "accuracy": accuracy, "accuracy_error": error, "margin": margin}
        numbers[model] = {**measured, "pairs": len(won)}
        facts.append(
            f"against {labels.get(model, model)}: step 0 at {loss:.6f}, now accuracy {accuracy:.3f} ± {error:.3f}, margin "
            f"{margin:+.3f} ({len(won)} pairs, β {beta:g})"
        )
    found.numbers["pairs"] = {**numbers, "beta": beta}
    result, label = numbers[claimed], labels.get(claimed, claimed)
    if identical and not documented:
        text = f"step 0 is ln 2 by definition: {started} is taken as both the start of training and the reference"
        advice = "Only the trainer's log can show it; name others with --start or --below, and --reference."
        found.note("reference", text, *facts, advice=advice)
    elif abs(result["loss"] - LN2) <= 1e-6:
        found.right("reference", f"step 0 is ln 2 against {label}", *facts)
    else:
        text = f"step 0 is {result['loss']:.4f} against {label}, not ln 2: training started from another model"
        advice = "Train it again with the policy's start as the reference (zephyr-lite dpo does)."
        found.wrong("reference", text, *facts, advice=advice)
    if found.method == "dpo" and result["accuracy"] + 2 * result["accuracy_error"] < 0.5:
        advice = "Another reference, other pairs, or swapped columns."
        found.doubtful("reference", "against that reference it prefers the rejected answers", advice=advice)


def _check_template(
    live: LoadedModel, templates: dict[str, ChatTemplate], recorded: bool, rows: list[Messages], found: Audit
) -> str:
    """The name of the template to measure with: its own, or the one that fits best."""
    texts: list[str] = []
    sums: dict[str, dict[str, RowSums]] = {}
    for name, template in templates.items():
        examples, text = examples_of(template, rows), template.text_of(_QUESTION)
        if examples and text not in texts:
            texts.append(text)
            sums[name] = row_sums(live, template, examples)
    if not sums:
        raise UserError(
            "no chat template can render these conversations.", "Name others with --rows or --chat-template."
        )
    losses = {name: {"loss": of["policy"].loss, "below": of["below"].loss} for name, of in sums.items()}
    found.numbers["templates"] = losses
    facts = [f"{name}: {of['loss']:.4f} nats a token (below it {of['below']:.4f})" for name, of in losses.items()]
    best = min(losses, key=lambda name: losses[name]["loss"])
    if "own" not in sums:
        found.note("template", f"of the known templates {best} fits it best", *facts)
        return best
    better = change = Gap(0.0, math.inf)
    if len(sums[best]["policy"].text) == len(sums["own"]["policy"].text):
        better, change = gaps(sums[best], sums["own"])
    # the template of training is the one with which the adapter gained most
    if better.clear and change.clear and change.mean > OTHER_TEMPLATE:
        facts.append(f"{best} gains over its own by what the adapter changed: {change}")
        text = f"it answers better under the template {best} than under its own"
        if recorded:
            found.note("template", text)
        else:
            advice = f"Compare the two; --chat-template {best} measures everything under that one."
            found.doubtful("template", f"{text}: it was probably trained with that", *facts, advice=advice)
            return "own"
    known = "stage.json records its own as that of its training"
    found.right("template", known if recorded else "no other template fits it clearly better than its own", *facts)
    return "own"


def _check_below(sums: dict[str, RowSums], found: Audit) -> None:
    """Whether conversations show that adapters belong below it: against it alone if some are given, else the bare base."""
    other = "alone" if "alone" in sums else "base"
    facts = [f"{_MODELS[model]}: {s.loss:.4f} nats a token" for model, s in sums.items()]
    gain, loss = gap(sums["policy"], sums[other]), gap(sums[other], sums["policy"])
    where = f"{'on the adapters below it' if other == 'alone' else 'with it'} than with {_MODELS[other]}"
    advice = "Is this its base? Name the adapters that belong below it with --below, and no others."
    if other == "base" and any(
        f.topic == "below" and f.level == Level.right for f in found.findings
    ):  # its files say so
        advice = "Is this its base?" if found.method == "sft" else "This can be so after preference optimization."
    if gain.clear:
        found.right("below", f"conversations are likelier {where}", *facts, f"by {gain}")
    elif loss.clear:
        # DPO may make them less likely
        level = Level.doubtful if other == "alone" or found.method == "sft" else Level.note
        found.add(level, "below", f"conversations are less likely {where}", *facts, f"by {loss}", advice=advice)
    else:
        text = f"conversations are neither clearly likelier nor less likely {where}"
        found.note("below", text, *facts, advice=advice)


def _check_end(sums: dict[str, RowSums], template: ChatTemplate, found: Audit) -> None:
    """Whether it learned to end an answer."""
    policy, base = sums["policy"].end_probability, sums["base"].end_probability
    if policy is None or base is None:
        found.note("end", "no answer of these conversations ended within the measured tokens")
        return
    names = ", ".join(template.tokenizer.convert_ids_to_tokens(template.end_token_ids))
    facts = f"median probability of {names} after an answer: {policy:.3f}; on the bare base {base:.3f}"
    if policy >= HARDLY:
        found.right("end", "it ends its answers", facts)
        return
    level = Level.doubtful if policy >= NEVER else Level.wrong
    text = "it has hardly learned to end an answer: generation runs until it is cut off"
    advice = "Was it trained for a few steps only, or does an adapter belong below it (--below)? Else train again with the end "
    advice += "token supervised; a collator that masks the pad token masks every end if that is the pad token."
    found.add(level, "end", text, facts, advice=advice)


def _check_bos(
    live: LoadedModel, template: ChatTemplate, examples: list[Example], sums: dict[str, RowSums], found: Audit
) -> None:
    """Whether it was trained with BOS as its template writes it."""
    tokenizer = template.tokenizer
    bos = tokenizer.bos_token_id
    text = template.text_of(_QUESTION)
    right = int(template.bos_token_id is not None)
    written = list(tokenizer(text, add_special_tokens=False)["input_ids"]).count(bos)
    if bos is None or bos == tokenizer.eos_token_id or written > right:
        # SmolLM2's and Qwen's BOS is <|im_start|>, which begins every turn
        found.right("bos", "it has no BOS apart from the tokens of its turns, so none can be doubled")
        return
    facts, better_by = [], {}
    for count in {0, 1, 2} - {right}:
        changed = [with_bos(example, bos, count) for example in examples]
        better, change = gaps(row_sums(live, template, changed), sums)
        facts.append(f"BOS {count} times instead of {right}: {better} (changed by the adapter: {change})")
        if change.clear and better.clear:
            better_by[count] = better.mean
    again = next((n for n, token in enumerate(tokenizer(text)["input_ids"]) if token != bos), 0)
    found.numbers["bos"] = {"right": right, "tokenized_again": again}
    if better_by:
        times = ("without BOS", "with BOS", "with BOS twice")[max(better_by, key=lambda count: better_by[count])]
        advice = "Train it again on rows with BOS once, or serve it as it was trained."
        found.doubtful("bos", f"it does better {times}: it was probably trained that way", *facts, advice=advice)
    else:
        found.right("bos", f"BOS is {'written once' if right else 'never written'}, as in training", *facts)
    if again > 1:
        text = f"its template writes BOS, and its tokenizer adds another: tokenizing the rendered text gives {again}"
        found.note("bos", text, advice="Use apply_chat_template(tokenize=True), or add_special_tokens=False.")
