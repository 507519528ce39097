"""``zephyr-lite eval alpaca``: answers to instructions, a judge's verdict on each against the baseline's, a win rate."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ...client.types import Desk, Message, Request, RequestFailed
from ...errors import UserError
from ...io.atomic import make_folder, write_text
from ...recipe.feedback.draw import seed_of
from ...recipe.feedback.estimate import bound_lines, priced
from ...recipe.feedback.files import valid
from ...recipe.feedback.meter import Meter
from ..judged import (
    JUDGE_TRIES,
    Answering,
    Asked,
    Bounds,
    JudgedConfig,
    ask_all,
    chosen_judge,
    judge_request,
    judged_differences,
    judged_settings,
    part,
    refuse_no_judge,
    refuse_unused,
    results_folder,
    slugs,
    who_answers,
    write_judged,
)
from .files import Annotation, Output, read_difficulty, read_outputs
from .judge import is_swapped, judge_messages, read_verdict
from .rates import Alpaca, any_counts, difference, difficulty_of, notes_on, rates

KIND = "alpaca"
COMMAND = f"eval {KIND}"
OUTPUTS, ANNOTATIONS = "model_outputs.json", "annotations.json"
NOTE = (
    "the judge is asked in this project's own words and its verdicts are whole: compare these rates with each other, and "
    "not with AlpacaEval's leaderboard"
)


class AlpacaConfig(JudgedConfig):
    """The keys of --config."""

    instructions: str | None = None  # a file of the baseline's outputs, or a hub id; AlpacaEval's by default
    outputs: str | None = None  # a model's answers that are there already, instead of models that answer
    difficulty: str | None = None  # of the instructions, for the length-controlled rate
    max_new_tokens: int = Field(2048, ge=1)
    temperature: float = Field(0.7, ge=0)  # of an answer, where an endpoint says nothing else
    limit: int | None = Field(None, ge=1)  # so many instructions, by a seeded draw


@dataclass
class Baseline:
    """The instructions, and what their file answers.

    Attributes:
        rows: those that are asked, in the file's order.
        whole: how many the file has.
        given: generator → {instruction's key: answer}, of --outputs.
        difficulty: {a row's place in the file: difficulty}, or None.
        silent: instructions that would be asked, and that --outputs have no answer to.
    """

    rows: list[Output]
    whole: int
    path: Path
    given: dict[str, dict[str, str]] = field(default_factory=dict)
    difficulty: dict[int, float] | None = None
    silent: int = 0

    @property
    def generator(self) -> str:
        return self.rows[0].generator

    def digest(self) -> str:
        """A hash of the instructions that are asked, and of the baseline's answers to them."""
        told = json.dumps([[row.instruction, row.output] for row in self.rows])
        return hashlib.sha256(told.encode()).hexdigest()

    def note(self) -> str:
        missing = f"; --outputs have no answer to {self.silent} others" if self.silent else ""
        return f"{self.path}: {len(self.rows)} of {self.whole} instructions, answered by {self.generator}{missing}"


@dataclass
class Compared:
    """What became of one instruction with one model; ``preference`` is None where ``why`` says so."""

    output: str | None
    preference: float | None
    why: str = ""
    cut: bool = False


def prepare(config: AlpacaConfig) -> tuple[Baseline, Answering, Path]:
    """What is asked, who answers, and where the results go; everything that can be wrong is said here.

    Raises:
        UserError: no judge, no file, no such model, no chat template, no place for the result.
    """
    refuse_no_judge(config)
    rows, path = read_outputs(config.instructions)
    baseline = Baseline(rows, len(rows), path)
    if config.limit is not None and config.limit < len(rows):
        kept = sorted(random.Random(f"alpaca {config.seed}").sample(range(len(rows)), config.limit))
        baseline.rows = [rows[place] for place in kept]
    if config.difficulty is not None:
        baseline.difficulty = read_difficulty(Path(config.difficulty))
        difficulty_of(baseline.difficulty, [o.index for o in baseline.rows], config.difficulty)
    if config.outputs is None:
        answering = who_answers(config, config.temperature)
    else:
        if config.models or config.source or config.stage or config.adapters:
            raise UserError(
                "--outputs are a model's answers; a source or --model would answer again.", "Give one of them."
            )
        refuse_unused(config, "--outputs are answers already", "temperature", "max_new_tokens")
        given, place = read_outputs(config.outputs)
        baseline.given = {given[0].generator: {o.key: o.output for o in given}}
        asked = len(baseline.rows)
        there = sum(o.key in baseline.given[given[0].generator] for o in baseline.rows)
        if not there:
            raise UserError(f"{place}: answers none of the instructions of {path}.", "Are these AlpacaEval's outputs?")
        baseline.rows = [o for o in baseline.rows if o.key in baseline.given[given[0].generator]]
        baseline.silent = asked - there
        answering = Answering({}, None, chosen_judge(config, ()))
    return baseline, answering, results_folder(config, answering)


def run_alpaca(
    config: AlpacaConfig,
    baseline: Baseline,
    answering: Answering,
    folder: Path,
    meter: Meter,
    *,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> Alpaca:
    """Answer and compare: ``folder``/alpaca.json, and in ``folder``/alpaca the job, with each model's outputs and
    annotations in AlpacaEval's form.

    Args:
        baseline, answering, folder: of ``prepare``.
        back_off: of ``open_desk``.

    Raises:
        UserError: the job's folder holds something else, an endpoint cannot answer at all, or there is no verdict.
    """
    assert answering.judge is not None
    job = folder / KIND
    items = [(model, row) for model in [*answering.specs, *baseline.given] for row in baseline.rows]

    async def work(desk: Desk, item: tuple[str, Output]) -> Compared:
        return await _one(desk, config, answering, baseline, *item)

    asked = ask_all(config, answering, job, COMMAND, items, work, meter, say, back_off)
    annotator = answering.judge.name
    found = {
        name: [
            _annotation(row, name, done, annotator)
            for (model, row), done in asked.results
            if model == name and done.output is not None
        ]
        for name in [*answering.specs, *baseline.given]
    }
    ending = part(len(baseline.rows), baseline.whole)
    _write_texts(job / ending[1:] if ending else job, found, asked)
    silent = Counter(model for (model, _), done in asked.results if done.output is None)
    models = {
        name: {**rates(rows, baseline.difficulty), "n_not_answered": silent[name]}
        for name, rows in found.items()
        if any_counts(rows)
    }
    if not models:
        why = Counter(done.why for _, done in asked.results if done.why).most_common(3)
        told = "; ".join([*(f"{reason} ({count})" for reason, count in why), *([asked.why] if asked.why else [])])
        raise UserError(f"{job}: there is no verdict: {told}", asked.hint())
    body = _body(config, baseline, answering, asked, models, found)
    result = Alpaca(models, body, asked.unfinished("comparisons"))
    if not asked.unreached:
        result.files.append(write_judged(folder, KIND + ending, body, answering, config.chat_template))
    return result


def dry_run_lines(baseline: Baseline, answering: Answering) -> list[str]:
    """What it can cost at most."""
    assert answering.judge is not None
    bounds = Bounds(answering)
    for row in baseline.rows:
        for model, spec in answering.specs.items():
            bounds.add(model, [{"role": "user", "content": row.instruction}])
            asked = judge_messages(row.instruction, row.output, "", False)
            bounds.add(answering.judge.name, asked, more_tokens=spec.max_tokens, tries=JUDGE_TRIES)
        for answers in baseline.given.values():
            asked = judge_messages(row.instruction, row.output, answers[row.key], False)
            bounds.add(answering.judge.name, asked, tries=JUDGE_TRIES)
    return bound_lines(bounds.of, priced(answering.endpoints()))


# -- one instruction -------------------------------------------------------------------------------------------------


async def _one(
    desk: Desk, config: AlpacaConfig, answering: Answering, baseline: Baseline, model: str, row: Output
) -> Compared:
    """What cannot be answered or judged is gone past, and counted."""
    assert answering.judge is not None
    cut = False
    if model in baseline.given:
        output = baseline.given[model][row.key]
    else:
        said: tuple[Message, ...] = ({"role": "user", "content": row.instruction},)
        seed = seed_of(config.seed, KIND, row.key)
        try:
            reply = await desk.ask(Request(f"answer/{row.key}", model, said, seed=seed))
        except RequestFailed as failed:
            return Compared(None, None, f"no answer: {failed.reason}")
        output, cut = valid(reply.text), reply.finish_reason == "length"
    if output == row.output:
        return Compared(output, 1.5, "the same text", cut)  # as AlpacaEval has it, without a judge
    swapped = is_swapped(row.key, config.seed)
    messages = judge_messages(row.instruction, row.output, output, swapped)

    def verdict(text: str) -> tuple[float, str]:
        return read_verdict(text, swapped), valid(text)

    try:
        preference, text = await desk.ask_parsed(
            judge_request(f"judge/{model}/{row.key}", answering.judge, messages), verdict, tries=JUDGE_TRIES
        )
    except RequestFailed as failed:
        return Compared(output, None, f"no verdict: {failed.reason}", cut)
    return Compared(output, preference, text, cut)


def _annotation(row: Output, model: str, done: Compared, annotator: str) -> Annotation:
    preference = float("nan") if done.preference is None else done.preference
    return Annotation(
        row.index, row.instruction, row.output, str(done.output), row.generator, model, annotator, preference
    )


# -- what is written -------------------------------------------------------------------------------------------------


def _write_texts(job: Path, found: dict[str, list[Annotation]], asked: Asked[tuple[str, Output], Compared]) -> None:
    names = slugs(list(found))
    told = {(model, row.key): (row, done) for (model, row), done in asked.results}
    for model, slug in names.items():
        rows = [(row, done) for (name, _), (row, done) in told.items() if name == model and done.output is not None]
        outputs = [
            {"dataset": row.dataset, "instruction": row.instruction, "output": done.output, "generator": model}
            for row, done in rows
        ]
        annotations = [
            {
                "dataset": row.dataset,
                "instruction": row.instruction,
                "output_1": row.output,
                "generator_1": row.generator,
                "output_2": done.output,
                "generator_2": model,
                "annotator": found[model][0].annotator,
                "preference": done.preference,
                "raw_completion": done.why,
            }
            for row, done in rows
        ]
        make_folder(job / slug)
        write_text(job / slug / OUTPUTS, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
        write_text(job / slug / ANNOTATIONS, json.dumps(annotations, indent=1, ensure_ascii=False) + "\n")


def _body(
    config: AlpacaConfig,
    baseline: Baseline,
    answering: Answering,
    asked: Asked[tuple[str, Output], Compared],
    models: dict[str, dict[str, Any]],
    found: dict[str, list[Annotation]],
) -> dict[str, Any]:
    cut = Counter(model for (model, _), done in asked.results if done.cut)
    lost = {
        name: Counter(d.why for (m, _), d in asked.results if m == name and d.preference is None) for name in models
    }
    return {
        "models": {
            name: {**body, "answers_cut_at_max_tokens": cut[name], "why_left_out": dict(lost[name])}
            for name, body in models.items()
        },
        "differences": judged_differences(answering, models, lambda a, b: difference(found[a], found[b])),
        "settings": {
            **judged_settings(answering, "this project's own", config.seed),
            "baseline": baseline.generator,
            "temperature": {name: spec.temperature for name, spec in answering.specs.items()},
        },
        "data": {
            "instructions": str(baseline.path),
            "asked_sha256": baseline.digest(),
            "asked": len(baseline.rows),
            "of": baseline.whole,
        },
        "notes": [NOTE, *notes_on(models, baseline.difficulty is not None)],
        "spent": asked.totals.as_dict(),
    }
