"""Sets of scored completions (raw UltraFeedback's schema) → a folder of preference pairs like ultrafeedback_binarized."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..config.load import DatasetSpec
from ..data.load import summarise
from ..data.messages import RowError
from ..data.opening import Source, decoded
from ..data.output import DROPPED, REPORT, check_held_out, check_output, request_of
from ..data.workers import map_rows
from ..data.writing import FileFormat, write_split
from ..errors import UserError
from ..io.run_dir import folder_aside, write_json, write_text
from .pairs_input import open_input, own_questions
from .questions import Questions, read_questions
from .ultrafeedback import NOTES, UNRATED, PairRules, pair_of_row

MADE_BY = "zephyr-lite data pairs"
TRAIN, TEST = "train_prefs", "test_prefs"
# As many rows as the published set holds out, but no more than a share that a small set can spare.
TEST_ROWS, TEST_SHARE = 2000, 0.05
_PLACES = 5
FEWER = "pairs fewer held out than asked for: those of one prompt stay together"

_TURNS = [{"content": datasets.Value("string"), "role": datasets.Value("string")}]
# the published columns, in their order
SCHEMA = datasets.Features(
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
_BESIDE = datasets.Features(
    {
        "fault": datasets.Value("string"),
        "source": datasets.Value("string"),
        "place": datasets.Value("int64"),
        "longer": datasets.Value("bool"),
        "notes": datasets.Sequence(datasets.Value("int32")),
    }
)


@dataclass
class PairsReport:
    """What became of the rows; ``report.json`` has the same.

    Attributes:
        inputs: what was read, with how many rows.
        rules: how pairs were chosen.
        rows, pairs: read and made; train, test: pairs in each split.
        dropped: reason → the places ("flan.jsonl row 17") of rows without a pair.
        notes: ``ultrafeedback.NOTES`` and ``FEWER`` where they occur, with their numbers.
        sources: ``source`` → (rows, pairs).
        questions: how many excluded questions were looked for.
        score_chosen, score_rejected: means over the pairs.
        chosen_longer: share of the pairs whose chosen response has more characters than the rejected one.
        files: written, beside the report.
    """

    inputs: list[str]
    rules: PairRules
    rows: int = 0
    pairs: int = 0
    train: int = 0
    test: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    sources: dict[str, tuple[int, int]] = field(default_factory=dict)
    questions: int = 0
    score_chosen: float = 0.0
    score_rejected: float = 0.0
    chosen_longer: float = 0.0
    files: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One fact a line."""
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
        """For JSON: the first places of each reason only; ``dropped.tsv`` has all."""
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
    say: Callable[[str], None] = lambda line: None,
) -> PairsReport | None:
    """Read, choose, split, write; the folder appears whole or not at all.

    Rows keep their order. The held-out ones are those of the smallest hashes of seed and prompt: equal prompts are on the
    same side. The same arguments and rows give the same bytes, whatever the number of processes.

    Args:
        inputs: files, folders or hub ids in the schema of ``openbmb/UltraFeedback``. A folder whose files are named by
            source (``flan.jsonl``, ``sharegpt.jsonl``, …, as that set's are) is read whole.
        out: the folder to make: train_prefs and test_prefs, report.json, report.md, dropped.tsv (reason and place of each
            row without a pair).
        rules: how to choose; None: ``PairRules()``.
        exclude: what ``questions.read_questions`` takes. The prompts of the inputs' own truthful_qa rows are always
            excluded, from every source.
        test: pairs to hold out: a share below 1, or a number. None: 2,000, and no more than 5 %.
        file_format: parquet or jsonl.
        num_proc: processes; None: as many as there are cores, one for a small set.
        overwrite: replace a folder of pairs that an earlier run made.
        say: is told what takes long.

    Returns:
        None: ``out`` holds these very pairs already.

    Raises:
        UserError: an input is missing, unreadable or of another schema; no pair is left, or none to train on; ``out``
            holds something else.
    """
    rules = rules or PairRules()
    if not rules.margin > 0:
        raise UserError(f"margin {rules.margin:g}: has to be above 0.", "Half a point is --margin 0.5.")
    check_held_out(test, num_proc)
    specs = [DatasetSpec(path=item) if isinstance(item, str) else item for item in inputs]
    if not specs:
        raise UserError("data pairs: nothing to read.", "Name a file, a folder or a hub id (openbmb/UltraFeedback).")
    paths = [spec.path for spec in specs]
    request = request_of(out, [*paths, *exclude], rules=rules, specs=specs, test=test, file_format=file_format)
    if check_output(out, paths, MADE_BY, overwrite, request):
        return None
    listed = [text for name in exclude for text in read_questions(name)]
    opened = [part for spec in specs for part in open_input(spec)]
    questions = Questions([*listed, *(text for raw, _ in opened for text in own_questions(raw))])
    report = PairsReport([f"{raw.label}: {len(raw):,} rows" for raw, _ in opened], rules, questions=len(questions))
    parts = []
    for raw, _ in opened:
        say(f"choosing pairs in {raw.label}")
        parts.append(_map(raw, rules, questions, num_proc))
    table = datasets.concatenate_datasets(parts)
    kept = _account(table, [raw.label for raw, _ in opened], [len(part) for part in parts], report)
    if len(kept) == 0:
        hint = "Mend the rows, or choose other rules (--chosen-by, --rejected, --margin, --system-prompt)."
        if rules.chosen_by == "overall" and report.notes.get(UNRATED):
            hint = "Where completions have no overall_score, choose by the mean of their ratings: --chosen-by mean."
        raise UserError(f"no pair is left of {report.rows:,} rows: {summarise(report.dropped)}.", hint)
    held_out = _held_out(table, kept, rules.seed, test)
    splits = {TRAIN: kept[~held_out], TEST: kept[held_out]}
    report.train, report.test = len(splits[TRAIN]), len(splits[TEST])
    if test is not None and test >= 1 and report.test < test:
        report.notes[FEWER] = int(test) - report.test
    columns = table.select_columns(list(SCHEMA))
    with folder_aside(out) as folder:
        for split, rows in splits.items():
            if len(rows):
                written = write_split(folder, split, columns.select(rows), file_format)
                report.files += [path.name for path in written]
        write_text(folder / DROPPED, "".join(f"{r}\t{p}\n" for r, where in report.dropped.items() for p in where))
        write_text(folder / "report.md", _markdown(report))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, **report.as_dict()})
    return report


# -- rows ----------------------------------------------------------------------------------------------------------------


def _map(raw: Source, rules: PairRules, questions: Questions, num_proc: int | None) -> datasets.Dataset:
    options = {"rules": tuple(asdict(rules).items()), "questions": questions.fingerprint}
    return map_rows(
        raw.table,
        _choose,
        datasets.Features({**SCHEMA, **_BESIDE}),
        options={"label": raw.label, "rules": rules, "questions": questions},
        key=options,
        desc=f"choosing pairs in {raw.label}",
        with_indices=True,
        batch_size=200,
        num_proc=num_proc,
    )


_NOTHING: dict[str, Any] = {
    "prompt": "",
    "prompt_id": "",
    "chosen": [],
    "rejected": [],
    "messages": [],
    "score_chosen": 0.0,
    "score_rejected": 0.0,
}


def _choose(
    batch: dict[str, list[Any]], indices: list[int], *, label: str, rules: PairRules, questions: Questions
) -> dict[str, list[Any]]:
    result: dict[str, list[Any]] = {name: [] for name in (*SCHEMA, *_BESIDE)}
    for row, index in zip(decoded(batch, label), indices):
        counts: Counter[str] = Counter()
        fault, pair = "", _NOTHING
        try:
            pair = pair_of_row(row, rules, counts, questions)
        except RowError as reason:
            fault = str(reason)
        for name in SCHEMA:
            result[name].append(pair[name])
        source = row.get("source")
        result["fault"].append(fault)
        result["source"].append(source if isinstance(source, str) else "")
        result["place"].append(index)
        result["longer"].append(not fault and _characters(pair["chosen"]) > _characters(pair["rejected"]))
        result["notes"].append([counts[note] for note in NOTES])
    return result


def _characters(turns: list[dict[str, str]]) -> int:
    return len(turns[-1]["content"])


def _account(table: datasets.Dataset, labels: list[str], sizes: list[int], report: PairsReport) -> np.ndarray:
    """Fill in the report; the indices of the rows that have a pair."""
    small = table.select_columns([*_BESIDE, "score_chosen", "score_rejected"]).with_format("arrow")
    ends = np.cumsum(sizes)
    kept: list[np.ndarray] = []
    notes = np.zeros(len(NOTES), dtype=np.int64)
    rows_by, pairs_by = Counter[str](), Counter[str]()
    scores = np.zeros(2)
    longer = 0
    for start in range(0, len(table), 10_000):
        batch = small[start : start + 10_000]
        faults = batch.column("fault").to_pylist()
        sources, places = batch.column("source").to_pylist(), batch.column("place").to_pylist()
        good = np.asarray([fault == "" for fault in faults])
        kept.append(start + np.flatnonzero(good))
        notes += np.asarray(batch.column("notes").to_pylist(), dtype=np.int64).reshape(-1, len(NOTES)).sum(0)
        rows_by.update(sources)
        pairs_by.update(source for source, fault in zip(sources, faults) if not fault)
        for name, at in (("score_chosen", 0), ("score_rejected", 1)):
            scores[at] += batch.column(name).to_numpy()[good].sum()
        longer += int(pa.compute.sum(batch.column("longer")).as_py() or 0)
        for offset in np.flatnonzero(~good):
            label = labels[int(np.searchsorted(ends, start + offset, side="right"))]
            report.dropped.setdefault(faults[offset], []).append(f"{label} row {places[offset] + 1}")
    result = np.concatenate(kept)
    report.rows, report.pairs = len(table), len(result)
    report.notes = {note: int(count) for note, count in zip(NOTES, notes) if count}
    report.sources = {name: (rows_by[name], pairs_by[name]) for name in sorted(rows_by)}
    if len(result):
        report.score_chosen, report.score_rejected = (float(value) for value in scores / len(result))
        report.chosen_longer = longer / len(result)
    return result


def _held_out(table: datasets.Dataset, kept: np.ndarray, seed: int, test: float | None) -> np.ndarray:
    """[n] bool: which of the kept rows are held out. Rows of one prompt stay together."""
    ids = table.select_columns(["prompt_id"]).with_format("arrow")
    keys = np.empty(len(kept), dtype=np.uint64)
    for start in range(0, len(kept), 10_000):
        for at, prompt_id in enumerate(ids[kept[start : start + 10_000]].column("prompt_id").to_pylist(), start):
            keys[at] = int.from_bytes(hashlib.sha256(f"{seed} test {prompt_id}".encode()).digest()[:8])
    if test is not None and test < 1:
        held_out = keys < np.uint64(min(int(test * 2**64), 2**64 - 1))
        if held_out.all():
            raise UserError(f"test {test:g}: that holds out all {len(kept):,} pairs.", "Hold out fewer (--test 0.05).")
        return held_out
    wanted = min(TEST_ROWS, int(len(kept) * TEST_SHARE)) if test is None else int(test)
    if wanted >= len(kept):
        raise UserError(f"test {wanted:,}: there are {len(kept):,} pairs.", "Hold out fewer (--test 0.05, a share).")
    unique, counts = np.unique(keys, return_counts=True)
    held, room = [], wanted
    for key, count in zip(unique, counts):  # a prompt that has more pairs than there is room for is passed over
        if count <= room:
            held.append(key)
            room -= count
    return np.isin(keys, np.asarray(held, dtype=np.uint64))


def _markdown(report: PairsReport) -> str:
    rules = ", ".join(f"{key} {value}" for key, value in asdict(report.rules).items())
    facts = "\n".join(f"- {line}" for line in report.lines())
    return f"# Preference pairs\n\nMade by `zephyr-lite data pairs`: {rules}.\n\n{facts}\n"
