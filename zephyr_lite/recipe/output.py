"""The output folder of a data command, its files, and its worker processes."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from ..data.workers import interruptible
from ..errors import UserError
from ..io.atomic import make_folder, refuse_others, sweep
from ..io.run_dir import read_json

FileFormat = Literal["parquet", "jsonl"]
Item = TypeVar("Item")
Result = TypeVar("Result")
REPORT, DROPPED = "report.json", "dropped.tsv"
_job: Callable[[Any], Any]


def claim(
    out: Path, sources: Sequence[str], made_by: str, overwrite: bool, test: float | None, **options: Any
) -> str | None:
    """Check a data command's output folder before any work.

    Args:
        sources: paths (``PATH#SPLIT`` too) or hub ids that are read.
        made_by: the field of ``report.json`` in an earlier result, which ``overwrite`` allows to replace.
        test: size of the test split.
        options: everything else that the result depends on.

    Returns:
        A hash of the options, the sources, and the sizes and dates of their files, to be saved as ``request`` in
        ``report.json``; None: the folder has the result of the same request already.

    Raises:
        UserError: the folder cannot be made, or holds a source or anything but an earlier result; ``test`` is invalid.
    """
    if test is not None and not (0 <= test < 1 or (test >= 1 and float(test).is_integer())):
        raise UserError(f"test {test:g}: is neither a share below 1 nor a number of rows.", "Write --test 0.1.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder.", "Choose another --out.")
    make_folder(out.parent)
    files = []
    for source in sources:
        path = Path(source if Path(source).expanduser().exists() else source.partition("#")[0]).expanduser()
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{out} holds the source {source}, which it would replace.", "Choose another --out.")
        for file in [path, *(sorted(path.rglob("[!.]*")) if path.is_dir() else [])]:
            if file.is_file() and out.resolve() not in file.resolve().parents:
                files.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
    values = (list(sources), sorted((options | {"test": test}).items()), files)
    request = hashlib.sha256(repr(values).encode()).hexdigest()
    sweep(out.absolute().parent, out.name)
    if not out.is_dir() or not any(out.iterdir()):
        return request
    report = read_json(out / REPORT) or {}
    refuse_others(out, report.get("made_by") == made_by, f"a result of {made_by}")
    if not overwrite and report.get("request") != request:
        raise UserError(
            f"{out} holds a set that {made_by} made with other options, of other files, or in an earlier version.",
            "Replace it with --overwrite, or choose another --out.",
        )
    return request if overwrite else None


def held_out(keys: np.ndarray, test: float) -> np.ndarray:
    """bool [rows]: the rows of the test split, a share (below 1) or a number; rows of one key (uint64, a hash) stay together."""
    if test < 1:
        return keys < np.uint64(int(test * 2.0**64))
    return keys < np.sort(keys)[int(test)] if test < len(keys) else np.ones(len(keys), bool)


def shards(split: str, rows: np.ndarray, most: int, file_format: FileFormat) -> list[tuple[str, np.ndarray]]:
    """The files of a split, named as on the hub, each with at most so many of its rows."""
    count = -(-len(rows) // most)
    names = [split] if count == 1 else [f"{split}-{n:05d}-of-{count:05d}" for n in range(count)]
    return [(f"{name}.{file_format}", part) for name, part in zip(names, np.array_split(rows, max(1, count)))]


def write_rows(path: Path, table: pa.Table) -> None:
    """Write a JSONL file in UTF-8, or Parquet compressed with zstd, by the file's suffix; the same rows give the same bytes."""
    if path.suffix == ".parquet":
        pq.write_table(table.combine_chunks(), path, row_group_size=1000, compression="zstd")
        return
    with path.open("w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=1000):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())


def in_processes(job: Callable[[Item], Result], items: Iterable[Item], processes: int, title: str) -> Iterator[Result]:
    """``map(job, items)`` in order, with a progress bar in a terminal; the job is sent to each process once."""
    items = list(items)
    bar = partial(track, description=title, total=len(items), console=Console(stderr=True), transient=True)
    processes = min(processes, len(items))
    if processes <= 1:
        yield from bar(map(job, items), disable=not sys.stderr.isatty())
        return
    with interruptible(), multiprocessing.Pool(processes, _start, (job,)) as pool:
        yield from bar(pool.imap(_run, items), disable=not sys.stderr.isatty())


def _start(job: Callable[[Any], Any]) -> None:
    global _job
    _job = job


def _run(item: Any) -> Any:
    return _job(item)
