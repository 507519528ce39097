"""``zephyr-lite data pairs``: scored completions (raw UltraFeedback) → preference pairs like ultrafeedback_binarized.

The paper (Tunstall et al. 2023, arXiv 2310.16944) takes the completion with the highest mean of the four aspects' ratings
and a random one of the other three; the published script takes the highest ``overall_score``.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from ..config.load import DatasetSpec
from ..data.load import summarise
from ..data.messages import Message, RowError
from ..data.sources import Source, kind_of
from ..data.workers import cores
from ..errors import UserError
from ..io.atomic import folder_aside, write_json, write_text
from ..io.text import shown
from .output import DROPPED, REPORT, FileFormat, check_output, held_out, in_processes, request_of, shards, write_rows
from .prompts import Questions, open_rows, read_questions

logger = logging.getLogger(__name__)

MADE_BY = "zephyr-lite data pairs"
TRAIN, TEST = "train_prefs", "test_prefs"
TEST_ROWS, TEST_SHARE = 2000, 0.05  # held out by default: as many as in the published set, but at most this share
BLOCK = 1000  # rows
SHARD_ROWS = 100_000  # rows of an output file
TRUTHFUL_QA = "truthful_qa"
_PLACES = 5  # of a reason in the report
# The first release gave 2,628 completions an overall score of 10, many of which the judge had meant as 1 (github
# OpenBMB/UltraFeedback, issue 8). Its authors then set those to 1 whose mean rating is at most 2, asked the judge again
# about those up to 4, left the others, and added the column ``fine-grained_score``.
_WRONG_OVERALL, _RIGHT_OVERALL, _LOW_MEAN, _HIGH_MEAN = 10.0, 1.0, 2.0, 4.0
_RATINGS, _OVERALLS = (1.0, 5.0), (0.0, 10.0)
_ROUNDING = 1e-9  # as floats, 4⅓ − 1 is less than 3⅓

# notes, counted per completion, and FEWER
REPAIRED = "overall score repaired"
DOUBTFUL = "overall score of 10 not used: nothing confirms it"
PARTLY = "completions rated in some aspects only"
UNRATED = "completions without a score, left aside"
ODD = "ratings or scores that are no number of their scale, left aside"
EMPTY = "completions without text, left aside"
FEWER = "pairs fewer held out than asked for: those of one prompt stay together"
NOTES = (REPAIRED, DOUBTFUL, PARTLY, UNRATED, ODD, EMPTY)
LONGER = "pairs whose chosen response is the longer one"  # counted, too

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
    scored = _scored(row.get("completions"), rules, counts)
    if len(scored) < 2:
        raise RowError("fewer than two rated completions")
    best = max(scored, key=lambda c: c.score)  # max keeps the first of equals
    others = [c for c in scored if c is not best]
    system = best.system.strip() and best.system if rules.system_prompt == "keep" else ""
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
    pairs, dropped, counts = _choose(enumerate(rows), PairRules(chosen_by, rejected, margin, seed=seed))
    reasons = Counter(reason for reason, _ in dropped)
    notes = {note: counts[note] for note in (REPAIRED, DOUBTFUL) if counts[note]}
    return pairs, {"rows": len(pairs) + len(dropped), "pairs": len(pairs), **reasons, **notes}


def _scored(completions: Any, rules: PairRules, counts: Counter[str]) -> list[_Scored]:
    if completions is not None and not isinstance(completions, list):
        raise RowError("completions is not a list")
    found = []
    for completion in completions or []:
        if not isinstance(completion, Mapping):
            raise RowError("a completion is not an object")
        response = completion.get("response")
        if not isinstance(response, str) or not response.strip():
            counts[EMPTY] += 1
            continue
        doubtful = counts[DOUBTFUL]
        # notes on ratings matter only if they decide
        score = mean = _mean_rating(completion, counts if rules.chosen_by == "mean" else Counter())
        if rules.chosen_by == "overall":
            score = _overall(completion, mean, counts)
        if score is not None:
            system = completion.get("custom_system_prompt")
            found.append(_Scored(score, response, system if isinstance(system, str) else ""))
        elif counts[DOUBTFUL] == doubtful:  # which are counted already
            counts[UNRATED] += 1
    return found


def _overall(completion: Mapping[str, Any], mean: float | None, counts: Counter[str]) -> float | None:
    """The overall score, if it is none of the wrong tens."""
    overall = _number(completion.get("overall_score"), _OVERALLS, counts)
    if overall == _WRONG_OVERALL and mean is not None and mean <= _HIGH_MEAN:
        if mean <= _LOW_MEAN:
            counts[REPAIRED] += 1
            return _RIGHT_OVERALL
        if completion.get("fine-grained_score") is None:
            counts[DOUBTFUL] += 1
            return None
    return overall


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


@dataclass
class PairsReport:
    """The result; ``report.json`` has the same."""

    inputs: list[str]  # what was read, with the number of rows
    rules: PairRules
    questions: int  # excluded ones
    rows: int = 0  # read
    pairs: int = 0  # made
    train: int = 0
    test: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → places of rows ("flan.jsonl row 17")
    notes: dict[str, int] = field(default_factory=dict)  # ``NOTES`` and ``FEWER`` that occurred
    score_chosen: float = 0.0  # means over the pairs
    score_rejected: float = 0.0
    chosen_longer: float = 0.0  # share of the pairs whose chosen response has more characters than the rejected one
    files: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        result = [f"read {text}" for text in self.inputs]
        for reason, where in sorted(self.dropped.items(), key=lambda item: (-len(item[1]), item[0])):
            result.append(f"left out, {summarise({reason: where}, _PLACES)}")
        result += [f"{note}: {count:,}" for note, count in self.notes.items()]
        if self.questions:
            result.append(f"excluded questions looked for: {self.questions:,}")
        result.append(
            f"{self.pairs:,} pairs of {self.rows:,} rows: {self.train:,} {TRAIN}, {self.test:,} {TEST}; score "
            f"{self.score_chosen:.2f} against {self.score_rejected:.2f} on average; the chosen response is the longer one in "
            f"{self.chosen_longer:.1%}"
        )
        return result

    def as_dict(self) -> dict[str, Any]:
        """For report.json: the first places of each reason; ``dropped.tsv`` has all."""
        return {
            **asdict(self),
            "dropped": {
                reason: {"count": len(where), "first": where[:_PLACES]}
                for reason, where in sorted(self.dropped.items())
            },
        }

    def markdown(self) -> str:
        """For report.md."""
        rules = ", ".join(f"{key} {value}" for key, value in asdict(self.rules).items())
        facts = "\n".join(f"- {line}" for line in self.lines())
        return f"# Preference pairs\n\nMade by `zephyr-lite data pairs`: {rules}.\n\n{facts}\n"


def make_pairs(
    inputs: Sequence[str | DatasetSpec],
    out: Path,
    rules: PairRules | None = None,
    *,
    exclude: Sequence[str] = (),
    test: float | None = None,
    file_format: FileFormat = "parquet",
    num_proc: int | None = None,
    overwrite: bool = False,
) -> PairsReport | None:
    """Read scored completions, choose pairs, split and write them; the folder appears complete or not at all.

    Rows keep their order. The pairs with the smallest hashes of seed and prompt are held out, so that equal prompts are in the
    same split. The same arguments and rows give the same bytes for any number of processes.

    Args:
        inputs: files, folders or hub ids in the schema of ``openbmb/UltraFeedback``.
        out: the folder to make: train_prefs and test_prefs, report.json, report.md, dropped.tsv.
        exclude: names for ``read_questions``. The prompts of the inputs' own truthful_qa rows are always excluded.
        test: pairs to hold out: a share below 1, or a number. None: 2,000, and at most 5 %.
        num_proc: processes; None: one for each core, one for a small set.
        overwrite: replace a folder of an earlier run.

    Returns:
        None: ``out`` is the result of this very request already.

    Raises:
        UserError: an input is unreadable or of another schema; no pair is left; ``out`` has other contents.
    """
    rules = rules or PairRules()
    if not rules.margin > 0:
        raise UserError(f"margin {rules.margin:g}: must be above 0.", "Half a point is --margin 0.5.")
    specs = [DatasetSpec(path=item) if isinstance(item, str) else item for item in inputs]
    paths = [spec.path for spec in specs]
    request = request_of(out, [*paths, *exclude], rules=rules, specs=specs, test=test, file_format=file_format)
    if check_output(out, paths, MADE_BY, overwrite, request, test=test, num_proc=num_proc):
        return None
    listed = [text for name in exclude for text in read_questions(name)]
    opened = [_open(file) for spec in specs for file in _files_by_source(spec)]
    own = [
        str(row["instruction"])
        for raw in opened
        for row in raw.select_columns(["source", "instruction"])
        if row.get("source") == TRUTHFUL_QA and row.get("instruction")
    ]
    questions = Questions([*listed, *own])
    report = PairsReport([f"{raw.label}: {len(raw):,} rows" for raw in opened], rules, len(questions))
    tables: list[pa.Table] = []
    counts: Counter[str] = Counter()
    for raw in opened:
        logger.info(f"choosing pairs in {raw.label}")
        blocks = [range(start, min(start + BLOCK, len(raw))) for start in range(0, len(raw), BLOCK)]
        processes = num_proc or (cores() if len(blocks) > 2 else 1)
        job = partial(_choose_block, raw, rules, questions)
        for pairs, dropped, found in in_processes(job, blocks, processes, f"choosing pairs in {raw.label}"):
            tables.append(pa.Table.from_pylist(pairs, SCHEMA.arrow_schema))
            for reason, number in dropped:
                report.dropped.setdefault(reason, []).append(f"{raw.label} row {number + 1}")
            counts += found
    table = pa.concat_tables(tables)
    report.rows, report.pairs = sum(map(len, opened)), len(table)
    report.notes = {note: counts[note] for note in NOTES if counts[note]}
    if not report.pairs:
        hint = "Correct the rows, or choose other rules (--chosen-by, --rejected, --margin, --system-prompt)."
        if rules.chosen_by == "overall" and report.notes.get(UNRATED):
            hint = "If completions have no overall_score, choose by the mean of their ratings: --chosen-by mean."
        raise UserError(f"no pair is left of {report.rows:,} rows: {summarise(report.dropped)}.", hint)
    report.score_chosen, report.score_rejected = (
        float(table[name].to_numpy().mean()) for name in ("score_chosen", "score_rejected")
    )
    report.chosen_longer = counts[LONGER] / report.pairs
    hashes = [
        hashlib.sha256(f"{rules.seed} test {each}".encode()).digest()[:8] for each in table["prompt_id"].to_pylist()
    ]
    default = min(TEST_ROWS, int(len(table) * TEST_SHARE))
    is_test = held_out(np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64), default if test is None else test)
    report.train, report.test = int((~is_test).sum()), int(is_test.sum())
    if not report.train:
        raise UserError(
            f"test {test:g}: that holds out all {len(table):,} pairs.", "Hold out fewer (--test 0.05, a share)."
        )
    if test is not None and test >= 1 and report.test < test:
        report.notes[FEWER] = int(test) - report.test
    with folder_aside(out) as folder:
        for split, rows in ((TRAIN, np.flatnonzero(~is_test)), (TEST, np.flatnonzero(is_test))):
            for name, part in shards(split, rows, SHARD_ROWS, file_format):
                write_rows(folder / name, table.take(pa.array(part)))
                report.files.append(name)
        write_text(folder / DROPPED, "".join(f"{r}\t{p}\n" for r, where in report.dropped.items() for p in where))
        write_text(folder / "report.md", report.markdown())
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, **report.as_dict()})
    return report


def _files_by_source(spec: DatasetSpec) -> list[DatasetSpec]:
    """The files of a folder whose files are named by source, as in a clone of openbmb/UltraFeedback."""
    folder = Path(spec.path).expanduser()
    files = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p)) if folder.is_dir() else []
    is_split = [file.stem.lower().startswith(("train", "test", "valid", "eval", "dev")) for file in files]
    if spec.split is not None or (folder / "data").is_dir() or len(files) < 2 or any(is_split):
        return [spec]
    return [spec.model_copy(update={"path": str(Path(spec.path) / file.name)}) for file in files]


def _open(spec: DatasetSpec) -> Source:
    raw = open_rows(spec, "--split {}")
    if not {"instruction", "completions"} <= set(raw.columns):
        raise UserError(
            f"{raw.label}: found columns {shown(', '.join(raw.columns), 500)}; scored completions are needed: columns "
            "instruction and completions, as in openbmb/UltraFeedback.",
            f"Preference pairs are ready for training as they are: zephyr-lite dpo dataset.path={spec.path}. "
            "Prompts and conversations get scores from `zephyr-lite feedback`.",
        )
    return raw.select_columns(["source", "instruction", "completions"])


Chosen = tuple[list[dict[str, Any]], list[tuple[str, int]], Counter[str]]


def _choose(
    rows: Iterable[tuple[int, Mapping[str, Any]]], rules: PairRules, questions: Questions | None = None
) -> Chosen:
    """(the pairs of numbered rows, (reason, number) of the rows without one, counts of ``NOTES`` and ``LONGER``)."""
    pairs: list[dict[str, Any]] = []
    dropped: list[tuple[str, int]] = []
    counts: Counter[str] = Counter()
    for number, row in rows:
        try:
            pair = pair_of_row(row, rules, counts, questions)
        except RowError as reason:
            dropped.append((str(reason), number))
            continue
        pairs.append(pair)
        counts[LONGER] += len(pair["chosen"][-1]["content"]) > len(pair["rejected"][-1]["content"])
    return pairs, dropped, counts


def _choose_block(raw: Source, rules: PairRules, questions: Questions, block: range) -> Chosen:
    return _choose(zip(block, raw[block.start : block.stop]), rules, questions)
