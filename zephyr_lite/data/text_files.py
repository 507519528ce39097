"""JSON, JSONL, CSV and TSV files as an Arrow table with one JSON text a row.

Nothing is inferred from values: a date, a ZIP code or an answer that is JSON stays the text that it is, and keys may differ
from row to row. The table is kept in datasets' cache and memory-mapped.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from ..errors import UserError
from ..io.atomic import bytes_aside, make_folder
from ..io.strict_json import shown
from .formats import COLUMNS

ROW_BYTES = 64 * 2**20
DOCUMENT_BYTES = 4 * 2**30  # a JSON file that is one array or object is held in memory as a whole
SCHEMA = pa.schema({"json": pa.large_string(), "file": pa.string(), "line": pa.int64()})

_BATCH_ROWS, _BATCH_BYTES = 1000, 16 * 2**20
_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"))
_POINTER = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_decoder = json.JSONDecoder()

Row = tuple[int, str]


def read_table(files: Sequence[Path], kind: str) -> datasets.Dataset:
    """The rows of text files as a table of ``SCHEMA``.

    Args:
        files: read in this order.
        kind: json, csv or tsv; parquet where the files' schemas differ.

    Raises:
        UserError: a file cannot be read; names the file and the line. Whether a JSONL's lines are JSON is checked by
            ``parse``.
        OSError: the cache cannot be written.
    """
    # by its content's code too: another version may read the same file differently
    state = repr([file_state(file) for file in files]) + kind + Path(__file__).read_text(encoding="utf-8")
    fingerprint = hashlib.sha256(state.encode()).hexdigest()[:32]
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "zephyr-lite-rows" / f"{fingerprint}.arrow"
    if not cached.is_file():
        make_folder(cached.parent)
        with bytes_aside(cached) as out, pa.ipc.new_stream(out, SCHEMA) as writer:
            for file in files:
                for batch in _batches(_rows(file, kind)):
                    lines, texts = zip(*batch)
                    writer.write_table(pa.table([texts, [str(file)] * len(batch), lines], schema=SCHEMA))
    table = datasets.Dataset.from_file(str(cached))
    table._fingerprint = fingerprint
    return table


def file_state(file: Path) -> tuple[Any, ...]:
    """What changes when a file does. The time of the inode's change cannot be set, unlike that of the modification."""
    stat = file.stat()
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row[1])
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def refuse_pointer(file: Path) -> None:
    """Raise a UserError where a file is what Git LFS leaves in place of the data."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file}: holds a Git LFS pointer, not the data.",
                "Fetch the file itself: `git lfs pull`, or `hf download`.",
            )


def _rows(file: Path, kind: str) -> Iterator[Row]:
    try:
        refuse_pointer(file)
        yield from {"json": _json_rows, "parquet": _parquet_rows}.get(kind, _csv_rows)(file, kind)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror or error}.", "Check the file, or fetch it again."
        ) from None


def _opened(file: Path) -> Any:
    with file.open("rb") as opened:
        start = opened.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: is UTF-16 text.", "Save the file as UTF-8.")
    compression = next((name for magic, name in _COMPRESSED if start.startswith(magic)), None)
    # by its content, whatever its name: servers and browsers decompress, and keep the name
    if compression is None:
        return file.open("rb", buffering=2**20)
    return io.BufferedReader(pa.input_stream(str(file), compression=compression), 2**20)


def _decoded(line: bytes, file: Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} line {number}: not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}).",
            "Save the file as UTF-8.",
        ) from None


# -- JSON ----------------------------------------------------------------------------------------------------------------


def _json_rows(file: Path, kind: str) -> Iterator[Row]:
    with _opened(file) as opened:
        empty = True
        for number, line in enumerate(iter(lambda: opened.readline(ROW_BYTES + 1), b""), 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            if empty and _is_document(line):
                break
            empty = False
            if len(line) > ROW_BYTES:
                raise UserError(
                    f"{file} line {number}: longer than {ROW_BYTES:,} bytes, the limit for one row.",
                    "Each row ends with a newline: split or remove this one.",
                )
            yield number, _decoded(line, file, number).strip()
        else:
            return
    yield from _document_rows(file)


def _is_document(line: bytes) -> bool:
    """Whether a file whose first line this is holds one array or object over many lines, not one row a line."""
    if line.lstrip().startswith(b"[") or len(line) > ROW_BYTES:
        return True
    try:
        return _wrapped(json.loads(line)) is not None
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip()) and error.doc.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _wrapped(value: Any) -> list[Any] | None:
    """The rows of ``{"version": 1, "data": [{…}, …]}``."""
    if not isinstance(value, dict) or set(value) & (
        set(COLUMNS) - {"data", "messages", "conversations", "conversation"}
    ):
        return None
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0] or not all(isinstance(item, dict) for item in lists[0]):
        return None
    turns = any("role" in item or "from" in item or set(item) == {"input", "output"} for item in lists[0])
    return None if turns else lists[0]


def _document_rows(file: Path) -> Iterator[Row]:
    """The values of one array, or of objects over several lines, each as it is written."""
    blocks, size = [], 0
    with _opened(file) as opened:
        while block := opened.read(2**24):
            blocks.append(block)
            if (size := size + len(block)) > DOCUMENT_BYTES:
                raise UserError(
                    f"{file}: one JSON array of more than {DOCUMENT_BYTES:,} bytes, the limit.",
                    "Save it as JSONL, one row a line: that is read in pieces.",
                )
    data = b"".join(blocks)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {number}: not UTF-8.", "Save the file as UTF-8.") from None
    del data, blocks
    values = _values(text, file)
    first, second = next(values, None), next(values, None)
    if first and second is None and (rows := _wrapped(first[0])) is not None:
        yield from ((1, json.dumps(row, ensure_ascii=False)) for row in rows)
        return
    line, seen = 1, 0
    for _, start, end in chain((value for value in (first, second) if value), values):
        line, seen = line + text.count("\n", seen, start), start
        yield line, text[start:end]


def _values(text: str, file: Path) -> Iterator[tuple[Any, int, int]]:
    position = _space(text, 0)
    array = text.startswith("[", position)
    position += array
    try:
        while (position := _space(text, position)) < len(text) and not (array and text.startswith("]", position)):
            value, end = _decoder.raw_decode(text, position)
            yield value, position, end
            position = _space(text, end)
            if array and not text.startswith("]", position):
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position += 1
        if array and _space(text, position + 1) < len(text):
            raise json.JSONDecodeError("Extra data", text, position + 1)
    except RecursionError:
        raise UserError(f"{file}: nested too deeply.", "Correct or remove the row.") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} line {error.lineno}: broken JSON: {error.msg} at character {error.colno}.",
            "Correct the line, or remove it.",
        ) from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{file}: broken JSON: {str(error).split(';')[0]}.", "Correct or remove the row.") from None


def _space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def parse(text: str, file: str, line: int) -> dict[str, Any]:
    """One row of a table of ``SCHEMA``.

    Raises:
        UserError: it is no JSON, no object, or has a key twice; names the file and the line.
    """
    place = f"{file} line {line}"
    try:
        row = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except _Twice as twice:
        raise UserError(f"{place}: key {shown(twice)!r} appears twice in one object.", "Keep one of them.") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply.", "Correct or remove the row.") from None
    except UnicodeEncodeError:
        raise UserError(
            f"{place}: text that is not valid Unicode (half a surrogate pair).", "Correct the line, or remove it."
        ) from None
    except ValueError as error:
        if "\0" in text:
            raise UserError(
                f"{place}: NUL bytes; the file was not written to its end, or is not text.",
                "Remove the line, or make the file again.",
            ) from None
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"{place}: broken JSON: {reason.split(';')[0]}: {text[:60]!r}.",
            "Correct the line, or remove it; each line holds one row.",
        ) from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected an object {{…}}, found {text[:60]!r}.", "Each row is one object.")
    return row


class _Twice(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return values


# -- Parquet -------------------------------------------------------------------------------------------------------------


def _parquet_rows(file: Path, kind: str) -> Iterator[Row]:
    batches = pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH_ROWS)
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        yield number, json.dumps(without_nulls(row), ensure_ascii=False, default=_typed)


def _typed(value: Any) -> dict[str, str]:
    """A date or bytes, as something that is not taken for text."""
    return {type(value).__name__: str(value)}


def without_nulls(value: Any) -> Any:
    """Arrow gives every object all keys that one of them has: those that are null were not there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# -- CSV and TSV ---------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path, kind: str) -> Iterator[Row]:
    """Every cell is text, but for a list of turns, which no other form of a CSV can hold."""
    csv.field_size_limit(ROW_BYTES)
    with _opened(file) as opened:
        first = opened.readline(ROW_BYTES).removeprefix(_BOM)
        numbered = enumerate(chain([first] if first else [], opened), 1)
        lines = (_decoded(line, file, number) for number, line in numbered)
        reader = csv.reader(lines, delimiter=_delimiter(first, kind), strict=True)
        start = 1
        try:
            header = [name or f"unnamed {place}" for place, name in enumerate(next(reader, []), 1)]
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{file} line 1: two columns are called {shown(twice)!r}.", "Rename one of them.")
            start = reader.line_num + 1
            for cells in reader:
                if len(cells) > len(header):
                    raise csv.Error(f"expected {len(header)} cells, found {len(cells)}")
                if cells:
                    yield start, json.dumps({n: _cell(c) for n, c in zip(header, cells)}, ensure_ascii=False)
                start = reader.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{file} line {start}: not readable as {kind.upper()}: {error}.",
                "Every row has as many cells as the header; a cell with separators, quotes or newlines is in double quotes.",
            ) from None


def _delimiter(header: bytes, kind: str) -> str:
    if kind == "tsv" or (b"\t" in header and b"," not in header and b";" not in header):
        return "\t"
    return ";" if b";" in header and b"," not in header else ","


def _cell(text: str) -> Any:
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    turns = isinstance(value, list) and value and all(isinstance(t, dict) and {"role", "from"} & set(t) for t in value)
    return value if turns else text
