"""``zephyr-lite eval mt-bench``: answers to both turns of every question, and the judge's grade of each."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ...client.types import Desk, Message, Request, RequestFailed
from ...errors import UserError
from ...io.atomic import file_aside, make_folder
from ...recipe.feedback.draw import seed_of
from ...recipe.feedback.estimate import bound_lines, priced
from ...recipe.feedback.files import line_of, valid
from ...recipe.feedback.meter import Meter
from ..judged import (
    JUDGE_TRIES,
    Answering,
    Asked,
    Bounds,
    JudgedConfig,
    ask_all,
    judge_request,
    judged_differences,
    judged_settings,
    part,
    refuse_no_judge,
    results_folder,
    who_answers,
    write_judged,
)
from ..plotting import need_matplotlib
from .prompts import judge_messages, read_grade
from .questions import TURNS, Question, Questions
from .radar import LEAST, draw_radar
from .scores import Grade, difference, model_scores

KIND = "mt-bench"
COMMAND = f"eval {KIND}"
ANSWERS, JUDGMENTS = "answers.jsonl", "judgments.jsonl"
# MT-Bench's: creative tasks are drawn, tasks with one right answer are not
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
OTHER_TEMPERATURE = 0.7  # of a category that is not MT-Bench's


class MtBenchConfig(JudgedConfig):
    """The keys of --config."""

    questions: str | None = None  # question.jsonl, a folder with it, or a hub id; the installed package by default
    references: str | None = None  # a file of reference answers, instead of the one beside the questions
    judge_prompts: str | None = None  # FastChat's file, instead of the one beside the questions
    categories: list[str] | None = None
    limit: int | None = Field(None, ge=1)  # so many questions, the categories in turn
    plot: bool = True


@dataclass
class Answered:
    """What became of one question with one model."""

    answers: list[str] = field(default_factory=list)
    cut: int = 0  # answers that ended at max_tokens
    grades: list[Grade] = field(default_factory=list)


@dataclass
class MtBench:
    """What a run made.

    Attributes:
        models: name → ``scores.model_scores``.
        files: that were written; none where the budget ended before the questions.
    """

    models: dict[str, dict[str, Any]]
    body: dict[str, Any]
    unfinished: str
    files: list[Path] = field(default_factory=list)


def prepare(config: MtBenchConfig) -> tuple[Answering, Path]:
    """Who answers, and where the results go; everything that can be wrong is said here, before anything is asked.

    Raises:
        UserError: no judge, no such model, no chat template, no place for the result, no matplotlib.
    """
    refuse_no_judge(config)
    if config.plot:
        need_matplotlib("the radar plot", "--no-plot")
    answering = who_answers(config, OTHER_TEMPERATURE)
    return answering, results_folder(config, answering)


def run_mt_bench(
    config: MtBenchConfig,
    read: Questions,
    answering: Answering,
    folder: Path,
    meter: Meter,
    *,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> MtBench:
    """Answer and grade: ``folder``/mt-bench.json and .png, and in ``folder``/mt-bench the job with all texts.

    Args:
        read: of ``read_questions``.
        folder: of ``prepare``.
        back_off: of ``open_desk``.

    Raises:
        UserError: the job's folder holds something else, an endpoint cannot answer at all, or nothing was graded.
    """
    job = folder / KIND
    items = [(model, question) for model in answering.specs for question in read.questions]

    async def work(desk: Desk, item: tuple[str, Question]) -> Answered:
        return await _one(desk, config, answering, read.prompts, *item)

    asked = ask_all(config, answering, job, COMMAND, items, work, meter, say, back_off)
    chosen = (
        sorted({re.sub(r"\W+", "_", question.category) for question in read.questions}) if config.categories else []
    )
    ending = part(len(read.questions), read.whole, chosen)
    _write_texts(job / ending[1:] if ending else job, asked)
    grades = {
        name: [grade for (model, _), done in asked.results if model == name for grade in done.grades]
        for name in answering.specs
    }
    if not any(grade.score is not None for found in grades.values() for grade in found):
        raise UserError(f"{job}: nothing was graded: {_why(asked)}", asked.hint())
    models = {name: model_scores(found) for name, found in grades.items() if found}
    body = _body(config, read, answering, asked, models, grades)
    result = MtBench(models, body, asked.unfinished("questions"))
    if not asked.unreached:
        result.files.append(write_judged(folder, KIND + ending, body, answering, config.chat_template))
        categories = {question.category for question in read.questions}
        if config.plot and len(categories) < LEAST:
            say(f"no radar plot: it takes {LEAST} categories, and these are {len(categories)}")
        elif config.plot:
            picture = folder / f"{KIND}{ending}.png"
            draw_radar(picture, models, f"MT-Bench, graded by {answering.judge.name if answering.judge else ''}")
            result.files.append(picture)
    return result


# -- one question ----------------------------------------------------------------------------------------------------


async def _one(
    desk: Desk,
    config: MtBenchConfig,
    answering: Answering,
    prompts: dict[str, dict[str, str]],
    model: str,
    question: Question,
) -> Answered:
    """Both turns; what cannot be answered or graded is gone past, and counted."""
    assert answering.judge is not None
    judge, done, said = answering.judge, Answered(), list[Message]()
    lost = ""
    for turn in range(1, TURNS + 1):
        said.append({"role": "user", "content": question.turns[turn - 1]})
        try:
            reply = await desk.ask(_answer_request(config, model, question, turn, said))
        except RequestFailed as failed:
            lost = f"no answer: {failed.reason}"
            break
        done.answers.append(valid(reply.text))
        done.cut += reply.finish_reason == "length"
        said.append({"role": "assistant", "content": reply.text})
    requests = [
        judge_request(
            f"judge/{model}/{question.id}/{turn}", judge, judge_messages(question, done.answers[:turn], prompts, turn)
        )
        for turn in range(1, len(done.answers) + 1)
    ]
    # both grades are waited for: the budget may end between them, and what came back is in the journal then
    outcomes = await asyncio.gather(
        *(desk.ask_parsed(r, _graded, tries=JUDGE_TRIES) for r in requests), return_exceptions=True
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, RequestFailed):
            raise outcome
    for turn in range(1, TURNS + 1):
        score, text = None, lost
        if turn <= len(outcomes):
            outcome = outcomes[turn - 1]
            if isinstance(outcome, RequestFailed):
                text = f"no grade: {outcome.reason}"
            elif not isinstance(outcome, BaseException):
                score, text = outcome
        done.grades.append(Grade(question.id, question.category, model, turn, score, text))
    return done


def _answer_request(
    config: MtBenchConfig, model: str, question: Question, turn: int, said: Sequence[Message]
) -> Request:
    return Request(
        key=f"answer/{question.id}/{turn}",
        endpoint=model,
        messages=tuple(said),
        temperature=TEMPERATURES.get(question.category, OTHER_TEMPERATURE),
        seed=seed_of(config.seed, KIND, question.id, turn),
    )


def _graded(text: str) -> tuple[float, str]:
    return read_grade(text), valid(text)


# -- what is said ----------------------------------------------------------------------------------------------------


def dry_run_lines(config: MtBenchConfig, read: Questions, answering: Answering) -> list[str]:
    """What it can cost at most. Answers are counted with their ``max_tokens`` in what follows them."""
    assert answering.judge is not None
    bounds = Bounds(answering)
    for model, spec in answering.specs.items():
        for question in read.questions:
            for turn in range(1, TURNS + 1):
                said: list[Message] = []
                for before in question.turns[:turn]:
                    said += [{"role": "user", "content": before}, {"role": "assistant", "content": ""}]
                bounds.add(model, said[:-1], more_tokens=(turn - 1) * spec.max_tokens)
                asked = judge_messages(question, [""] * turn, read.prompts, turn)
                bounds.add(answering.judge.name, asked, more_tokens=turn * spec.max_tokens, tries=JUDGE_TRIES)
    return bound_lines(bounds.of, priced(answering.endpoints()))


def notes(config: MtBenchConfig, read: Questions) -> list[str]:
    """What stands between these scores and published ones."""
    found = []
    if not read.prompts:
        found.append(
            "no judge_prompts.jsonl was found: the judge was asked in this project's own words, and the scores are not "
            "comparable with published ones"
        )
    if len(read.questions) < read.whole:
        found.append(f"{len(read.questions)} of {read.whole} questions were asked: not a score of the whole bench")
    return found


def _body(
    config: MtBenchConfig,
    read: Questions,
    answering: Answering,
    asked: Asked[tuple[str, Question], Answered],
    models: dict[str, dict[str, Any]],
    grades: dict[str, list[Grade]],
) -> dict[str, Any]:
    cut: Counter[str] = Counter()
    for (model, _), done in asked.results:
        cut[model] += done.cut
    reasons = {name: Counter(g.judgment for g in found if g.score is None) for name, found in grades.items()}
    return {
        "models": {
            name: {**body, "answers_cut_at_max_tokens": cut[name], "why_not_graded": dict(reasons[name])}
            for name, body in models.items()
        },
        "differences": judged_differences(answering, models, lambda a, b: difference(grades[a], grades[b])),
        "settings": {
            **judged_settings(answering, "FastChat's" if read.prompts else "this project's own", config.seed),
            "temperatures": TEMPERATURES,
        },
        "data": {**read.data, "asked": len(read.questions), "of": read.whole},
        "notes": notes(config, read),
        "spent": asked.totals.as_dict(),
    }


def _why(asked: Asked[Any, Answered]) -> str:
    reasons = Counter(g.judgment for _, done in asked.results for g in done.grades if g.score is None)
    parts = [f"{reason} ({count})" for reason, count in reasons.most_common(3)]
    return "; ".join([*parts, *([asked.why] if asked.why else [])])


def _write_texts(job: Path, asked: Asked[tuple[str, Question], Answered]) -> None:
    """Answers in FastChat's form, and the judge's replies beside them."""
    make_folder(job)
    with file_aside(job / ANSWERS) as file:
        for (model, question), done in asked.results:
            number = int(question.id) if question.id.isdecimal() else question.id  # as FastChat's tools want it
            head = {"question_id": number, "category": question.category, "model_id": model}
            file.write(line_of({**head, "choices": [{"index": 0, "turns": done.answers}]}))
    with file_aside(job / JUDGMENTS) as file:
        for _, done in asked.results:
            for g in done.grades:
                row: dict[str, Any] = {
                    "question_id": g.question,
                    "category": g.category,
                    "model": g.model,
                    "turn": g.turn,
                }
                file.write(line_of({**row, "score": g.score, "judgment": g.judgment}))
