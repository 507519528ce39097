"""The rows of a file: JSONL, JSON, CSV, TSV (compressed or not) or Parquet, as JSON text with their places.

No types are inferred from values, so a date, a ZIP code or an answer that is JSON stays a text, and keys may differ from
row to row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..io.text import shown
from .formats import COLUMNS

KINDS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2")  # of text files
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
# a row of a text file: its JSON, and its place for messages ("rows.jsonl line 3")
TEXT_ROWS = datasets.Features({"json": datasets.Value("large_string"), "place": datasets.Value("string")})
_NO_SPACE = re.compile(r"\S")
BATCH = 1000  # rows of a Parquet file that are read at once


def kind_and_stem(path: Path) -> tuple[str | None, str]:
    """A file's kind by its suffixes (json, csv, tsv or parquet; None: it is not read), and its name without them."""
    compressed = path.suffix.lower() in COMPRESSED
    inner = Path(path.stem) if compressed else path
    kind = KINDS.get(inner.suffix.lower())
    return None if compressed and kind == "parquet" else kind, inner.stem


def read_rows(files: tuple[str, ...], kind: str) -> Iterator[dict[str, str]]:
    """The rows of files of one kind (json, csv, tsv or parquet) as ``TEXT_ROWS``. Whether a JSONL's lines are JSON is seen
    when they are used."""
    read = {"json": _json_rows, "parquet": _parquet_rows}.get(kind, _csv_rows)
    for file in map(Path, files):
        try:
            for place, text in read(file):
                yield {"json": text, "place": f"{file} {place}"}
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror or error}.", "Fetch the file again.") from None


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, decompressed if its content is compressed, whatever its name."""
    with file.open("rb") as opened:
        start = opened.read(4)
    compression = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)
    with io.BufferedReader(pa.input_stream(str(file), compression=compression), 2**20) as opened:
        for number, line in enumerate(opened, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} line {number}: not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}).",
                    "Save the file as UTF-8.",
                ) from None


def _json_rows(file: Path) -> Iterator[tuple[str, str]]:
    """A row a line; or, if the first line is not a row, the values of one array, or objects over several lines."""
    lines = ((f"line {number}", text) for number, line in enumerate(_lines(file), 1) if (text := line.strip()))
    first = next(lines, None)
    if first is None:
        return
    try:
        is_row = not first[1].startswith("[") and _wrapped_rows(json.loads(first[1])) is None
    except (ValueError, RecursionError):
        is_row = False
    if is_row:
        yield from chain([first], lines)
    else:
        yield from ((f"row {number}", json.dumps(row)) for number, row in enumerate(_document_rows(file), 1))


def _wrapped_rows(value: Any) -> list[Any] | None:
    """The rows of ``{"version": 1, "data": [{…}, …]}``; None for any other value."""
    if not isinstance(value, dict) or set(value) & (set(COLUMNS) - {"data"}):
        return None
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0]:
        return None
    for row in lists[0]:  # turns are no rows
        if not isinstance(row, dict) or {"role", "from"} & set(row) or set(row) == {"input", "output"}:
            return None
    return lists[0]


def _document_rows(file: Path) -> list[Any]:
    """The values of a JSON array, or JSON values one after another."""
    values: list[Any] = []
    text, position = "".join(_lines(file)), 0
    try:
        while found := _NO_SPACE.search(text, position):
            value, position = json.JSONDecoder().raw_decode(text, found.start())
            values.append(value)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} line {error.lineno}: broken JSON: {error.msg}: {text[error.pos : error.pos + 60]!r}.",
            "Correct the line, or remove it.",
        ) from None
    except (RecursionError, ValueError) as error:  # too many brackets, or digits of a number
        raise UserError(f"{file}: broken JSON: {error}.", "Correct the file, or remove it.") from None
    if len(values) > 1:
        return values
    return values[0] if isinstance(values[0], list) else _wrapped_rows(values[0]) or values


def _parquet_rows(file: Path) -> Iterator[tuple[str, str]]:
    batches = pq.ParquetFile(file).iter_batches(BATCH)
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        # a date or bytes become objects, which are not mistaken for text
        text = json.dumps(_without_nulls(row), ensure_ascii=False, default=lambda v: {type(v).__name__: str(v)})
        yield f"row {number}", text


def _csv_rows(file: Path) -> Iterator[tuple[str, str]]:
    """Every cell is text, except lists of turns, which a CSV can only hold as JSON."""
    csv.field_size_limit(2**31 - 1)
    first = next(_lines(file), "")
    delimiter = next((sign for sign in ",;\t" if sign in first), ",") if kind_and_stem(file)[0] == "csv" else "\t"
    reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = [name or f"unnamed {place}" for place, name in enumerate(next(reader, []), 1)]
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise csv.Error(f"two columns are called {shown(twice[0])!r}")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise csv.Error(f"expected {len(header)} cells, found {len(cells)}")
            if cells:
                row = {name: _cell(cell) for name, cell in zip(header, cells)}
                yield f"line {start}", json.dumps(row, ensure_ascii=False)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file} line {start}: not readable as CSV: {error}.",
            "Every row has as many cells as the header; a cell with separators, quotes or newlines is in double quotes.",
        ) from None


def _cell(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return text
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return text
    are_turns = turns and all(isinstance(turn, dict) and {"role", "from"} & set(turn) for turn in turns)
    return turns if are_turns else text


def raw_rows(batch: Mapping[str, Sequence[Any]], label: str) -> list[dict[str, Any]]:
    """The rows of a batch of a source's table."""
    if list(batch) != list(TEXT_ROWS):
        try:
            columns = {name: batch[name] for name in batch}
        except UnicodeDecodeError:  # Arrow does not check text
            raise UserError(f"{label}: text that is not UTF-8.", "Make the file again, in UTF-8.") from None
        return [{name: _without_nulls(value) for name, value in zip(columns, row)} for row in zip(*columns.values())]
    rows = []
    for text, place in zip(batch["json"], batch["place"]):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}: broken JSON: {getattr(error, 'msg', error)}: {text[:60]!r}.",
                "Correct the line, or remove it; each line holds one row.",
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: expected an object {{…}}, found {text[:60]!r}.", "Each row is one object.")
        rows.append(row)
    return rows


def _without_nulls(value: Any) -> Any:
    """A value without the nulls in its objects: Arrow gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
