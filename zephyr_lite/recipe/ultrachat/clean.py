"""``zephyr-lite data chat``: raw conversations → train and test splits like ultrachat_200k's, and a report.

Two passes through ``datasets.map``: the first looks at each row alone (in blocks, ``scan``), rows are compared with each
other in between (``duplicates``), and the second writes what stays (``write``). What a pass holds in memory does not depend
on the number of rows, nor does any result on the number of processes. The first pass is cached in legs: an interrupted
command goes on with the leg that it was in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from ...data import formats, messages
from ...data.output import DROPPED, REPORT, check_held_out, check_output, request_of
from ...data.workers import quiet
from ...errors import UserError
from ...io.atomic import flock, remove_tree
from ...io.run_dir import folder_aside, write_json, write_text
from .contamination import NGRAM, EvalSets, read_eval_sets
from .counting import WordCounts
from .duplicates import find_duplicates, test_limit, write_kept
from .lexicon import Lexicon
from .raw import Raw, open_raw
from .report import ChatReport, account, markdown
from .scan import BLOCK, FEATURES, ScanRules, scan
from .write import STATS, Format, Restored, shards_of, write_shard

MADE_BY = "zephyr-lite data chat"
LEXICON = "lexicon.txt"
LEG = 100_000  # rows of the first pass that are cached together
# The lexicon is learned from so many rows at most, in blocks spread evenly over the corpus: that bounds its memory.
LEARN_ROWS = 100_000


@dataclass(frozen=True)
class Options:
    """What the cleaning does.

    Attributes:
        truecase, refusals: whether to restore capitals, and to cut dialogues before a refusal out of habit.
        near: similarity of near duplicates; None for exact ones only.
        min_turns, min_words, max_words: of a dialogue.
        decontaminate: evaluation sets; see ``contamination.read_eval_sets``.
        ngram: words of an overlap.
        test: share of the prompts, or number of rows, of the test split; 0 for none.
        lexicon: a file of an earlier run instead of learning one.
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
    file_format: Format = "parquet"

    def check(self) -> None:
        """Raises UserError for a value that means nothing."""
        if self.near is not None and not 0.5 <= self.near <= 1:
            raise UserError(
                f"near {self.near:g}: a similarity from 0.5 to 1 is needed.", "The default is 0.8; 0 is off."
            )
        if self.min_turns < 2:
            raise UserError(f"min-turns {self.min_turns}: a question and an answer are two turns.")
        low, high = self.min_words or 0, self.max_words
        if low < 0:
            raise UserError(f"min-words {low}: cannot be below 0.")
        if high is not None and high < max(low, 1):
            raise UserError(f"min-words {low} and max-words {high} leave no row.")
        if not 2 <= self.ngram <= 60:
            raise UserError(f"ngram {self.ngram}: 2 to 60 words are needed.", f"The default is {NGRAM}.")
        if self.lexicon is not None and not self.truecase:
            raise UserError("a lexicon means nothing without truecasing.", "Leave one of the two options out.")


def clean_chat(
    source: str,
    out: Path,
    options: Options,
    *,
    split: str | None = None,
    num_proc: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ChatReport | None:
    """Clean a set of conversations.

    Args:
        source: a file, a folder or a hub id; see ``raw.open_raw``.
        out: the folder to make: train_sft and test_sft, report.md, report.json, dropped.tsv, lexicon.txt.
        options: what to do.
        split: of the source.
        num_proc: processes; None for all cores. The files are the same for any number.
        overwrite: replace the folder, if it was made by this command.
        say: gets a line for each step.

    Returns:
        None: ``out`` holds this very set already.

    Raises:
        UserError: an option, the source or the folder has to change, or no row is left.
    """
    options.check()
    check_held_out(options.test, num_proc)
    files = [source, *options.decontaminate, *([str(options.lexicon)] if options.lexicon is not None else [])]
    request = request_of(out, files, options=options, split=split)
    if check_output(out, [source], MADE_BY, overwrite, request):
        return None
    given = Lexicon.load(options.lexicon) if options.lexicon is not None else None
    raw = open_raw(source, split)
    say(f"{source}: read as {raw.kind}, {len(raw.rows):,} rows")
    sets = read_eval_sets(options.decontaminate, options.ngram)
    rules = ScanRules(
        options.refusals,
        options.truecase,
        given is None,
        options.near is not None,
        options.min_turns,
        options.min_words,
        options.max_words,
    )
    processes = num_proc or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_proc or 1
    with _cache() as cache:
        scanned = _scan(raw, rules, sets, processes, cache)
    with folder_aside(out) as folder:
        work = folder / "work"
        work.mkdir()
        fates = find_duplicates(scanned, work, options.near)
        report = account(raw, scanned, fates, folder / DROPPED)
        report.eval_sets = dict(zip(sets.names, sets.rows))
        if not report.kept:
            raise UserError(
                f"{source}: no row is left of {len(raw.rows):,}: {report.reasons()}.",
                "The reasons say what to change: the limits, the filters, or the source.",
            )
        lexicon = None
        if options.truecase:
            lexicon = given or _learned(scanned)
            lexicon.save(folder / LEXICON)
            report.names = len(lexicon.names())
        kept = write_kept(fates, test_limit(fates, options.test), work)
        if not kept["train_sft"][1]:
            raise UserError(
                f"{source}: all {report.kept:,} rows that are left would be test rows.",
                "Choose a smaller --test, or 0.",
            )
        report.splits = {name: count for name, (_, count) in kept.items()}
        report.restored, report.files = _write(raw, scanned, kept, lexicon, folder, options.file_format, processes)
        shutil.rmtree(work)
        write_text(folder / "report.md", markdown(report, raw))
        write_json(folder / REPORT, {"made_by": MADE_BY, "request": request, "source": source, **report.as_dict(raw)})
    return report


def _key(*values: Any) -> str:
    """A fingerprint of values and of this package's code: datasets cannot hash what a mapped function calls."""
    digest = hashlib.sha256(repr(values).encode())
    here = Path(__file__).parent
    for file in sorted([*here.glob("*.py"), Path(formats.__file__), Path(messages.__file__)]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


@contextmanager
def _cache() -> Iterator[Path]:
    """The folder for the first pass's results. Temporary files that killed processes left there are removed, unless another
    process has a lock on it."""
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "zephyr-lite-chat"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{cache}: cannot be made: {error.strerror}.",
            "Make it writable, or name another folder in the environment variable HF_DATASETS_CACHE.",
        ) from None
    handle = os.open(cache, os.O_RDONLY)
    try:
        if flock(handle):
            for left in cache.glob("tmp*"):
                remove_tree(left)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield cache
    finally:
        os.close(handle)


def _scan(raw: Raw, rules: ScanRules, sets: EvalSets, processes: int, cache: Path) -> datasets.Dataset:
    """The first pass over all rows, a leg at a time."""
    total = len(raw.rows)
    contents = hashlib.sha256(sets.grams.tobytes() + sets.texts.tobytes()).hexdigest()
    every = max(1, -(-total // LEARN_ROWS))
    legs = []
    for start in range(0, total, LEG):
        stop = min(total, start + LEG)
        starts = list(range(start, stop, BLOCK))
        blocks = datasets.Dataset.from_dict(
            {
                "start": starts,
                "stop": [min(first + BLOCK, stop) for first in starts],
                "learn": [first // BLOCK % every == 0 for first in starts],
            }
        )
        key = _key(raw.rows.table._fingerprint, rules, sets.n, sets.names, contents, start, stop, every)
        with quiet(total <= 2 * BLOCK):
            legs.append(
                blocks.with_format("arrow").map(
                    scan,
                    batched=True,
                    batch_size=1,
                    remove_columns=blocks.column_names,
                    fn_kwargs={"rows": raw.rows, "rules": rules, "sets": sets},
                    features=FEATURES,
                    num_proc=_processes(processes, len(blocks)),
                    new_fingerprint=key,
                    # the table of blocks lies in memory: left to itself, datasets would forget its results at the end
                    cache_file_name=str(cache / f"{key}.arrow"),
                    desc=f"looking at rows {start + 1:,} to {stop:,}",
                )
            )
    return datasets.concatenate_datasets(legs)


def _processes(wanted: int, parts: int) -> int | None:
    count = min(wanted, parts)
    return count if count > 1 else None


def _learned(scanned: datasets.Dataset) -> Lexicon:
    def blocks() -> Iterator[WordCounts]:
        for batch in scanned.select_columns(["lexicon"]).with_format("arrow").iter(batch_size=50 * BLOCK):
            for packed in batch["lexicon"].drop_null().to_pylist():
                yield WordCounts.unpack(packed)

    return Lexicon.of(blocks())


def _write(
    raw: Raw,
    scanned: datasets.Dataset,
    kept: dict[str, tuple[str, int]],
    lexicon: Lexicon | None,
    folder: Path,
    file_format: Format,
    processes: int,
) -> tuple[Restored, list[str]]:
    shards: list[dict[str, Any]] = [
        {"split": split, "name": name, "first": first, "end": end}
        for split, (_, count) in kept.items()
        for name, first, end in shards_of(split, count, file_format)
    ]
    with quiet(sum(count for _, count in kept.values()) <= 2 * BLOCK):
        # the folder is another one each time, and files are written: nothing to be cached
        stats = (
            datasets.Dataset.from_list(shards)
            .with_format("arrow")
            .map(
                write_shard,
                batched=True,
                batch_size=1,
                remove_columns=["split", "name", "first", "end"],
                fn_kwargs={
                    "rows": raw.rows,
                    "scanned": scanned,
                    "folder": str(folder),
                    "kept": {split: file for split, (file, _) in kept.items()},
                    "lexicon": lexicon.decided() if lexicon is not None else None,
                },
                features=STATS,
                num_proc=_processes(processes, len(shards)),
                new_fingerprint=_key(str(folder)),
                load_from_cache_file=False,
                keep_in_memory=True,
                desc="writing",
            )
        )
    restored = Restored()
    for text in stats.with_format(None)["stats"]:
        restored.add(Restored.from_json(text))
    return restored, [shard["name"] for shard in shards]
