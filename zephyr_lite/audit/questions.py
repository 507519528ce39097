"""The questions that only the model can answer: what lies below, BOS, the end token, the template, step 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..data.formats import RowError
from ..errors import UserError
from ..evaluate.likelihood import pair_logps
from .files import LN2
from .measured import (
    Messages,
    RowSums,
    StepZero,
    change_of_gap,
    examples_of,
    gap,
    row_sums,
    step_zero,
    with_bos,
)
from .subject import Subject
from .verdict import Audit, Level

Say = Callable[[str], None]
# of the end token's median probability after an answer: below the first it was not learned, below the second hardly
NEVER, HARDLY = 0.02, 0.1
# nats a token by which another template has to be the better one
OTHER_TEMPLATE = 0.02
_MODELS = {
    "base": "the bare base",
    "start": "what it started from",
    "below": "what lies below it",
    "policy": "with it",
    "alone": "it alone on the bare base",
}
_QUESTION: Messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]


def ask_rows(
    subject: Subject, templates: dict[str, ChatTemplate], rows: list[Messages], found: Audit, say: Say
) -> None:
    """On conversations: the template, then, under the right one, what lies below, BOS and the end token."""
    say(f"measuring {len(rows)} conversations under {len(templates)} templates")
    name = _template(subject, templates, rows, found)
    template = templates[name]
    examples, ends = examples_of(template, rows), template.end_token_ids
    models = {"base": [], "start": subject.start, "below": subject.below, "policy": subject.policy}
    if subject.policy[:-1]:
        models["alone"] = subject.policy[-1:]
    sums: dict[str, RowSums] = {}
    done: dict[tuple[str, ...], RowSums] = {}
    for model, names in models.items():
        key = tuple(names)
        if key not in done:
            done[key] = row_sums(subject.decoder(names), examples, ends)
        sums[model] = done[key]
    found.numbers["rows"] = {model: {"loss": s.loss, "end_token_median": _median(s)} for model, s in sums.items()} | {
        "count": len(examples),
        "template": name,
    }
    _below(subject, sums, found)
    _end(sums, template, found)
    _bos(subject, template, rows, sums, found)


def ask_pairs(subject: Subject, data: TokenizedDataset, beta: float, found: Audit, say: Say) -> None:
    """On preference pairs: DPO's loss before its first step, against the claimed reference and the other candidates."""
    say(f"measuring {len(data.lengths)} pairs")

    def sums(names: list[str]) -> torch.Tensor:
        return pair_logps(subject.decoder(names), data).sums

    policy, start = sums(subject.policy), sums(subject.start)
    results: dict[str, StepZero] = {}
    itself: list[str] = []  # references that are the very model that it is said to have started from
    for name, names in subject.references.items():
        reference = start if names == subject.start else sums(names)
        if torch.equal(reference, start):
            itself.append(name)
        results[name] = step_zero(start, policy, reference, beta)
    found.numbers["pairs"] = {name: vars(result) for name, result in results.items()} | {"beta": beta}
    started = subject.called(subject.start)
    told = [
        f"against {_called(name, started)}: step 0 at {r.loss:.6f}, now accuracy {r.accuracy:.3f} ± "
        f"{r.accuracy_error:.3f}, margin {r.margin:+.3f} ({r.pairs} pairs, β {beta:g})"
        for name, r in results.items()
    ]
    claimed = results[subject.claimed]
    ours = subject.evidence.stage is not None and found.method == "dpo"  # whose stage.json tells what it started from
    if subject.claimed in itself and not ours:
        # a model against itself: true of any adapter, so that it is no evidence
        found.add(
            "reference",
            Level.note,
            f"step 0 is ln 2 by definition: {started} is taken for both what it started from and its reference",
            *told,
            advice="Whether both were that, only the trainer's log shows; --start or --below, and --reference, say "
            "otherwise.",
        )
    elif abs(claimed.loss - LN2) <= 1e-6:
        found.add("reference", Level.right, f"step 0 is ln 2 against {_called(subject.claimed, started)}", *told)
    else:
        found.add(
            "reference",
            Level.wrong,
            f"step 0 is {claimed.loss:.4f} against {_called(subject.claimed, started)}, not ln 2 ({LN2:.4f}): "
            "training did not start from its reference",
            *told,
            advice="Train it again with what the policy starts from as the reference (zephyr-lite dpo does).",
        )
    if found.method == "dpo" and claimed.accuracy + 2 * claimed.accuracy_error < 0.5:
        found.add(
            "reference",
            Level.doubtful,
            "against that reference it prefers the rejected answers",
            advice="Another reference, other pairs, or swapped columns.",
        )


def _called(name: str, started: str) -> str:
    return {"start": f"what it started from ({started})", "base": "the bare base"}.get(name, name)


def no_other_template(best: str) -> str:
    """What is said of an adapter that belongs to its own template, where `best` has the lowest loss."""
    if best == "own":
        return "no other template fits it better than its own"
    return f"nothing says that it was trained with another than its own, although {best} has the lower loss"


def _template(subject: Subject, templates: dict[str, ChatTemplate], rows: list[Messages], found: Audit) -> str:
    """The template to go on with: its own, or the one that fits best where it has none."""
    texts: dict[str, str] = {}
    for name, template in list(templates.items()):
        try:
            text = template.text_of(_QUESTION)
        except RowError:
            del templates[name]
            continue
        if text in texts.values():
            same = next(other for other, known in texts.items() if known == text)
            if name == "base" and same == "own":
                found.add("template", Level.right, "its chat template writes what the base's does")
            del templates[name]
        else:
            texts[name] = text
    if not templates:
        raise UserError("no chat template can be rendered.", "Name one with --chat-template.")
    if "own" in texts and "base" in texts:
        found.add(
            "template",
            Level.note,
            "its chat template is another than the base's",
            f"own {texts['own']!r}",
            f"base {texts['base']!r}",
        )
    with_it: dict[str, RowSums] = {}
    without: dict[str, RowSums] = {}
    for name, template in templates.items():
        try:
            examples = examples_of(template, rows)
        except UserError:
            continue
        with_it[name] = row_sums(subject.decoder(subject.policy), examples, template.end_token_ids)
        without[name] = row_sums(subject.decoder(subject.below), examples, template.end_token_ids)
    if not with_it:
        raise UserError("no chat template can render these conversations.", "Name others with --rows.")
    found.numbers["templates"] = {n: {"loss": s.loss, "below": without[n].loss} for n, s in with_it.items()}
    told = [f"{n}: {s.loss:.4f} nats a token (below it {without[n].loss:.4f})" for n, s in with_it.items()]
    # the template that training used is the one under which the adapter gained most
    best = min(with_it, key=lambda n: with_it[n].loss)
    if "own" not in with_it:
        found.add("template", Level.note, f"of the known templates {best} fits it best", *told)
        return best
    if best != "own" and len(with_it[best].text) == len(with_it["own"].text):
        change = change_of_gap(with_it[best], with_it["own"], without[best], without["own"])
        if change.clear and change.mean > OTHER_TEMPLATE and gap(with_it[best], with_it["own"]).clear:
            found.add(
                "template",
                Level.doubtful,
                f"it answers better under the template {best} than under its own: it was probably trained with that",
                *told,
                f"{best} gains over its own by what the adapter changed: {change}",
                advice=f"Compare the two; --chat-template {best} measures everything under that one.",
            )
            return "own"
    found.add("template", Level.right, no_other_template(best), *told)
    return "own"


def _below(subject: Subject, sums: dict[str, RowSums], found: Audit) -> None:
    told = list({id(s): f"{_MODELS[name]}: {s.loss:.4f} nats a token" for name, s in reversed(sums.items())}.values())[
        ::-1
    ]
    if "alone" in sums:
        lost = gap(sums["policy"], sums["alone"])
        if lost.clear:
            found.add(
                "below", Level.right, "on the bare base it does worse than on what lies below it", *told, f"by {lost}"
            )
        elif gap(sums["alone"], sums["policy"]).clear:
            found.add(
                "below",
                Level.doubtful,
                "it does better on the bare base: what is given as below probably was not",
                *told,
                advice="Leave --below out, or name another.",
            )
        else:
            found.add("below", Level.note, "these conversations do not tell whether something lay below it", *told)
        return
    worse = gap(sums["base"], sums["policy"])
    if worse.clear and found.method == "sft":
        found.add(
            "below",
            Level.doubtful,
            "with it conversations become less likely than on the bare base",
            *told,
            f"by {worse}",
            advice="Is this its base? Does an adapter belong below it (--below)?",
        )
    elif worse.clear:
        found.add(
            "below",
            Level.note,
            "with it conversations become less likely than on the bare base, as DPO may do",
            *told,
            f"by {worse}",
        )
    elif gap(sums["policy"], sums["base"]).clear:
        found.add("below", Level.right, "it makes conversations likelier than the bare base does", *told)
    else:
        found.add(
            "below",
            Level.note,
            "with it these conversations are neither clearly likelier nor less likely than on the bare base",
            *told,
            advice="Does an adapter belong below it (--below)?",
        )


def _end(sums: dict[str, RowSums], template: ChatTemplate, found: Audit) -> None:
    policy, base = _median(sums["policy"]), _median(sums["base"])
    if policy is None or base is None:
        found.add("end", Level.note, "no answer of these conversations ended within what was measured")
        return
    names = ", ".join(template.tokenizer.convert_ids_to_tokens(template.end_token_ids))
    told = f"median probability of {names} after an answer: {policy:.3f}; on the bare base {base:.3f}"
    if policy < NEVER:
        pad = template.tokenizer.pad_token_id in template.end_token_ids
        found.add(
            "end",
            Level.wrong,
            "it never learned to end an answer: it will talk on until it is cut off",
            told,
            *(["the pad token is the end token: a collator that masks padding masks every end, too"] if pad else []),
            advice="Does an adapter belong below it (--below)? Else train again with the end token supervised.",
        )
    elif policy < HARDLY:
        found.add("end", Level.doubtful, "it has hardly learned to end an answer", told)
    else:
        found.add("end", Level.right, "it ends its answers", told)


def _bos(
    subject: Subject, template: ChatTemplate, rows: list[Messages], sums: dict[str, RowSums], found: Audit
) -> None:
    tokenizer = template.tokenizer
    bos = tokenizer.bos_token_id
    text = template.text_of(_QUESTION)
    right = 1 if template.bos_token_id is not None else 0
    written = list(tokenizer(text, add_special_tokens=False)["input_ids"]).count(bos)
    if bos is None or bos == tokenizer.eos_token_id or written > right:
        # ChatML's tokenizers name <|im_start|> as BOS, which begins every turn
        found.add("bos", Level.right, "it has no BOS beside the tokens of its turns, so none can stand twice")
        return
    again = next((n for n, token in enumerate(tokenizer(text)["input_ids"]) if token != bos), 0)
    examples, ends = examples_of(template, rows), template.end_token_ids
    told, better_by = [], {}
    for count in {0, 1, 2} - {right}:
        changed = [with_bos(example, bos, count) for example in examples]
        with_it = row_sums(subject.decoder(subject.policy), changed, ends)
        without = row_sums(subject.decoder(subject.below), changed, ends)
        below = sums["below"]
        change = change_of_gap(with_it, sums["policy"], without, below)
        better = gap(with_it, sums["policy"])
        told.append(f"BOS {count} times instead of {right}: {better} (what the adapter changed of it: {change})")
        if change.clear and better.clear:
            better_by[count] = better.mean
    found.numbers["bos"] = {"right": right, "tokenized_again": again}
    if better_by:
        best = max(better_by, key=lambda count: better_by[count])
        times = {0: "without BOS", 1: "with BOS", 2: "with BOS twice"}[best]
        found.add(
            "bos",
            Level.doubtful,
            f"it does better {times}: it was probably trained so",
            *told,
            advice="Train it again on rows with BOS once, or serve it as it was trained.",
        )
    else:
        found.add("bos", Level.right, f"BOS stands {'once' if right else 'nowhere'}, as it was trained", *told)
    if again > 1:
        found.add(
            "bos",
            Level.note,
            f"its template writes BOS, and its tokenizer adds another: who tokenizes the rendered text gets {again}",
            advice="Use apply_chat_template(tokenize=True), or add_special_tokens=False.",
        )


def _median(sums: RowSums) -> float | None:
    if not len(sums.ends):
        return None
    return math.exp(float(sums.ends.median()))
