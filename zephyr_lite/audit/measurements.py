"""Checks that need the model: the template, the adapters below, the end token, BOS, and DPO's step 0."""

from __future__ import annotations

import torch

from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..data.formats import RowError
from ..errors import UserError
from ..evaluate.likelihood import row_logps
from .files import LN2
from .measured import Messages, RowSums, StepZero, examples_of, gap, row_sums, step_zero, with_bos
from .subject import Subject
from .verdict import Audit

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


def check_rows(subject: Subject, templates: dict[str, ChatTemplate], rows: list[Messages], found: Audit) -> None:
    """Check on conversations: the template, then with it the adapters below, the end token and BOS."""
    name = _check_template(subject, templates, rows, found)
    template = templates[name]
    examples = examples_of(template, rows)
    models = {"base": [], "start": subject.start, "below": subject.below, "policy": subject.policy}
    if subject.policy[:-1]:
        models["alone"] = subject.policy[-1:]
    measured = {
        adapters: row_sums(subject.decoder(adapters), examples, template.end_token_ids)
        for adapters in {tuple(adapters) for adapters in models.values()}
    }
    sums = {model: measured[tuple(adapters)] for model, adapters in models.items()}
    found.numbers["rows"] = {
        model: {"loss": s.loss, "end_token_median": s.end_probability} for model, s in sums.items()
    }
    found.numbers["rows"] |= {"count": len(examples), "template": name}
    _check_below(sums, found)
    _check_end(sums, template, found)
    _check_bos(subject, template, rows, sums, found)


def check_pairs(subject: Subject, data: TokenizedDataset, beta: float, found: Audit) -> None:
    """Check on preference pairs: DPO's loss before its first step, against the claimed and other references."""

    def sums(names: list[str]) -> torch.Tensor:
        return row_logps(subject.decoder(names), data).sums

    policy, start = sums(subject.policy), sums(subject.start)
    results: dict[str, StepZero] = {}
    identical = []  # references that are the start itself
    for name, names in subject.references.items():
        reference = start if names == subject.start else sums(names)
        if torch.equal(reference, start):
            identical.append(name)
        results[name] = step_zero(start, policy, reference, beta)
    found.numbers["pairs"] = {name: vars(result) for name, result in results.items()} | {"beta": beta}
    started = subject.called(subject.start)
    labels = {"start": f"what it started from ({started})", "base": "the bare base"}
    facts = [
        f"against {labels.get(name, name)}: step 0 at {r.loss:.6f}, now accuracy {r.accuracy:.3f} ± "
        f"{r.accuracy_error:.3f}, margin {r.margin:+.3f} ({r.pairs} pairs, β {beta:g})"
        for name, r in results.items()
    ]
    claimed, label = results[subject.claimed], labels.get(subject.claimed, subject.claimed)
    documented = subject.evidence.stage is not None and found.method == "dpo"  # stage.json names the start
    if subject.claimed in identical and not documented:
        found.note(
            "reference",
            f"step 0 is ln 2 by definition: {started} is taken for both what it started from and its reference",
            *facts,
            advice="Only the trainer's log shows whether both were that; set --start or --below, and --reference, otherwise.",
        )
    elif abs(claimed.loss - LN2) <= 1e-6:
        found.right("reference", f"step 0 is ln 2 against {label}", *facts)
    else:
        found.wrong(
            "reference",
            f"step 0 is {claimed.loss:.4f} against {label}, not ln 2 ({LN2:.4f}): training did not start from its reference",
            *facts,
            advice="Train it again with what the policy starts from as the reference (zephyr-lite dpo does).",
        )
    if found.method == "dpo" and claimed.accuracy + 2 * claimed.accuracy_error < 0.5:
        advice = "Another reference, other pairs, or swapped columns."
        found.doubtful("reference", "against that reference it prefers the rejected answers", advice=advice)


def _check_template(subject: Subject, templates: dict[str, ChatTemplate], rows: list[Messages], found: Audit) -> str:
    """The name of the template to measure with: its own, or the one that fits best."""
    texts: dict[str, str] = {}
    for name, template in list(templates.items()):
        try:
            text = template.text_of(_QUESTION)
        except RowError:
            del templates[name]
            continue
        if text in texts.values():
            if name == "base" and texts.get("own") == text:
                found.right("template", "its chat template writes what the base's does")
            del templates[name]
        else:
            texts[name] = text
    if "own" in texts and "base" in texts:
        shown = [f"{name} {texts[name]!r}" for name in ("own", "base")]
        found.note("template", "its chat template differs from the base's", *shown)
    sums: dict[str, tuple[RowSums, RowSums]] = {}  # with the adapter, and below it
    for name, template in templates.items():
        try:
            examples = examples_of(template, rows)
        except UserError:
            continue
        with_it, below = (
            row_sums(subject.decoder(names), examples, template.end_token_ids)
            for names in (subject.policy, subject.below)
        )
        sums[name] = with_it, below
    if not sums:
        raise UserError(
            "no chat template can render these conversations.", "Name others with --rows or --chat-template."
        )
    found.numbers["templates"] = {name: {"loss": s.loss, "below": below.loss} for name, (s, below) in sums.items()}
    facts = tuple(f"{name}: {s.loss:.4f} nats a token (below it {below.loss:.4f})" for name, (s, below) in sums.items())
    best = min(sums, key=lambda name: sums[name][0].loss)
    if "own" not in sums:
        found.note("template", f"of the known templates {best} fits it best", *facts)
        return best
    (of, of_below), (own, own_below) = sums[best], sums["own"]
    if best != "own" and len(of.text) == len(own.text):
        # the template of training is the one with which the adapter gained most
        change = gap(of, own, (of_below, own_below))
        if change.clear and change.mean > OTHER_TEMPLATE and gap(of, own).clear:
            found.doubtful(
                "template",
                f"it answers better under the template {best} than under its own: it was probably trained with that",
                *facts,
                f"{best} gains over its own by what the adapter changed: {change}",
                advice=f"Compare the two; --chat-template {best} measures everything under that one.",
            )
            return "own"
    text = "no other template fits it better than its own"
    if best != "own":
        text = f"nothing says that it was trained with another than its own, although {best} has the lower loss"
    found.right("template", text, *facts)
    return "own"


def _check_below(sums: dict[str, RowSums], found: Audit) -> None:
    names = {id(s): name for name, s in reversed(sums.items())}  # the first name of models that are the same
    facts = [f"{_MODELS[name]}: {s.loss:.4f} nats a token" for name, s in sums.items() if names[id(s)] == name]
    base, policy = sums["base"], sums["policy"]
    if "alone" in sums:
        lost = gap(policy, sums["alone"])
        if lost.clear:
            found.right("below", "on the bare base it does worse than on the adapters below it", *facts, f"by {lost}")
        elif gap(sums["alone"], policy).clear:
            text = "it does better on the bare base: the adapters given with --below probably were not below it"
            found.doubtful("below", text, *facts, advice="Leave --below out, or name another.")
        else:
            found.note("below", "these conversations do not show whether an adapter was below it", *facts)
        return
    worse = gap(base, policy)
    if worse.clear:
        text = "with it conversations become less likely than on the bare base"
        if found.method == "sft":
            advice = "Is this its base? Does an adapter belong below it (--below)?"
            found.doubtful("below", text, *facts, f"by {worse}", advice=advice)
        else:
            found.note("below", f"{text}, as DPO may do", *facts, f"by {worse}")
    elif gap(policy, base).clear:
        found.right("below", "it makes conversations likelier than the bare base does", *facts)
    else:
        text = "with it these conversations are neither clearly likelier nor less likely than on the bare base"
        found.note("below", text, *facts, advice="Does an adapter belong below it (--below)?")


def _check_end(sums: dict[str, RowSums], template: ChatTemplate, found: Audit) -> None:
    policy, base = sums["policy"].end_probability, sums["base"].end_probability
    if policy is None or base is None:
        found.note("end", "no answer of these conversations ended within the measured tokens")
        return
    names = ", ".join(template.tokenizer.convert_ids_to_tokens(template.end_token_ids))
    facts = [f"median probability of {names} after an answer: {policy:.3f}; on the bare base {base:.3f}"]
    if policy < NEVER:
        if template.tokenizer.pad_token_id in template.end_token_ids:
            facts.append("the pad token is the end token: a collator that masks padding masks every end, too")
        advice = "Does an adapter belong below it (--below)? Else train again with the end token supervised."
        text = "it never learned to end an answer: generation runs until it is cut off"
        found.wrong("end", text, *facts, advice=advice)
    elif policy < HARDLY:
        found.doubtful("end", "it has hardly learned to end an answer", *facts)
    else:
        found.right("end", "it ends its answers", *facts)


def _check_bos(
    subject: Subject, template: ChatTemplate, rows: list[Messages], sums: dict[str, RowSums], found: Audit
) -> None:
    tokenizer = template.tokenizer
    bos = tokenizer.bos_token_id
    text = template.text_of(_QUESTION)
    right = int(template.bos_token_id is not None)
    written = list(tokenizer(text, add_special_tokens=False)["input_ids"]).count(bos)
    if bos is None or bos == tokenizer.eos_token_id or written > right:
        # SmolLM2's and Qwen's BOS is <|im_start|>, which begins every turn
        found.right("bos", "it has no BOS apart from the tokens of its turns, so none can be doubled")
        return
    again = next((n for n, token in enumerate(tokenizer(text)["input_ids"]) if token != bos), 0)
    examples, ends = examples_of(template, rows), template.end_token_ids
    facts, better_by = [], {}
    for count in {0, 1, 2} - {right}:
        changed = [with_bos(example, bos, count) for example in examples]
        policy = row_sums(subject.decoder(subject.policy), changed, ends)
        below = row_sums(subject.decoder(subject.below), changed, ends)
        change, better = gap(policy, sums["policy"], (below, sums["below"])), gap(policy, sums["policy"])
        facts.append(f"BOS {count} times instead of {right}: {better} (changed by the adapter: {change})")
        if change.clear and better.clear:
            better_by[count] = better.mean
    found.numbers["bos"] = {"right": right, "tokenized_again": again}
    if better_by:
        times = ("without BOS", "with BOS", "with BOS twice")[max(better_by, key=lambda count: better_by[count])]
        advice = "Train it again on rows with BOS once, or serve it as it was trained."
        found.doubtful("bos", f"it does better {times}: it was probably trained so", *facts, advice=advice)
    else:
        found.right("bos", f"BOS is {'written once' if right else 'never written'}, as in training", *facts)
    if again > 1:
        text = f"its template writes BOS, and its tokenizer adds another: tokenizing the rendered text gives {again}"
        found.note("bos", text, advice="Use apply_chat_template(tokenize=True), or add_special_tokens=False.")
