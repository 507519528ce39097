"""``zephyr-lite data chat``: raw conversations → train and test splits like ultrachat_200k's, and a report.

The first pass (``scan``) looks at blocks of rows by themselves: refusals, contamination, broken capitals, signatures. Then
duplicates are found among all rows, and the second pass (``write_shard``) writes the rows that are kept, with their capitals
restored. The results do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config.load import DatasetSpec
from ..data.formats import COLUMNS, PLAIN, detect, normalise
from ..data.messages import RowError
from ..data.sources import Source, kind_of, stem_of
from ..data.workers import cores
from ..errors import UserError
from ..io.atomic import folder_aside, write_json, write_text
from .dedup import NGRAM, PERMUTATIONS, EvalSets, first_of_equal, join_near, read_eval_sets, signatures, words_of
from .lexicon import Lexicon, count_words, is_english
from .output import DROPPED, REPORT, FileFormat, check_output, held_out, in_processes, request_of, shards, write_rows
from .prompts import open_rows
from .refusals import first_refusal
from .truecase import is_broken, restore

logger = logging.getLogger(__name__)

MADE_BY = "zephyr-lite data chat"
LEXICON = "lexicon.txt"
BLOCK = 500  # rows
LEARN_ROWS = 100_000  # rows at most that the lexicon is learned from, spread evenly over the corpus
SHARD_ROWS = 12_500  # rows of an output file
SIDES = ("user", "assistant")  # bit 0 and bit 1 of the column ``broken``
KEPT, FAULTY, EXACT, NEAR = 0, 1, 2, 3  # what becomes of a row
_EXAMPLES = 3  # of a rule, in the report
_CONTEXT = 40  # characters around an example's change
# raw UltraChat is one set in ten files, which the hub's layout would call ten splits
_NUMBERED = re.compile(r"train_(\d+)")
_SCANNED = pa.schema(
    {
        "fault": pa.string(),  # why the row is dropped, or ""
        "detail": pa.string(),  # of the fault or the cut
        "turns": pa.int32(),  # that are kept
        "refusal": pa.string(),  # the rule by which the dialogue was cut, or ""
        "broken": pa.uint8(),  # the sides whose capitals are restored
        "prompt": pa.uint64(),  # hash by which the test split is drawn
        "content": pa.uint64(),  # hash by which exact duplicates are found
        "signature": pa.list_(pa.uint16(), PERMUTATIONS),
        "lexicon": pa.string(),  # the counts of the block, in its first row
    }
)
_TEXT = datasets.Value("string")
_ROW = datasets.Features({"prompt": _TEXT, "prompt_id": _TEXT, "messages": [{"content": _TEXT, "role": _TEXT}]})


@dataclass(frozen=True)
class Options:
    """Options of the cleaning."""

    truecase: bool = True  # restore capitals
    refusals: bool = True  # cut dialogues before a habitual refusal
    near: float | None = 0.8  # similarity of near duplicates; None for exact ones only
    min_turns: int = 2
    min_words: int | None = None
    max_words: int | None = None
    decontaminate: Sequence[str] = ()  # evaluation sets; see ``dedup.read_eval_sets``
    ngram: int = NGRAM  # words of an overlap with them
    test: float = 0.1  # share of the prompts, or number of rows, of the test split; 0 for none
    lexicon: Path | None = None  # a file of an earlier run instead of a learned one
    file_format: FileFormat = "parquet"

    def check(self) -> None:
        """Raises UserError for an invalid value."""
        low, high = self.min_words or 0, self.max_words
        if self.near is not None and not 0.5 <= self.near <= 1:
            raise UserError(f"near {self.near:g}: must be a similarity from 0.5 to 1.", "The default is 0.8; 0 is off.")
        if self.min_turns < 2:
            raise UserError(f"min-turns {self.min_turns}: a question and an answer are two turns.")
        if low < 0 or (high is not None and high < max(low, 1)):
            raise UserError(f"min-words {low} and max-words {high} leave no row.")
        if not 2 <= self.ngram <= 60:
            raise UserError(f"ngram {self.ngram}: must be 2 to 60 words.", f"The default is {NGRAM}.")
        if self.lexicon is not None and not self.truecase:
            raise UserError("a lexicon has no effect without truecasing.", "Leave one of the two options out.")


def clean_chat(
    source: str,
    out: Path,
    options: Options,
    *,
    split: str | None = None,
    num_proc: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Clean a set of conversations.

    Args:
        source: a file, a folder or a hub id; see ``open_raw``.
        out: the folder to make: train_sft and test_sft, report.md, report.json, dropped.tsv, lexicon.txt.
        split: of the source.
        num_proc: processes; None for all cores.
        overwrite: replace the folder if this command made it.

    Returns:
        What report.json holds. None: ``out`` is the result of this very request already.

    Raises:
        UserError: an option, the source or the folder is invalid, or no row is left.
    """
    options.check()
    read = [source, *options.decontaminate, *([str(options.lexicon)] if options.lexicon is not None else [])]
    request = request_of(out, read, options=options, split=split)
    if check_output(out, [source], MADE_BY, overwrite, request, test=options.test, num_proc=num_proc):
        return None
    lexicon = Lexicon.load(options.lexicon) if options.lexicon is not None else None
    raw = open_raw(source, split)
    logger.info(f"{source}: read as {raw.kind}, {len(raw.rows):,} rows")
    sets = read_eval_sets(options.decontaminate, options.ngram)
    processes = num_proc or cores()
    blocks = [range(start, min(start + BLOCK, len(raw.rows))) for start in range(0, len(raw.rows), BLOCK)]
    every = -(-len(raw.rows) // LEARN_ROWS)
    scanned = pa.concat_tables(in_processes(partial(scan, raw, options, sets, every), blocks, processes, "scanning"))
    fate, duplicate_of = find_duplicates(scanned, options.near)
    with folder_aside(out) as folder:
        report = _count(raw, scanned, fate, duplicate_of, folder / DROPPED)
        if not report["kept"]:
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in report["dropped"].items())
            raise UserError(
                f"{source}: no row is left of {report['rows']:,}: {reasons or 'none was dropped'}.",
                "Change the limits, the filters, or the source.",
            )
        if options.truecase:
            lexicon = lexicon or Lexicon.learned(map(json.loads, scanned["lexicon"].drop_null().to_pylist()))
            lexicon.save(folder / LEXICON)
        rows = np.flatnonzero(fate == KEPT)
        is_test = held_out(scanned["prompt"].to_numpy()[rows], options.test)
        splits = {"train_sft": rows[~is_test], "test_sft": rows[is_test]}
        if not len(splits["train_sft"]):
            raise UserError(
                f"{source}: all {report['kept']:,} rows that are left would be test rows.",
                "Choose a smaller --test, or 0.",
            )
        form = options.file_format
        files = [file for name, part in splits.items() for file in shards(name, part, SHARD_ROWS, form)]
        job = partial(write_shard, raw, scanned.select(["turns", "broken"]), lexicon, folder)
        restored = list(in_processes(job, files, processes, "writing"))
        words = sum((part.words for part in restored), Counter[str]())
        report |= {
            "splits": {name: len(rows) for name, rows in splits.items()},
            "files": [name for name, _ in files],
            "restored": {"dialogues": sum(part.dialogues for part in restored), "words": dict(_by_count(words))},
            "eval_sets": sets.rows,
            "examples": {
                rule: [example for part in restored for example in part.examples.get(rule, [])][:_EXAMPLES]
                for rule in words
            },
        }
        write_text(folder / "report.md", markdown(report))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, "source": source, **report})
    return report


# -- raw rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """The raw rows of all files, one after the other."""

    rows: Source  # with the columns that are read
    kind: str  # their format
    labels: list[str]  # of the files
    ends: np.ndarray  # int64, where each file ends in ``rows``

    def place(self, index: int) -> str:
        """``train_3.jsonl row 17``, counted from 1."""
        part = int(np.searchsorted(self.ends, index, side="right"))
        return f"{self.labels[part]} row {index - (int(self.ends[part - 1]) if part else 0) + 1}"


@dataclass
class Dialogue:
    """The turns of one row up to its last answer."""

    roles: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    fault: str = ""  # why the row is dropped
    detail: str = ""  # of the fault or the cut
    refusal: str = ""  # the rule by which it was cut

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return self.texts[self.roles.index("user")]


def open_raw(path: str, split: str | None = None) -> Raw:
    """Open raw conversations: a file, a folder, or a hub id.

    A folder with train_0.jsonl … train_9.jsonl is read whole, in numeric order, unless ``split`` names one of them.
    """
    specs = [DatasetSpec(path=path, split=split)]
    folder = Path(path).expanduser()
    if split is None and folder.is_dir():
        files = {file: _NUMBERED.fullmatch(stem_of(file)) for file in folder.iterdir() if kind_of(file)}
        numbered = {int(found[1]): file for file, found in files.items() if found}
        specs = [DatasetSpec(path=str(numbered[number])) for number in sorted(numbered)] or specs
    parts = [open_rows(spec, "--split {}") for spec in specs]
    try:
        kinds = {part.label: detect(part.columns, "sft", part.label) for part in parts}
    except UserError as error:
        raise UserError(error.message, "If the columns have other names, rename them in the file.") from None
    if PLAIN in kinds.values() or len(set(kinds.values())) > 1:
        found = "; ".join(f"{label}: {kind}" for label, kind in kinds.items())
        raise UserError(
            f"{path}: conversations of one kind are needed; found {found}.", "Clean one at a time: --split train_0"
        )
    rows = datasets.concatenate_datasets([part.select_columns(COLUMNS).table for part in parts])
    return Raw(Source(rows, path), kinds[parts[0].label], list(kinds), np.cumsum([len(part) for part in parts]))


def dialogues(rows: Source, indices: slice | Sequence[int]) -> list[Dialogue]:
    """Some rows as dialogues; a row that cannot be read has a fault."""
    found = []
    for values in rows[indices]:
        try:
            messages = normalise(values, "sft").value["messages"]
            if any(set(message) > {"role", "content"} or message["role"] == "tool" for message in messages):
                raise RowError("tool calls, reasoning or turns that are not to be trained, which are not cleaned")
            roles = [message["role"] for message in messages]
            if "user" not in roles[:2]:
                raise RowError("does not begin with the user" if "user" in roles else "the user says nothing")
            found.append(Dialogue(roles, [message["content"] for message in messages]))
        except RowError as error:
            found.append(Dialogue(fault=str(error)))
    return found


# -- the first pass --------------------------------------------------------------------------------------------------


def scan(raw: Raw, options: Options, sets: EvalSets, every: int, block: range) -> pa.Table:
    """Scan a block of rows: a table of ``_SCANNED`` with a row for each. The lexicon is learned from each ``every``-th block."""
    found = dialogues(raw.rows, slice(block.start, block.stop))
    for dialogue in found:
        if options.refusals:
            _cut(dialogue)
        if not dialogue.fault and len(dialogue.texts) - (dialogue.roles[0] == "system") < options.min_turns:
            dialogue.fault = f"fewer than {options.min_turns} turns"
    groups = np.concatenate(([0], np.cumsum([len(dialogue.texts) for dialogue in found])))
    words = words_of([text for dialogue in found for text in dialogue.texts])
    whole = words.joined(groups)
    for dialogue, length in zip(found, np.diff(whole.offsets).tolist()):
        if not dialogue.fault and length < (options.min_words or 0):
            dialogue.fault, dialogue.detail = f"shorter than {options.min_words} words", f"{length} words"
        elif not dialogue.fault and options.max_words is not None and length > options.max_words:
            dialogue.fault, dialogue.detail = f"longer than {options.max_words} words", f"{length} words"
    for text, (name, shared) in sorted(sets.find(words).items(), reverse=True):
        dialogue = found[int(np.searchsorted(groups, text, side="right")) - 1]
        if not dialogue.fault or dialogue.fault.startswith("overlaps"):
            dialogue.fault, dialogue.detail = f"overlaps with {name}", shared
    broken = [_broken(dialogue) if options.truecase else 0 for dialogue in found]
    near = options.near is not None
    marks = signatures(whole) if near else np.zeros((len(found), PERMUTATIONS), np.uint16)
    lexicon: list[str | None] = [None] * len(found)
    if options.truecase and options.lexicon is None and block.start // BLOCK % every == 0:
        trusted = [d for d, b in zip(found, broken) if not d.fault and not b and is_english(d.texts[-1])]
        lexicon[0] = json.dumps(count_words("\n".join(dialogue.texts) for dialogue in trusted), ensure_ascii=False)
    columns: dict[str, Any] = {
        "fault": [dialogue.fault for dialogue in found],
        "detail": [dialogue.detail for dialogue in found],
        "turns": [len(dialogue.texts) for dialogue in found],
        "refusal": [dialogue.refusal for dialogue in found],
        "broken": broken,
        "prompt": [_hash("" if dialogue.fault else dialogue.prompt) for dialogue in found],
        "content": [_hash("\0".join([*d.roles, *(text.strip().lower() for text in d.texts)])) for d in found],
        "signature": pa.FixedSizeListArray.from_arrays(pa.array(marks.ravel()), PERMUTATIONS),
        "lexicon": lexicon,
    }
    return pa.table(columns, _SCANNED)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _cut(dialogue: Dialogue) -> None:
    """Remove the first refusal with its question and all later turns."""
    refusal = first_refusal(dialogue.roles, dialogue.texts)
    if refusal is None:
        return
    place, dialogue.refusal, start, end = refusal
    dialogue.detail = " ".join(dialogue.texts[place][max(0, start - 20) : end + 80].split())
    while place and dialogue.roles[place - 1] != "assistant":
        place -= 1
    dialogue.roles, dialogue.texts = dialogue.roles[:place], dialogue.texts[:place]
    if "assistant" not in dialogue.roles:
        dialogue.fault = f"begins with a refusal ({dialogue.refusal})"


def _broken(dialogue: Dialogue) -> int:
    if dialogue.fault:
        return 0
    sides = [[text for text, role in zip(dialogue.texts, dialogue.roles) if role == side] for side in SIDES]
    return sum(is_broken(side) << bit for bit, side in enumerate(sides))


# -- all rows ----------------------------------------------------------------------------------------------------------


def find_duplicates(scanned: pa.Table, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Exact and near duplicates (from a similarity on; None: none) among the rows without a fault.

    Returns:
        (uint8 [rows]: KEPT, FAULTY, EXACT or NEAR; int64 [rows]: of a duplicate, the first row of its group, which is kept).
    """
    fate = np.where(pc.equal(scanned["fault"], "").to_numpy(), KEPT, FAULTY).astype(np.uint8)
    of = np.arange(len(fate))
    rows = np.flatnonzero(fate == KEPT)
    of[rows] = first_of_equal(scanned["content"].to_numpy(), rows)
    fate[of != np.arange(len(fate))] = EXACT
    if threshold is not None:
        marks = scanned["signature"].combine_chunks()
        marks = marks.flatten().to_numpy().reshape(-1, PERMUTATIONS)
        near = join_near(marks, np.flatnonzero(fate == KEPT), threshold)
        joined = near != np.arange(len(fate))
        fate[joined], of[joined] = NEAR, near[joined]
    return fate, of


# -- the second pass ---------------------------------------------------------------------------------------------------


@dataclass
class Restored:
    """Changes of truecasing in one file."""

    dialogues: int = 0  # changed
    words: Counter[str] = field(default_factory=Counter)  # by rule
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # by rule: {place, before, after} of a few


def write_shard(
    raw: Raw, scanned: pa.Table, lexicon: Lexicon | None, folder: Path, shard: tuple[str, np.ndarray]
) -> Restored:
    """Write one file (name, rows). ``scanned``: the columns ``turns`` and ``broken`` of the first pass."""
    name, rows = shard
    restored = Restored()
    tables = []
    for numbers in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        found = dialogues(raw.rows, numbers.tolist())
        for row, dialogue, values in zip(numbers.tolist(), found, scanned.take(pa.array(numbers)).to_pylist()):
            dialogue.roles, dialogue.texts = dialogue.roles[: values["turns"]], dialogue.texts[: values["turns"]]
            if values["broken"]:
                _restore(raw.place(row), dialogue, values["broken"], lexicon, restored)
        records = [
            {
                "prompt": dialogue.prompt,
                "prompt_id": hashlib.sha256(dialogue.prompt.encode()).hexdigest(),
                "messages": [{"content": t, "role": r} for t, r in zip(dialogue.texts, dialogue.roles)],
            }
            for dialogue in found
        ]
        tables.append(pa.Table.from_pylist(records, _ROW.arrow_schema))
    write_rows(folder / name, pa.concat_tables(tables))
    return restored


def _restore(place: str, dialogue: Dialogue, broken: int, lexicon: Lexicon | None, restored: Restored) -> None:
    """Restore the capitals of the sides whose bit is set."""
    changed = False
    for number, (role, before) in enumerate(zip(dialogue.roles, dialogue.texts)):
        if role in SIDES and broken >> SIDES.index(role) & 1:
            after, changes = restore(before, lexicon)
            dialogue.texts[number] = after
            changed |= bool(changes)
            for start, rule, _ in changes:
                restored.words[rule] += 1
                examples = restored.examples.setdefault(rule, [])
                if len(examples) < _EXAMPLES:
                    around = slice(max(0, start - _CONTEXT), start + _CONTEXT)
                    examples.append({"place": place, "before": before[around], "after": after[around]})
    restored.dialogues += changed


# -- the report --------------------------------------------------------------------------------------------------------


def _count(raw: Raw, scanned: pa.Table, fate: np.ndarray, duplicate_of: np.ndarray, dropped: Path) -> dict[str, Any]:
    """The fates of the rows in numbers, for report.json; reason, place and detail of each row that is dropped or cut are written
    to a file."""
    counts: dict[str, Counter[str]] = {"dropped": Counter(), "cut": Counter()}
    refusals = np.array(scanned["refusal"].to_pylist(), object)
    rows = np.flatnonzero((fate != KEPT) | (refusals != ""))
    found = scanned.select(["fault", "detail", "refusal"]).take(pa.array(rows)).to_pylist()
    with dropped.open("w", encoding="utf-8") as file:
        file.write("reason\tplace\tdetail\n")
        for row, values in zip(rows.tolist(), found):
            reason, detail = values["fault"], values["detail"]
            if fate[row] in (EXACT, NEAR):
                reason = "an exact duplicate" if fate[row] == EXACT else "a near duplicate"
                detail = f"of {raw.place(int(duplicate_of[row]))}"
            if fate[row] == KEPT:
                counts["cut"][values["refusal"]] += 1
                reason = f"cut before a refusal ({values['refusal']}); the rest stays"
            else:
                counts["dropped"][reason] += 1
            file.write(f"{reason}\t{raw.place(row)}\t{' '.join(detail.split())}\n")
    return {
        "rows": len(fate),
        "kept": int((fate == KEPT).sum()),
        **{name: dict(_by_count(counted)) for name, counted in counts.items()},
        "broken_capitals": int(((fate == KEPT) & (scanned["broken"].to_numpy() > 0)).sum()),
    }


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for the terminal."""
    splits = ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())
    lines = [f"{report['kept']:,} of {report['rows']:,} rows stay: {splits}"]
    lines += [f"  dropped: {reason}: {count:,}" for reason, count in report["dropped"].items()]
    lines += [f"  cut before a refusal ({rule}): {count:,}" for rule, count in report["cut"].items()]
    if report["broken_capitals"]:
        restored = report["restored"]
        words = ", ".join(f"{rule} {count:,}" for rule, count in restored["words"].items())
        lines.append(f"  capitals restored in {restored['dialogues']:,} dialogues: {words or 'nothing'}")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """report.md: the same, with a few examples of each rule's changes."""
    lines = ["# Cleaned conversations", "", *(f"- {line.strip()}" for line in report_lines(report))]
    for rule, examples in report["examples"].items():
        lines += ["", f"**{rule}**", ""]
        for example in examples:
            before, after = (" ".join(example[name].split()) for name in ("before", "after"))
            lines.append(f"- {example['place']}: {before} → {after}")
    return "\n".join(lines) + "\n"
