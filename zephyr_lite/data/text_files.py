"""JSON, JSONL, CSV and TSV files as rows of JSON text.

No types are inferred from values: a date, a ZIP code or an answer that is JSON stays a text, and keys may differ from
row to row.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from ..errors import UserError
from ..io.text import shown
from .formats import COLUMNS, TURNS

FEATURES = datasets.Features(
    {"json": datasets.Value("large_string"), "file": datasets.Value("string"), "line": datasets.Value("int64")}
)

_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bz2"))
_POINTER = b"version https://git-lfs.github.com/spec/"
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")
_EACH_LINE = "Correct the line, or remove it; each line holds one row."
_UTF8 = "Save the file as UTF-8."

Row = tuple[int, str]


def read_rows(files: tuple[str, ...], kind: str) -> Iterator[dict[str, Any]]:
    """Rows of ``FEATURES``: each row's JSON text, its file, and its line or number in it.

    Args:
        files: read in this order.
        kind: json, csv, tsv or parquet.

    Raises:
        UserError: a file cannot be read; names the file and the line. ``parse`` checks whether a JSONL's lines are JSON.
    """
    for file in map(Path, files):
        try:
            refuse_pointer(file)
            rows = {"json": _json_rows, "parquet": _parquet_rows}.get(kind, _csv_rows)(file, kind)
            for line, text in rows:
                yield {"json": text, "file": str(file), "line": line}
        except OSError as error:
            raise UserError(
                f"{file}: cannot be read: {error.strerror or error}.", "Check the file, or fetch it again."
            ) from None


def refuse_pointer(file: Path) -> None:
    """Raise a UserError for a Git LFS pointer in place of the data."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise UserError(
                f"{file}: holds a Git LFS pointer, not the data.",
                "Fetch the file itself: `git lfs pull`, or `hf download`.",
            )


def _opened(file: Path) -> Any:
    """The file, decompressed if its content is, whatever its name."""
    with file.open("rb") as opened:
        start = opened.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: is UTF-16 text.", _UTF8)
    compression = next((name for magic, name in _COMPRESSED if start.startswith(magic)), None)
    if compression is None:
        return file.open("rb", buffering=2**20)
    return io.BufferedReader(pa.input_stream(str(file), compression=compression), 2**20)


def _decoded(data: bytes, file: Path, number: int = 1) -> str:
    """The text of a line, or of a whole file from line ``number``."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number += data[: error.start].count(b"\n")
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{file} line {number}: not UTF-8 (byte {column} is 0x{data[error.start]:02x}).", _UTF8
        ) from None


# -- JSON ----------------------------------------------------------------------------------------------------------------


def _json_rows(file: Path, kind: str) -> Iterator[Row]:
    with _opened(file) as opened:
        empty = True
        for number, line in enumerate(opened, 1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if not line.strip():
                continue
            if empty and _is_document(line):
                break
            empty = False
            yield number, _decoded(line, file, number).strip()
        else:
            return
    yield from _document_rows(file)


def _is_document(line: bytes) -> bool:
    """Whether a file with this first line holds one array, or objects over several lines, instead of a row a line."""
    if line.lstrip().startswith(b"["):
        return True
    try:
        return _wrapped(json.loads(line)) is not None
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip()) and error.doc.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def _wrapped(value: Any) -> list[Any] | None:
    """The rows of ``{"version": 1, "data": [{…}, …]}``; None for any other value."""
    own = set(COLUMNS) - {"data", *TURNS}
    if not isinstance(value, dict) or set(value) & own:
        return None
    lists = [item for item in value.values() if isinstance(item, list)]
    if len(lists) != 1 or not lists[0] or not all(isinstance(item, dict) for item in lists[0]):
        return None
    turns = any("role" in item or "from" in item or set(item) == {"input", "output"} for item in lists[0])
    return None if turns else lists[0]


def _document_rows(file: Path) -> Iterator[Row]:
    """The values of one array, or of objects over several lines, each as it is written."""
    with _opened(file) as opened:
        text = _decoded(opened.read().removeprefix(_BOM), file)
    line, seen = 1, 0
    for number, (value, start, end) in enumerate(_values(text, file)):
        if number == 0 and _space(text, end) == len(text) and (rows := _wrapped(value)) is not None:
            yield from ((1, json.dumps(row, ensure_ascii=False)) for row in rows)
            return
        line, seen = line + text.count("\n", seen, start), start
        yield line, text[start:end]


def _values(text: str, file: Path) -> Iterator[tuple[Any, int, int]]:
    """The values of an array, or one after another, with the characters at which each starts and ends."""
    decoder = json.JSONDecoder()
    position = _space(text, 0)
    array = text.startswith("[", position)
    position += array
    try:
        while (position := _space(text, position)) < len(text) and not (array and text.startswith("]", position)):
            value, end = decoder.raw_decode(text, position)
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
    except ValueError as error:
        place, reason = str(file), str(error).split(";")[0]
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"{file} line {error.lineno}", f"{error.msg} at character {error.colno}"
        raise UserError(f"{place}: broken JSON: {reason}.", "Correct the line, or remove it.") from None


def _space(text: str, position: int) -> int:
    """The position behind white space."""
    found = _SPACE.match(text, position)
    assert found is not None
    return found.end()


def parse(text: str, file: str, line: int) -> dict[str, Any]:
    """A row of ``FEATURES`` as keys and values.

    Raises:
        UserError: it is not a JSON object; names the file and the line.
    """
    try:
        row = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise UserError(f"{file} line {line}: nested too deeply.", _EACH_LINE) from None
    except ValueError as error:
        if isinstance(error, UnicodeEncodeError):
            problem = "text that is not valid Unicode (half a surrogate pair)"
        elif "\0" in text:
            problem = "NUL bytes; the file was not written to its end, or is not text"
        else:
            reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            problem = f"broken JSON: {str(reason).split(';')[0]}: {text[:60]!r}"
        raise UserError(f"{file} line {line}: {problem}.", _EACH_LINE) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{file} line {line}: expected an object {{…}}, found {text[:60]!r}.", "Each row is one object."
        )
    return row


# -- Parquet -------------------------------------------------------------------------------------------------------------


def _parquet_rows(file: Path, kind: str) -> Iterator[Row]:
    batches = pyarrow.parquet.ParquetFile(file).iter_batches(1000)
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        # a date or bytes become objects, which are not mistaken for text
        yield number, json.dumps(without_nulls(row), ensure_ascii=False, default=lambda v: {type(v).__name__: str(v)})


def without_nulls(value: Any) -> Any:
    """A value without the nulls in its objects: Arrow gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# -- CSV and TSV ---------------------------------------------------------------------------------------------------------


def _csv_rows(file: Path, kind: str) -> Iterator[Row]:
    """Every cell is text, except lists of turns, which a CSV can only hold as JSON."""
    csv.field_size_limit(2**31 - 1)
    with _opened(file) as opened:
        first = opened.readline().removeprefix(_BOM)
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
