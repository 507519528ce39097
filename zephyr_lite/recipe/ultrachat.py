"""``zephyr-lite data chat``: raw conversations → train and test splits like ultrachat_200k's, and a report.

The first pass (``scan``) looks at blocks of rows by themselves: refusals, contamination, broken capitals, signatures. Its results
are kept in datasets' cache, so that an interrupted command continues. Then duplicates are found among all rows, and the second
pass (``write_shard``) writes the rows that are kept, with their capitals restored. The results do not depend on the number of
processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.workers import cache_key, cores
from ..errors import UserError
from ..io.run_dir import folder_aside, write_json, write_text
from .chat_report import EXACT, FAULTY, KEPT, NEAR, ChatReport, Restored, markdown
from .decontamination import NGRAM, EvalSets, read_eval_sets
from .dedup import PERMUTATIONS, first_of_equal, join_near, signatures
from .english import is_english
from .lexicon import Lexicon, count_words
from .output import DROPPED, REPORT, check_held_out, check_output, request_of
from .parallel import in_processes
from .raw_chat import Dialogue, Raw, dialogues, open_raw
from .refusals import first_refusal
from .truecase import is_broken, restore
from .words import words_of
from .writing import FileFormat

logger = logging.getLogger(__name__)

MADE_BY = "zephyr-lite data chat"
LEXICON = "lexicon.txt"
BLOCK, LEG = 500, 100_000  # rows of a block, and of a file of the cache
LEARN_ROWS = 100_000  # rows at most that the lexicon is learned from, spread evenly over the corpus
SHARD_ROWS = 12_500  # rows of an output file
SIDES = ("user", "assistant")  # bit 0 and bit 1 of the column ``broken``
_CONTEXT = 40  # characters around an example's change
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
_MESSAGE = pa.struct({"content": pa.string(), "role": pa.string()})
_ROW = pa.schema({"prompt": pa.string(), "prompt_id": pa.string(), "messages": pa.list_(_MESSAGE)})


@dataclass(frozen=True)
class Options:
    """Options of the cleaning.

    Attributes:
        truecase, refusals: whether to restore capitals, and to cut dialogues before a habitual refusal.
        near: similarity of near duplicates; None for exact ones only.
        min_turns, min_words, max_words: of a dialogue.
        decontaminate: evaluation sets; see ``decontamination.read_eval_sets``.
        ngram: words of an overlap with them.
        test: share of the prompts, or number of rows, of the test split; 0 for none.
        lexicon: a file of an earlier run instead of a learned one.
        file_format: of the output.
    """

    truecase: bool = True
    refusals: bool = True
    near: float | None = 0.8
    min_turns: int = 2
    min_words: int | None = None
    max_words: int | None = None
    decontaminate: Sequence[str] = field(default_factory=tuple)
    ngram: int = NGRAM
    test: float = 0.1
    lexicon: Path | None = None
    file_format: FileFormat = "parquet"

    def check(self) -> None:
        """Raises UserError for an invalid value."""
        if self.near is not None and not 0.5 <= self.near <= 1:
            raise UserError(f"near {self.near:g}: must be a similarity from 0.5 to 1.", "The default is 0.8; 0 is off.")
        if self.min_turns < 2:
            raise UserError(f"min-turns {self.min_turns}: a question and an answer are two turns.")
        low, high = self.min_words or 0, self.max_words
        if low < 0:
            raise UserError(f"min-words {low}: cannot be below 0.")
        if high is not None and high < max(low, 1):
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
) -> ChatReport | None:
    """Clean a set of conversations.

    Args:
        source: a file, a folder or a hub id; see ``raw_chat.open_raw``.
        out: the folder to make: train_sft and test_sft, report.md, report.json, dropped.tsv, lexicon.txt.
        split: of the source.
        num_proc: processes; None for all cores.
        overwrite: replace the folder if this command made it.

    Returns:
        None: ``out`` is the result of this very request already.

    Raises:
        UserError: an option, the source or the folder is invalid, or no row is left.
    """
    options.check()
    check_held_out(options.test, num_proc)
    files = [source, *options.decontaminate, *([str(options.lexicon)] if options.lexicon is not None else [])]
    request = request_of(out, files, options=options, split=split)
    if check_output(out, [source], MADE_BY, overwrite, request):
        return None
    lexicon = Lexicon.load(options.lexicon) if options.lexicon is not None else None
    raw = open_raw(source, split)
    logger.info(f"{source}: read as {raw.kind}, {len(raw.rows):,} rows")
    sets = read_eval_sets(options.decontaminate, options.ngram)
    processes = num_proc or cores()
    scanned = _scan_all(raw, options, sets, processes)
    report = ChatReport(raw, eval_sets=dict(zip(sets.names, sets.rows)))
    fate, duplicate_of = find_duplicates(scanned, options.near)
    with folder_aside(out) as folder:
        report.count(scanned, fate, duplicate_of, folder / DROPPED)
        if not report.kept:
            raise UserError(
                f"{source}: no row is left of {report.rows:,}: {report.reasons()}.",
                "Change the limits, the filters, or the source.",
            )
        if options.truecase:
            lexicon = lexicon or Lexicon.learned(map(json.loads, scanned["lexicon"].drop_null().to_pylist()))
            lexicon.save(folder / LEXICON)
            report.names = len(lexicon.names)
        shards: list[tuple[Path, np.ndarray]] = []
        for name, rows in _splits(fate, scanned["prompt"].to_numpy(), options.test).items():
            report.splits[name] = len(rows)
            shards += _shards(folder, name, rows, options.file_format)
        if not report.splits["train_sft"]:
            raise UserError(
                f"{source}: all {report.kept:,} rows that are left would be test rows.",
                "Choose a smaller --test, or 0.",
            )
        report.files = [path.name for path, _ in shards]
        job = partial(write_shard, raw, scanned.select(["turns", "broken"]), lexicon)
        for restored in in_processes(job, shards, processes, "writing"):
            report.restored.add(restored)
        write_text(folder / "report.md", markdown(report))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, "source": source, **report.as_dict()})
    return report


# -- the first pass --------------------------------------------------------------------------------------------------


def _scan_all(raw: Raw, options: Options, sets: EvalSets, processes: int) -> pa.Table:
    """Scan all rows; each leg is a file of the cache."""
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "zephyr-lite-chat"
    cache.mkdir(parents=True, exist_ok=True)
    total = len(raw.rows)
    every = max(1, -(-total // LEARN_ROWS))
    rules = [getattr(options, name) for name in ("truecase", "refusals", "min_turns", "min_words", "max_words")]
    rules += [options.lexicon is None, options.near is not None, sets.n, sets.names, every]
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    grams, texts = sets.keys
    key = cache_key(raw.rows.table, {"rules": rules, "code": code, "grams": grams, "texts": texts})
    tables = []
    for start in range(0, total, LEG):
        stop = min(total, start + LEG)
        path = cache / f"{key}-{start}-{stop}.arrow"
        if not path.is_file():
            blocks = [range(first, min(first + BLOCK, stop)) for first in range(start, stop, BLOCK)]
            job = partial(scan, raw, options, sets, every)
            aside = path.with_suffix(f".{os.getpid()}.tmp")
            with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, _SCANNED) as writer:
                for table in in_processes(job, blocks, processes, f"scanning rows {start + 1:,} to {stop:,}"):
                    writer.write_table(table)
            aside.replace(path)
        tables.append(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
    return pa.concat_tables(tables)


def scan(raw: Raw, options: Options, sets: EvalSets, every: int, block: range) -> pa.Table:
    """Scan a block of rows.

    Args:
        every: the lexicon is learned from every so-many-th block.

    Returns:
        A table of ``_SCANNED`` with a row for each.
    """
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
        if not dialogue.fault:
            if options.min_words is not None and length < options.min_words:
                dialogue.fault, dialogue.detail = f"shorter than {options.min_words} words", f"{length} words"
            elif options.max_words is not None and length > options.max_words:
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
    place, rule, start, end = refusal
    text = dialogue.texts[place]
    dialogue.detail = " ".join(text[max(0, start - 20) : end + 80].split())
    dialogue.refusal = rule
    while place and dialogue.roles[place - 1] != "assistant":
        place -= 1
    dialogue.roles, dialogue.texts = dialogue.roles[:place], dialogue.texts[:place]
    if "assistant" not in dialogue.roles:
        dialogue.fault = f"begins with a refusal ({rule})"


def _broken(dialogue: Dialogue) -> int:
    if dialogue.fault:
        return 0
    sides = [[text for text, role in zip(dialogue.texts, dialogue.roles) if role == side] for side in SIDES]
    return sum(is_broken(side) << bit for bit, side in enumerate(sides))


# -- all rows ----------------------------------------------------------------------------------------------------------


def find_duplicates(scanned: pa.Table, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Exact and near duplicates among the rows without a fault; the first row of a group is kept.

    The signatures are held in memory: 256 bytes a row.

    Args:
        threshold: the similarity from which rows are near duplicates; None for exact ones only.

    Returns:
        (uint8 [rows]: KEPT, FAULTY, EXACT or NEAR; int64 [rows]: of a duplicate, the row that is kept).
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


def _splits(fate: np.ndarray, prompts: np.ndarray, test: float) -> dict[str, np.ndarray]:
    """The kept rows of each split; all rows of a prompt are in one.

    Args:
        prompts: uint64 [rows], hashes.
        test: below 1 a share of the prompts; otherwise a number of rows that is not exceeded.
    """
    rows = np.flatnonzero(fate == KEPT)
    keys = prompts[rows]
    if test < 1:
        held_out = keys < np.uint64(int(test * 2.0**64))
    elif test >= len(rows):
        held_out = np.ones(len(rows), bool)
    else:
        held_out = keys < np.sort(keys)[int(test)]
    return {"train_sft": rows[~held_out], "test_sft": rows[held_out]}


# -- the second pass ---------------------------------------------------------------------------------------------------


def _shards(folder: Path, split: str, rows: np.ndarray, suffix: str) -> Iterator[tuple[Path, np.ndarray]]:
    """The files of a split with their rows, named as on the hub."""
    count = -(-len(rows) // SHARD_ROWS)
    each = -(-len(rows) // max(1, count))
    for n in range(count):
        name = split if count == 1 else f"{split}-{n:05d}-of-{count:05d}"
        yield folder / f"{name}.{suffix}", rows[n * each : (n + 1) * each]


def write_shard(raw: Raw, scanned: pa.Table, lexicon: Lexicon | None, shard: tuple[Path, np.ndarray]) -> Restored:
    """Write one file.

    Args:
        scanned: the columns ``turns`` and ``broken`` of the first pass.
        lexicon: of names; None to leave capitals alone.
    """
    path, rows = shard
    restored = Restored()
    tables = []
    for numbers in np.split(rows, range(BLOCK, len(rows), BLOCK)):
        found = dialogues(raw.rows, numbers.tolist())
        for row, dialogue, values in zip(numbers.tolist(), found, scanned.take(pa.array(numbers)).to_pylist()):
            dialogue.roles, dialogue.texts = dialogue.roles[: values["turns"]], dialogue.texts[: values["turns"]]
            restored.turns += values["turns"]
            if values["broken"]:
                _restore(row, dialogue, values["broken"], lexicon, restored)
        records = [
            {
                "prompt": dialogue.prompt,
                "prompt_id": hashlib.sha256(dialogue.prompt.encode()).hexdigest(),
                "messages": [{"content": t, "role": r} for t, r in zip(dialogue.texts, dialogue.roles)],
            }
            for dialogue in found
        ]
        tables.append(pa.Table.from_pylist(records, _ROW))
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            for table in tables:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in table.to_pylist())
    else:
        schema = datasets.Features.from_arrow_schema(_ROW).arrow_schema
        table = pa.concat_tables(tables).cast(schema).combine_chunks()
        pq.write_table(table, path, compression="zstd", compression_level=1)
    return restored


def _restore(row: int, dialogue: Dialogue, broken: int, lexicon: Lexicon | None, restored: Restored) -> None:
    """Restore the capitals of the sides whose bit is set."""
    changed = False
    for place, (role, before) in enumerate(zip(dialogue.roles, dialogue.texts)):
        if role in SIDES and broken >> SIDES.index(role) & 1:
            after, changes = restore(before, lexicon)
            for start, rule, _ in changes:
                around = slice(max(0, start - _CONTEXT), start + _CONTEXT)
                restored.change(rule, row, before[around], after[around])
            changed |= bool(changes)
            dialogue.texts[place] = after
    restored.dialogues += changed
