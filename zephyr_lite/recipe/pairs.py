"""``zephyr-lite data pairs``: scored completions (raw UltraFeedback's schema) → preference pairs like ultrafeedback_binarized."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..config.load import DatasetSpec
from ..data.formats import RowError
from ..data.load import Source, kind_of, summarise
from ..data.workers import cores
from ..errors import UserError
from ..io.run_dir import folder_aside, write_json, write_text
from ..io.text import shown
from .output import DROPPED, REPORT, check_held_out, check_output, request_of
from .parallel import in_processes
from .questions import Questions, open_rows, read_questions
from .ultrafeedback import NOTES, TRUTHFUL_QA, UNRATED, PairRules, pair_of_row
from .writing import FileFormat, write_split

logger = logging.getLogger(__name__)

MADE_BY = "zephyr-lite data pairs"
TRAIN, TEST = "train_prefs", "test_prefs"
TEST_ROWS, TEST_SHARE = 2000, 0.05  # held out by default: as many as in the published set, but at most this share
BLOCK = 1000  # rows
_PLACES = 5  # of a reason in the report
_COLUMNS = ("source", "instruction", "completions")
FEWER = "pairs fewer held out than asked for: those of one prompt stay together"

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


@dataclass
class PairsReport:
    """The result; ``report.json`` has the same.

    Attributes:
        inputs: what was read, with the number of rows.
        rules: how pairs were chosen.
        questions: number of excluded questions.
        rows, pairs: read and made; train, test: pairs in each split.
        dropped: reason → places ("flan.jsonl row 17") of rows without a pair.
        notes: ``ultrafeedback.NOTES`` and ``FEWER`` that occurred, with their numbers.
        sources: ``source`` → (rows, pairs).
        score_chosen, score_rejected: means over the pairs.
        chosen_longer: share of the pairs whose chosen response has more characters than the rejected one.
        files: written, in addition to the report.
    """

    inputs: list[str]
    rules: PairRules
    questions: int
    rows: int = 0
    pairs: int = 0
    train: int = 0
    test: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)
    score_chosen: float = 0.0
    score_rejected: float = 0.0
    chosen_longer: float = 0.0
    files: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        result = [f"read {text}" for text in self.inputs]
        for reason, where in sorted(self.dropped.items(), key=lambda item: (-len(item[1]), item[0])):
            result.append(f"left out, {summarise({reason: where}, _PLACES)}")
        result += [f"{note}: {count:,}" for note, count in self.notes.items()]
        if self.questions:
            result.append(f"excluded questions looked for: {self.questions:,}")
        if len(self.sources) > 1:
            kept = ", ".join(f"{name or 'none named'} {n:,} of {of:,}" for name, (of, n) in self.sources.items())
            result.append(f"pairs by source: {kept}")
        result.append(
            f"{self.pairs:,} pairs of {self.rows:,} rows: {self.train:,} {TRAIN}, {self.test:,} {TEST}; score "
            f"{self.score_chosen:.2f} against {self.score_rejected:.2f} on average; the chosen response is the longer one in "
            f"{self.chosen_longer:.1%}"
        )
        return result

    def as_dict(self) -> dict[str, Any]:
        """For report.json: the first places of each reason; ``dropped.tsv`` has all."""
        values = asdict(self)
        values["dropped"] = {
            reason: {"count": len(where), "first": where[:_PLACES]} for reason, where in sorted(self.dropped.items())
        }
        values["sources"] = {name: {"rows": rows, "pairs": pairs} for name, (rows, pairs) in self.sources.items()}
        return values


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
        inputs: files, folders or hub ids in the schema of ``openbmb/UltraFeedback``. A folder whose files are named by
            source (``flan.jsonl``, ``sharegpt.jsonl``, …, as that set's are) is read whole.
        out: the folder to make: train_prefs and test_prefs, report.json, report.md, dropped.tsv (reason and place of each
            row without a pair).
        rules: how to choose; None: ``PairRules()``.
        exclude: names for ``questions.read_questions``. The prompts of the inputs' own truthful_qa rows are always excluded.
        test: pairs to hold out: a share below 1, or a number. None: 2,000, and at most 5 %.
        num_proc: processes; None: one for each core, one for a small set.
        overwrite: replace a folder of an earlier run.

    Returns:
        None: ``out`` is the result of this very request already.

    Raises:
        UserError: an input is missing, unreadable or of another schema; no pair is left, or none to train on; ``out`` has other
            contents.
    """
    rules = rules or PairRules()
    if not rules.margin > 0:
        raise UserError(f"margin {rules.margin:g}: must be above 0.", "Half a point is --margin 0.5.")
    check_held_out(test, num_proc)
    specs = [DatasetSpec(path=item) if isinstance(item, str) else item for item in inputs]
    if not specs:
        raise UserError("data pairs: nothing to read.", "Name a file, a folder or a hub id (openbmb/UltraFeedback).")
    paths = [spec.path for spec in specs]
    request = request_of(out, [*paths, *exclude], rules=rules, specs=specs, test=test, file_format=file_format)
    if check_output(out, paths, MADE_BY, overwrite, request):
        return None
    listed = [text for name in exclude for text in read_questions(name)]
    opened = [raw for spec in specs for raw in _open(spec)]
    own = [
        str(row["instruction"])
        for raw in opened
        for row in raw.select_columns(["source", "instruction"])
        if row.get("source") == TRUTHFUL_QA and row.get("instruction")
    ]
    questions = Questions([*listed, *own])
    report = PairsReport([f"{raw.label}: {len(raw):,} rows" for raw in opened], rules, len(questions))
    chosen: list[Chosen] = []
    for raw in opened:
        logger.info(f"choosing pairs in {raw.label}")
        blocks = [range(start, min(start + BLOCK, len(raw))) for start in range(0, len(raw), BLOCK)]
        processes = num_proc or (cores() if len(blocks) > 2 else 1)
        chosen += in_processes(
            partial(choose, raw, rules, questions), blocks, processes, f"choosing pairs in {raw.label}"
        )
    table = _count(chosen, report)
    if not report.pairs:
        hint = "Correct the rows, or choose other rules (--chosen-by, --rejected, --margin, --system-prompt)."
        if rules.chosen_by == "overall" and report.notes.get(UNRATED):
            hint = "If completions have no overall_score, choose by the mean of their ratings: --chosen-by mean."
        raise UserError(f"no pair is left of {report.rows:,} rows: {summarise(report.dropped)}.", hint)
    held_out = _held_out(table["prompt_id"].to_pylist(), rules.seed, test)
    report.train, report.test = int((~held_out).sum()), int(held_out.sum())
    if test is not None and test >= 1 and report.test < test:
        report.notes[FEWER] = int(test) - report.test
    pairs = datasets.Dataset(table, fingerprint=request)
    with folder_aside(out) as folder:
        for split, rows in ((TRAIN, np.flatnonzero(~held_out)), (TEST, np.flatnonzero(held_out))):
            if len(rows):
                report.files += [path.name for path in write_split(folder, split, pairs.select(rows), file_format)]
        write_text(folder / DROPPED, "".join(f"{r}\t{p}\n" for r, where in report.dropped.items() for p in where))
        write_text(folder / "report.md", _markdown(report))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, **report.as_dict()})
    return report


# -- inputs --------------------------------------------------------------------------------------------------------------


def _open(spec: DatasetSpec) -> Iterator[Source]:
    """The rows of an input, file by file if a folder is read whole."""
    for each in _files_by_source(spec):
        raw = open_rows(each, "--split {}")
        _check_schema(raw.columns, raw.label, each)
        yield raw.select_columns(_COLUMNS)


def _files_by_source(spec: DatasetSpec) -> list[DatasetSpec]:
    folder = Path(spec.path).expanduser()
    if not folder.is_dir() or spec.split is not None or (folder / "data").is_dir():
        return [spec]
    files = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p))
    splits = [file for file in files if file.stem.lower().startswith(("train", "test", "valid", "eval", "dev"))]
    if len(splits) == 1:  # next to a report, as `zephyr-lite feedback` writes it
        files = splits
    elif splits or len(files) < 2:
        return [spec]
    return [spec.model_copy(update={"path": str(Path(spec.path) / file.name)}) for file in files]


def _check_schema(columns: Sequence[str], label: str, spec: DatasetSpec) -> None:
    if {"instruction", "completions"} <= set(columns):
        return
    found = f"{label}: found columns {shown(', '.join(columns), 500)}; "
    needs = "scored completions are needed: columns instruction and completions, as in openbmb/UltraFeedback"
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            found + "these are preference pairs already.",
            f"Train on them as they are: zephyr-lite dpo dataset.path={spec.path}"
            + (f" dataset.split={spec.split}" if spec.split else ""),
        )
    if {"messages", "conversations", "prompt", "data"} & set(columns):
        raise UserError(
            found + needs + ".", "Conversations have no scores; `zephyr-lite feedback` makes some for their prompts."
        )
    raise UserError(found + needs + ".", "Name another file, or rename the columns.")


# -- rows ----------------------------------------------------------------------------------------------------------------


# (pairs of ``SCHEMA``; (reason, place) of the other rows; counts by source of rows, pairs, and pairs whose chosen response is
# the longer one, and counts of ``ultrafeedback.NOTES``)
Chosen = tuple[pa.Table, list[tuple[str, str]], dict[str, Counter[str]]]


def choose(raw: Source, rules: PairRules, questions: Questions, block: range) -> Chosen:
    """Choose the pairs of some rows."""
    pairs: list[dict[str, Any]] = []
    dropped: list[tuple[str, str]] = []
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("rows", "pairs", "longer", "notes")}
    for index, row in zip(block, raw[block.start : block.stop]):
        named = row.get("source")
        source = named if isinstance(named, str) else ""
        counts["rows"][source] += 1
        try:
            pair = pair_of_row(row, rules, counts["notes"], questions)
        except RowError as reason:
            dropped.append((str(reason), f"{raw.label} row {index + 1}"))
            continue
        pairs.append(pair)
        counts["pairs"][source] += 1
        counts["longer"][source] += len(pair["chosen"][-1]["content"]) > len(pair["rejected"][-1]["content"])
    return pa.Table.from_pylist(pairs, SCHEMA.arrow_schema), dropped, counts


def _count(chosen: Sequence[Chosen], report: PairsReport) -> pa.Table:
    """Fill in the report; returns all pairs."""
    table = pa.concat_tables([pairs for pairs, _, _ in chosen])
    total = {name: sum((counts[name] for _, _, counts in chosen), Counter()) for name in chosen[0][2]}
    for _, dropped, _ in chosen:
        for reason, place in dropped:
            report.dropped.setdefault(reason, []).append(place)
    report.rows, report.pairs = total["rows"].total(), len(table)
    report.notes = {note: total["notes"][note] for note in NOTES if total["notes"][note]}
    report.sources = {name: (total["rows"][name], total["pairs"][name]) for name in sorted(total["rows"])}
    if report.pairs:
        report.score_chosen = float(table["score_chosen"].to_numpy().mean())
        report.score_rejected = float(table["score_rejected"].to_numpy().mean())
        report.chosen_longer = total["longer"].total() / report.pairs
    return table


def _held_out(prompt_ids: Sequence[str], seed: int, test: float | None) -> np.ndarray:
    """bool [pairs]: which are held out. Pairs of one prompt stay together."""
    hashes = [hashlib.sha256(f"{seed} test {prompt_id}".encode()).digest()[:8] for prompt_id in prompt_ids]
    keys = np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64)
    if test is not None and test < 1:
        held_out = keys < np.uint64(min(int(test * 2**64), 2**64 - 1))
        if held_out.all():
            raise UserError(f"test {test:g}: that holds out all {len(keys):,} pairs.", "Hold out fewer (--test 0.05).")
        return held_out
    wanted = min(TEST_ROWS, int(len(keys) * TEST_SHARE)) if test is None else int(test)
    if wanted >= len(keys):
        raise UserError(f"test {wanted:,}: there are {len(keys):,} pairs.", "Hold out fewer (--test 0.05, a share).")
    unique, counts = np.unique(keys, return_counts=True)
    held, room = [], wanted
    for key, count in zip(unique, counts):  # a prompt with more pairs than there is room for is skipped
        if count <= room:
            held.append(key)
            room -= count
    return np.isin(keys, np.asarray(held, dtype=np.uint64))


def _markdown(report: PairsReport) -> str:
    rules = ", ".join(f"{key} {value}" for key, value in asdict(report.rules).items())
    facts = "\n".join(f"- {line}" for line in report.lines())
    return f"# Preference pairs\n\nMade by `zephyr-lite data pairs`: {rules}.\n\n{facts}\n"
