"""``zephyr-lite data pairs``: scored completions (raw UltraFeedback) → preference pairs like ultrafeedback_binarized.

The paper (Tunstall et al. 2023, arXiv 2310.16944) takes the completion with the highest mean of the four aspects' ratings
and a random one of the other three; the published script takes the highest ``overall_score``.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from ..config.load import DatasetSpec
from ..data.load import PLACES, first_places, summarise
from ..data.messages import Message, RowError
from ..data.sources import Source
from ..data.workers import cores
from ..errors import UserError
from ..io.atomic import folder_aside, write_json, write_text
from ..io.text import shown
from .output import DROPPED, REPORT, FileFormat, claim, held_out, in_processes, shards, write_rows
from .prompts import Questions, open_rows, read_questions

MADE_BY = "zephyr-lite data pairs"
TRAIN, TEST = "train_prefs", "test_prefs"
TEST_ROWS, TEST_SHARE = 2000, 0.05  # held out by default: as many as in the published set, but at most this share
BLOCK = 1000  # rows
SHARD_ROWS = 100_000  # rows of an output file
TRUTHFUL_QA = "truthful_qa"
SOURCES = ("evol_instruct", "false_qa", "flan", "sharegpt", TRUTHFUL_QA, "ultrachat")  # of the raw set, a file each
# The first release gave 2,628 completions an overall score of 10, many of which the judge had meant as 1 (github
# OpenBMB/UltraFeedback, issue 8). Its authors then set those to 1 whose mean rating is at most 2, asked the judge again
# about those up to 4, left the others, and added the column ``fine-grained_score``.
_WRONG_OVERALL, _RIGHT_OVERALL, _LOW_MEAN, _HIGH_MEAN = 10.0, 1.0, 2.0, 4.0
_RATINGS, _OVERALLS = (1.0, 5.0), (0.0, 10.0)
_ROUNDING = 1e-9  # as floats, 4⅓ − 1 is less than 3⅓

# notes, counted per completion
REPAIRED = "overall score repaired"
DOUBTFUL = "overall score of 10 not used: nothing confirms it"
PARTLY = "completions rated in some aspects only"
UNRATED = "completions without a score, left aside"
ODD = "ratings or scores that are no number of their scale, left aside"
EMPTY = "completions without text, left aside"
NOTES = (REPAIRED, DOUBTFUL, PARTLY, UNRATED, ODD, EMPTY)

_TURNS = [{"content": datasets.Value("string"), "role": datasets.Value("string")}]
SCHEMA = datasets.Features(  # the published columns, in their order
    {
        "prompt": datasets.Value("string"),
        "prompt_id": datasets.Value("string"),
        "chosen": _TURNS,
        "rejected": _TURNS,
        "messages": _TURNS,
        "score_chosen": datasets.Value("float64"),
        "score_rejected": datasets.Value("float64"),
    }
)

# -- one row -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairRules:
    """How the two completions of a pair are chosen."""

    # mean of the aspects that have a rating ("N/A" is none), or the overall score; of equal scores the first is chosen
    chosen_by: Literal["mean", "overall"] = "mean"
    # a random one of the others (a row whose draw has the same score is dropped), the worst, or a random one of those at
    # least ``margin`` below the chosen one (a row without any is dropped)
    rejected: Literal["random", "worst", "margin"] = "random"
    margin: float = 1.0  # in points of ``chosen_by``'s scale: 1 to 5 for the mean, 1 to 10 for the overall score
    # each completion was made under a system prompt of its own: left out, as in the published pairs, or the chosen one's is
    # kept as the system turn, and only completions made under the same are rejected
    system_prompt: Literal["omit", "keep"] = "omit"
    # each row draws from the seed and its instruction: neither the rows' order nor the number of processes changes a pair
    seed: int = 42


class _Scored(NamedTuple):
    score: float
    response: str
    system: str


def pair_of_row(
    row: Mapping[str, Any], rules: PairRules, counts: Counter[str], questions: Questions | None = None
) -> dict[str, Any]:
    """A preference pair in the schema of ``ultrafeedback_binarized``.

    Args:
        row: in the schema of ``openbmb/UltraFeedback``: ``source``, ``instruction``, ``completions`` of {response,
            custom_system_prompt, annotations: {aspect: {Rating}}, overall_score}. Ratings are text, or numbers, or "N/A".
        counts: ``NOTES`` are counted here.
        questions: excluded prompts; rows of the source truthful_qa are always excluded.

    Returns:
        {prompt, prompt_id (SHA-256 of the prompt), chosen, rejected, messages, score_chosen, score_rejected}.

    Raises:
        RowError: the row has no pair; the message is one of a few, to be counted.
    """
    if row.get("source") == TRUTHFUL_QA:
        raise RowError("source is truthful_qa")
    prompt = row.get("instruction")
    if prompt is not None and not isinstance(prompt, str):
        raise RowError("instruction is not a text")
    if not prompt or not prompt.strip():
        raise RowError("no instruction")
    if questions is not None and (reason := questions.found_in(prompt)):
        raise RowError(reason)
    scored = _scored(row.get("completions") or [], rules.chosen_by, counts)
    if len(scored) < 2:
        raise RowError("fewer than two rated completions")
    best = max(scored, key=lambda c: c.score)  # max keeps the first of equals
    others = [c for c in scored if c is not best]
    system = best.system if rules.system_prompt == "keep" and best.system.strip() else ""
    if rules.system_prompt == "keep":
        others = [c for c in others if c.system == best.system]
        if not others:
            raise RowError("no other completion was made under the chosen one's system prompt")
    if rules.rejected == "margin":
        others = [c for c in others if c.score <= best.score - rules.margin + _ROUNDING]
        if not others:
            raise RowError(f"no completion at least {rules.margin:g} below the chosen one")
    prompt_id = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()
    draw = random.Random(f"{rules.seed} {prompt_id}")
    other = min(others, key=lambda c: c.score) if rules.rejected == "worst" else draw.choice(others)
    if other.score >= best.score:
        raise RowError("equal scores")
    if other.response.strip() == best.response.strip():
        raise RowError("equal responses")

    def conversation(response: str) -> list[Message]:
        turns = [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]
        return [{"content": system, "role": "system"}, *turns] if system else turns

    return {
        "prompt": prompt,
        "prompt_id": prompt_id,
        "chosen": conversation(best.response),
        "rejected": conversation(other.response),
        "messages": conversation(best.response),
        "score_chosen": best.score,
        "score_rejected": other.score,
    }


def to_pairs(
    rows: Iterable[Mapping[str, Any]],
    chosen_by: Literal["mean", "overall"] = "mean",
    rejected: Literal["random", "worst", "margin"] = "random",
    seed: int = 42,
    margin: float = 1.0,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The pairs of rows that are in memory, and counts: ``rows``, ``pairs``, each reason for which rows were dropped, ``REPAIRED``
    and ``DOUBTFUL``; see ``PairRules``."""
    listed = list(rows)
    pairs, dropped, counts = _choose(
        listed, PairRules(chosen_by, rejected, margin, seed=seed), None, range(len(listed))
    )
    reasons = Counter(reason for reason, _ in dropped)
    notes = {note: counts[note] for note in (REPAIRED, DOUBTFUL) if counts[note]}
    return pairs, {"rows": len(listed), "pairs": len(pairs), **reasons, **notes}


def _scored(completions: Any, chosen_by: str, counts: Counter[str]) -> list[_Scored]:
    """The completions with a text and a score."""
    if not isinstance(completions, list):
        raise RowError("completions is not a list")
    found = []
    for completion in completions:
        if not isinstance(completion, Mapping):
            raise RowError("a completion is not an object")
        response = completion.get("response")
        if not isinstance(response, str) or not response.strip():
            counts[EMPTY] += 1
            continue
        if chosen_by == "mean":
            score = _mean_rating(completion, counts)
        else:
            score = _number(completion.get("overall_score"), _OVERALLS, counts)
            mean = _mean_rating(completion, Counter())  # its notes are not counted: it is no score here
            if score == _WRONG_OVERALL and mean is not None and mean <= _HIGH_MEAN:
                if mean <= _LOW_MEAN:
                    counts[REPAIRED] += 1
                    score = _RIGHT_OVERALL
                elif completion.get("fine-grained_score") is None:
                    counts[DOUBTFUL] += 1
                    continue
        if score is None:
            counts[UNRATED] += 1
            continue
        system = completion.get("custom_system_prompt")
        found.append(_Scored(score, response, system if isinstance(system, str) else ""))
    return found


def _mean_rating(completion: Mapping[str, Any], counts: Counter[str]) -> float | None:
    """The mean of the aspects that have a rating; None if none has."""
    annotations = completion.get("annotations")
    if not isinstance(annotations, Mapping):
        return None
    # Arrow adds aspects that a row lacks as null
    aspects = [aspect for aspect in annotations.values() if isinstance(aspect, Mapping)]
    ratings = [r for aspect in aspects if (r := _number(aspect.get("Rating"), _RATINGS, counts)) is not None]
    if 0 < len(ratings) < len(aspects):
        counts[PARTLY] += 1
    return sum(ratings) / len(ratings) if ratings else None


def _number(value: Any, scale: tuple[float, float], counts: Counter[str]) -> float | None:
    """A rating as a number; None for "N/A" and null, and, counted in ``ODD``, for a value that is not of the scale."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("", "N/A", "NA", "NONE", "NULL")):
        return None
    try:
        if not isinstance(value, bool) and scale[0] <= float(value) <= scale[1]:
            return float(value)
    except (TypeError, ValueError):
        pass
    counts[ODD] += 1
    return None


# -- all rows ----------------------------------------------------------------------------------------------------------


def make_pairs(
    inputs: Sequence[str],
    out: Path,
    rules: PairRules | None = None,
    *,
    split: str | None = None,
    exclude: Sequence[str] = (),
    test: float | None = None,
    file_format: FileFormat = "parquet",
    num_proc: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Read scored completions, choose pairs, split and write them; the folder appears complete or not at all.

    Rows keep their order. The pairs with the smallest hashes of seed and prompt are held out, so that equal prompts are in the
    same split. The same arguments and rows give the same bytes for any number of processes.

    Args:
        inputs: files, folders or hub ids in the schema of ``openbmb/UltraFeedback``.
        out: the folder to make: train_prefs and test_prefs, report.json, report.md, dropped.tsv.
        split: of the inputs.
        exclude: names for ``read_questions``. The prompts of the inputs' own truthful_qa rows are always excluded.
        test: pairs to hold out: a share below 1, or a number. None: 2,000, and at most 5 %.
        num_proc: processes; None: one for each core.
        overwrite: replace a folder of an earlier run.

    Returns:
        What report.json holds. None: ``out`` is the result of this very request already.
    """
    rules = rules or PairRules()
    options = {"rules": rules, "split": split, "file_format": file_format}
    request = claim(out, [*inputs, *exclude], MADE_BY, overwrite, test, **options)
    if request is None:
        return None
    listed = [text for name in exclude for text in read_questions(name)]
    opened = [source for path in inputs for source in _open(DatasetSpec(path=path, split=split))]
    for raw in opened:
        for row in raw.select_columns(["source", "instruction"]):
            if row.get("source") == TRUTHFUL_QA:
                listed.append(str(row.get("instruction") or ""))
    questions = Questions(listed)
    tables: list[pa.Table] = []
    dropped: dict[str, list[str]] = {}  # reason → places of rows ("flan.jsonl row 17")
    counts: Counter[str] = Counter()
    longer = 0
    for raw in opened:
        blocks = [range(start, min(start + BLOCK, len(raw))) for start in range(0, len(raw), BLOCK)]
        job = partial(_choose, raw, rules, questions)
        for pairs, left_out, found in in_processes(job, blocks, num_proc or cores(), f"choosing pairs in {raw.label}"):
            tables.append(pa.Table.from_pylist(pairs, SCHEMA.arrow_schema))
            longer += sum(len(p["chosen"][-1]["content"]) > len(p["rejected"][-1]["content"]) for p in pairs)
            for reason, number in left_out:
                dropped.setdefault(reason, []).append(f"{raw.label} row {number + 1}")
            counts += found
    table = pa.concat_tables(tables)
    texts = [f"{rules.seed} test {prompt_id}" for prompt_id in table["prompt_id"].to_pylist()]
    keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    default = min(TEST_ROWS, int(len(table) * TEST_SHARE))
    is_test = held_out(np.array(keys, np.uint64), default if test is None else test)
    splits = {TRAIN: np.flatnonzero(~is_test), TEST: np.flatnonzero(is_test)}
    rows = sum(map(len, opened))
    if not len(splits[TRAIN]):
        raise UserError(
            f"no pair is left of {rows:,} rows: {summarise(dropped) or 'none was left out'}; {len(splits[TEST]):,} "
            "would be held out.",
            "Correct the rows, or choose other rules (--chosen-by, --rejected, --margin, --system-prompt, --test).",
        )
    files = [file for name, part in splits.items() for file in shards(name, part, SHARD_ROWS, file_format)]
    report = {
        "inputs": [f"{raw.label}: {len(raw):,} rows" for raw in opened],
        "rules": asdict(rules),
        "questions": len(questions),  # excluded ones
        "rows": rows,
        "pairs": len(table),
        "train": len(splits[TRAIN]),
        "test": len(splits[TEST]),
        "dropped": first_places(dict(sorted(dropped.items())), PLACES),
        "notes": {note: counts[note] for note in NOTES if counts[note]},
        "score_chosen": float(table["score_chosen"].to_numpy().mean()),
        "score_rejected": float(table["score_rejected"].to_numpy().mean()),
        "chosen_longer": longer / len(table),  # share of the pairs whose chosen response has more characters
        "files": [name for name, _ in files],
    }
    with folder_aside(out) as folder:
        for name, part in files:
            write_rows(folder / name, table.take(pa.array(part)))
        write_text(folder / DROPPED, "".join(f"{r}\t{place}\n" for r, where in dropped.items() for place in where))
        used = ", ".join(f"{key} {value}" for key, value in asdict(rules).items())
        facts = "\n".join(f"- {line}" for line in report_lines(report))
        write_text(folder / "report.md", f"# Preference pairs\n\nMade by `{MADE_BY}`: {used}.\n\n{facts}\n")
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, **report})
    return report


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the terminal and report.md."""
    result = [f"read {text}" for text in report["inputs"]]
    for reason, where in sorted(report["dropped"].items(), key=lambda item: -item[1]["count"]):
        more = ", …" if where["count"] > len(where["first"]) else ""
        result.append(f"left out, {reason}: {where['count']:,} ({', '.join(where['first'])}{more})")
    result += [f"{note}: {count:,}" for note, count in report["notes"].items()]
    if report["questions"]:
        result.append(f"excluded questions looked for: {report['questions']:,}")
    result.append(
        f"{report['pairs']:,} pairs of {report['rows']:,} rows: {report['train']:,} {TRAIN}, {report['test']:,} {TEST}; score "
        f"{report['score_chosen']:.2f} against {report['score_rejected']:.2f} on average; the chosen response is the longer "
        f"one in {report['chosen_longer']:.1%}"
    )
    return result


def _open(spec: DatasetSpec) -> list[Source]:
    """A source of scored completions; a clone of openbmb/UltraFeedback is one for each of its files, which are no splits."""
    files = [Path(spec.path).expanduser() / f"{name}.jsonl" for name in SOURCES]
    found = [str(file) for file in files if file.is_file()] if spec.split is None else []
    opened = [open_rows(spec.model_copy(update={"path": path}), "--split {}") for path in found or [spec.path]]
    for raw in opened:
        if not {"instruction", "completions"} <= set(raw.columns):
            raise UserError(
                f"{raw.label}: found columns {shown(', '.join(raw.columns), 500)}; scored completions are needed: columns "
                "instruction and completions, as in openbmb/UltraFeedback.",
                f"Preference pairs are ready for training as they are: zephyr-lite dpo dataset.path={spec.path}. "
                "Prompts and conversations get scores from `zephyr-lite feedback`.",
            )
    return [raw.select_columns(["source", "instruction", "completions"]) for raw in opened]


def _choose(
    raw: Source | Sequence[Mapping[str, Any]], rules: PairRules, questions: Questions | None, block: range
) -> tuple[list[dict[str, Any]], list[tuple[str, int]], Counter[str]]:
    """(the pairs of a block of rows, (reason, number) of its rows without one, counts of ``NOTES``)."""
    pairs: list[dict[str, Any]] = []
    dropped: list[tuple[str, int]] = []
    counts: Counter[str] = Counter()
    for number, row in zip(block, raw[block.start : block.stop]):
        try:
            pairs.append(pair_of_row(row, rules, counts, questions))
        except RowError as reason:
            dropped.append((str(reason), number))
    return pairs, dropped, counts
