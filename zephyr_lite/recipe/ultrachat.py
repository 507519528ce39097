"""``zephyr-lite data chat``: raw conversations → train and test splits like ultrachat_200k's, and a report.

The first pass (``scan``) looks at blocks of rows by themselves: refusals, contamination, broken capitals, signatures. Then
duplicates are found among all rows, and the second pass (``write_shard``) writes the rows that are kept, with their capitals
restored. The results do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from ..config.load import DatasetSpec
from ..data.formats import COLUMNS, PLAIN, detect, normalise
from ..data.messages import Message, RowError
from ..data.sources import Source
from ..data.workers import cores
from ..errors import UserError
from ..io.atomic import folder_aside, write_json, write_text
from .dedup import NGRAM, PERMUTATIONS, EvalSets, first_of_equal, join_near, read_eval_sets, signatures, words_of
from .lexicon import Lexicon, is_english
from .output import DROPPED, REPORT, FileFormat, claim, held_out, in_processes, shards, write_rows
from .prompts import open_rows
from .refusals import refusal
from .truecase import is_broken, restore

logger = logging.getLogger(__name__)

MADE_BY = "zephyr-lite data chat"
LEXICON = "lexicon.txt"
BLOCK = 500  # rows
LEARN_ROWS = 100_000  # rows at most that the lexicon is learned from, spread evenly over the corpus
SHARD_ROWS = 12_500  # rows of an output file
_EXAMPLES = 3  # of a rule, in the report
_CONTEXT = 40  # characters around an example's change
_SCANNED = pa.schema(
    {
        "fault": pa.string(),  # why the row is dropped, or ""
        "detail": pa.string(),  # of the fault or the cut
        "turns": pa.int32(),  # that are kept
        "refusal": pa.string(),  # the rule by which the dialogue was cut, or ""
        "broken": pa.string(),  # the roles whose capitals are restored
        "prompt": pa.uint64(),  # hash by which the test split is drawn
        "content": pa.uint64(),  # hash by which exact duplicates are found
        "signature": pa.list_(pa.uint16(), PERMUTATIONS),
    }
)
_TEXT = datasets.Value("string")
_ROW = datasets.Features({"prompt": _TEXT, "prompt_id": _TEXT, "messages": [{"content": _TEXT, "role": _TEXT}]})


class Options(BaseModel):
    """Options of the cleaning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    truecase: bool = True  # restore capitals
    refusals: bool = True  # cut dialogues before a habitual refusal
    near: float | None = Field(0.8, ge=0.5, le=1)  # similarity of near duplicates; None for exact ones only
    min_turns: int = Field(2, ge=2)
    min_words: int | None = Field(None, ge=0)
    max_words: int | None = Field(None, ge=1)
    decontaminate: tuple[str, ...] = ()  # evaluation sets; see ``dedup.read_eval_sets``
    ngram: int = Field(NGRAM, ge=2, le=60)  # words of an overlap with them
    test: float = 0.1  # share of the prompts, or number of rows, of the test split; 0 for none
    lexicon: Path | None = None  # a file of an earlier run instead of a learned one
    file_format: FileFormat = "parquet"


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
        UserError: the source or the folder is invalid, or no row is left.
    """
    lexicon = Lexicon() if options.lexicon is None else Lexicon.load(options.lexicon)
    read = [source, *options.decontaminate]
    request = claim(out, read, MADE_BY, overwrite, options.test, options=options, split=split, lexicon=lexicon)
    if request is None:
        return None
    raw = open_raw(source, split)
    sets = read_eval_sets(options.decontaminate, options.ngram)
    processes = num_proc or cores()
    blocks = [range(start, min(start + BLOCK, len(raw))) for start in range(0, len(raw), BLOCK)]
    tables = []
    for table, counted in in_processes(partial(scan, raw, options, sets), blocks, processes, "scanning"):
        tables.append(table)
        lexicon.add(counted)
    scanned = pa.concat_tables(tables).combine_chunks()
    fault, first = find_duplicates(scanned, options.near)
    rows = np.flatnonzero(fault == "")
    is_test = held_out(scanned["prompt"].to_numpy()[rows], options.test)
    splits = {"train_sft": rows[~is_test], "test_sft": rows[is_test]}
    with folder_aside(out) as folder:
        report: dict[str, Any] = {
            "rows": len(fault),
            "kept": len(rows),
            **_list_dropped(raw, scanned, fault, first, folder / DROPPED),
            "broken_capitals": sum(role != "" for role in scanned["broken"].take(pa.array(rows)).to_pylist()),
            "splits": {name: len(part) for name, part in splits.items()},
        }
        if not len(splits["train_sft"]):
            reasons = "; ".join(f"{reason}: {count:,}" for reason, count in report["dropped"].items())
            raise UserError(
                f"{source}: no row is left of {len(fault):,} for training; {len(splits['test_sft']):,} would be test rows; "
                f"dropped: {reasons or 'none'}.",
                "Change the limits, the filters, --test, or the source.",
            )
        if options.truecase:
            lexicon.save(folder / LEXICON)
        files = [file for name, part in splits.items() for file in shards(name, part, SHARD_ROWS, options.file_format)]
        job = partial(write_shard, raw, scanned.select(["turns", "broken"]), lexicon, folder)
        restored, words, examples = 0, Counter[str](), dict[str, list[dict[str, str]]]()
        for dialogues_changed, words_changed, some in in_processes(job, files, processes, "writing"):
            restored += dialogues_changed
            words += words_changed
            for rule, found in some.items():
                examples[rule] = [*examples.get(rule, []), *found][:_EXAMPLES]
        report |= {
            "files": [name for name, _ in files],
            "restored": {"dialogues": restored, "words": dict(words.most_common())},
            "eval_sets": sets.rows,
            "examples": examples,
        }
        write_text(folder / "report.md", markdown(report))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, "source": source, **report})
    return report


# -- raw rows --------------------------------------------------------------------------------------------------------


@dataclass
class Dialogue:
    """The turns of one row up to its last answer."""

    messages: list[Message] = field(default_factory=list)
    fault: str = ""  # why the row is dropped
    detail: str = ""  # of the fault or the cut
    refusal: str = ""  # the rule by which it was cut

    def texts(self, *roles: str) -> list[str]:
        """The turns of some roles."""
        return [message["content"] for message in self.messages if message["role"] in roles]


def open_raw(path: str, split: str | None = None) -> Source:
    """Open raw conversations: a file, a folder, or a hub id."""
    rows = open_rows(DatasetSpec(path=path, split=split), "--split {}")
    try:
        kind = detect(rows.columns, "sft", rows.label)
    except UserError as error:
        raise UserError(error.message, "If the columns have other names, rename them in the file.") from None
    if kind == PLAIN:
        raise UserError(f"{rows.label}: found {kind}; conversations are needed.", "Name a set of conversations.")
    logger.info(f"{path}: read as {kind}, {len(rows):,} rows")
    return rows.select_columns(COLUMNS)


def place_of(raw: Source, row: int) -> str:
    """``train_3.jsonl line 17``, or ``train.parquet row 17``, counted from 1."""
    return raw.table[row]["place"] if raw.is_text else f"{raw.label} row {row + 1}"


def dialogues(raw: Source, rows: slice | Sequence[int]) -> list[Dialogue]:
    """Some rows as dialogues; a row that cannot be read has a fault."""
    found = []
    for values in raw[rows]:
        try:
            messages = normalise(values, "sft").value["messages"]
            if any(set(message) > {"role", "content"} or message["role"] == "tool" for message in messages):
                raise RowError("tool calls, reasoning or turns that are not to be trained, which are not cleaned")
            roles = [message["role"] for message in messages]
            if "user" not in roles[:2]:
                raise RowError("does not begin with the user" if "user" in roles else "the user says nothing")
            found.append(Dialogue(messages))
        except RowError as error:
            found.append(Dialogue(fault=str(error)))
    return found


# -- the first pass --------------------------------------------------------------------------------------------------


def scan(raw: Source, options: Options, sets: EvalSets, block: range) -> tuple[pa.Table, Lexicon]:
    """Scan a block of rows: a table of ``_SCANNED`` with a row for each, and the words of its well-written dialogues."""
    found = dialogues(raw, slice(block.start, block.stop))
    for dialogue in found:
        if options.refusals:
            _cut(dialogue)
    bounds = np.cumsum([0, *(len(dialogue.messages) for dialogue in found)])
    words = words_of([message["content"] for dialogue in found for message in dialogue.messages])
    whole = words.joined(bounds)
    marks = np.zeros((len(found), PERMUTATIONS), np.uint16) if options.near is None else signatures(whole)
    overlaps = sets.find(words)
    records = []
    well: list[Dialogue] = []
    for dialogue, start, end, length, mark in zip(found, bounds, bounds[1:], np.diff(whole.offsets), marks):
        turns = dialogue.messages
        overlap = next((overlaps[text] for text in range(start, end) if text in overlaps), None)
        if not dialogue.fault:
            if len(turns) - (turns[0]["role"] == "system") < options.min_turns:
                dialogue.fault = f"fewer than {options.min_turns} turns"
            elif length < (options.min_words or 0):
                dialogue.fault, dialogue.detail = f"shorter than {options.min_words} words", f"{length} words"
            elif options.max_words is not None and length > options.max_words:
                dialogue.fault, dialogue.detail = f"longer than {options.max_words} words", f"{length} words"
            elif overlap is not None:
                dialogue.fault, dialogue.detail = f"overlaps with {overlap[0]}", overlap[1]
        sides = ["user", "assistant"] if options.truecase and not dialogue.fault else []
        broken = [side for side in sides if is_broken(dialogue.texts(side))]
        if not dialogue.fault and not broken and is_english(turns[-1]["content"]):
            well.append(dialogue)
        content = [*(turn["role"] for turn in turns), *(turn["content"].strip().lower() for turn in turns)]
        records.append(
            {
                "fault": dialogue.fault,
                "detail": dialogue.detail,
                "turns": len(turns),
                "refusal": dialogue.refusal,
                "broken": " ".join(broken),
                "prompt": _hash("" if dialogue.fault else dialogue.texts("user")[0]),
                "content": _hash("\0".join(content)),
                "signature": mark,
            }
        )
    lexicon = Lexicon()
    every = -(-len(raw) // LEARN_ROWS)
    if options.truecase and options.lexicon is None and block.start // BLOCK % every == 0:
        lexicon.learn("\n".join(dialogue.texts("system", "user", "assistant")) for dialogue in well)
    return pa.Table.from_pylist(records, _SCANNED), lexicon


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _cut(dialogue: Dialogue) -> None:
    """Remove the first refusal with its question and all later turns."""
    turns = dialogue.messages
    for place, turn in enumerate(turns):
        asked = turns[place - 1]["content"] if place and turns[place - 1]["role"] == "user" else ""
        found = refusal(asked, turn["content"]) if turn["role"] == "assistant" else None
        if found is None:
            continue
        dialogue.refusal, start, end = found
        dialogue.detail = " ".join(turn["content"][max(0, start - 20) : end + 80].split())
        while place and turns[place - 1]["role"] != "assistant":
            place -= 1
        dialogue.messages = turns[:place]
        if not dialogue.texts("assistant"):
            dialogue.fault = f"begins with a refusal ({dialogue.refusal})"
        return


# -- all rows ----------------------------------------------------------------------------------------------------------


def find_duplicates(scanned: pa.Table, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Exact and near duplicates (from a similarity on; None: none) among the rows without a fault.

    Returns:
        (object [rows]: the fault of each row, "" if it is kept; int64 [rows]: of a duplicate, the first row of its group, which
        is kept, and otherwise the row itself).
    """
    fault = np.array(scanned["fault"].to_pylist(), object)
    itself = np.arange(len(fault))
    first = itself.copy()
    rows = np.flatnonzero(fault == "")
    first[rows] = first_of_equal(scanned["content"].to_numpy(), rows)
    fault[first != itself] = "an exact duplicate"
    if threshold is not None:
        marks = scanned["signature"].combine_chunks().flatten().to_numpy().reshape(-1, PERMUTATIONS)
        near = join_near(marks, np.flatnonzero(fault == ""), threshold)
        joined = near != itself
        fault[joined], first[joined] = "a near duplicate", near[joined]
    return fault, first


def _list_dropped(
    raw: Source, scanned: pa.Table, fault: np.ndarray, first: np.ndarray, path: Path
) -> dict[str, dict[str, int]]:
    """Write reason, place and detail of each row that is dropped or cut; returns how many there are by reason and rule."""
    dropped, cut = Counter[str](), Counter[str]()
    refusals = scanned["refusal"].to_pylist()
    with path.open("w", encoding="utf-8") as file:
        file.write("reason\tplace\tdetail\n")
        for row, (reason, refusal, original) in enumerate(zip(fault, refusals, first.tolist())):
            if not reason and not refusal:
                continue
            detail = scanned["detail"][row].as_py() if original == row else f"of {place_of(raw, original)}"
            if reason:
                dropped[reason] += 1
            else:
                cut[refusal] += 1
                reason = f"cut before a refusal ({refusal}); the rest stays"
            file.write(f"{reason}\t{place_of(raw, row)}\t{' '.join(detail.split())}\n")
    return {"dropped": dict(dropped.most_common()), "cut": dict(cut.most_common())}


# -- the second pass ---------------------------------------------------------------------------------------------------

Examples = dict[str, list[dict[str, str]]]  # rule → {place, before, after} of a few of its changes


def write_shard(
    raw: Source, scanned: pa.Table, lexicon: Lexicon, folder: Path, shard: tuple[str, np.ndarray]
) -> tuple[int, Counter[str], Examples]:
    """Write one file (name, rows), with the capitals of broken turns restored.

    Args:
        scanned: the columns ``turns`` and ``broken`` of the first pass.

    Returns:
        (number of dialogues that were changed, number of words by rule, examples).
    """
    name, rows = shard
    restored, words, examples = 0, Counter[str](), Examples()
    tables = []
    for numbers in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        records = []
        found = dialogues(raw, numbers.tolist())
        for row, dialogue, values in zip(numbers.tolist(), found, scanned.take(pa.array(numbers)).to_pylist()):
            dialogue.messages = dialogue.messages[: values["turns"]]
            before = words.total()
            for turn in dialogue.messages:
                text = turn["content"]
                turn["content"], changes = (
                    restore(text, lexicon) if turn["role"] in values["broken"].split() else (text, [])
                )
                for start, rule, _ in changes:
                    words[rule] += 1
                    if words[rule] <= _EXAMPLES:
                        near = slice(max(0, start - _CONTEXT), start + _CONTEXT)
                        example = {"place": place_of(raw, row), "before": text[near], "after": turn["content"][near]}
                        examples.setdefault(rule, []).append(example)
            restored += words.total() > before
            prompt = dialogue.texts("user")[0]
            prompt_id = hashlib.sha256(prompt.encode()).hexdigest()
            records.append({"prompt": prompt, "prompt_id": prompt_id, "messages": dialogue.messages})
        tables.append(pa.Table.from_pylist(records, _ROW.arrow_schema))
    write_rows(folder / name, pa.concat_tables(tables))
    return restored, words, examples


# -- the report --------------------------------------------------------------------------------------------------------


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
