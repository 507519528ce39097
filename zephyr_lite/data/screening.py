"""A look at a data file before a parser sees it: what would take the machine's memory, or the process with it.

Arrow's JSON reader dies of a segmentation fault (pyarrow 26) at 20,000 nested brackets and at a file of ``null`` lines;
datasets reads a line of any length at once, unpacks whatever looks like an archive, and hands a JSONL of one row that
Arrow refuses to pandas, which takes its lists for columns. The look costs one to six seconds of a processor a gigabyte,
more where rows hold code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ..errors import UserError
from ..strict_json import shown

LINE_BYTES = 64 * 2**20  # of a row
ARRAY_BYTES = 4 * 2**30  # of a JSON file that is one array: it is read as a whole, several times over
NESTING = 100
COLUMNS = 1000  # of a JSONL, as far as its lines are sampled: Arrow holds every row's cell of each
_SAMPLED = 50
_FEW = "Rows have a few columns, the same in each: remove what no conversation needs."
_SIGNS = b'[]{}"'
_OTHERS = bytes(sorted(set(range(256)) - set(_SIGNS)))
_BOM = b"\xef\xbb\xbf"
# how files begin that are something else
_MAGIC = (
    (b"\x1f\x8b", "a gzip archive"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\x04\x22\x4d\x18", "an lz4 archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a rar archive"),
    (b"ARROW1", "an Arrow file"),
    (b"\x89PNG", "a picture"),
    (b"%PDF", "a PDF"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"


def screen(file: Path, builder: str) -> int | None:
    """Look through one file before it is parsed.

    Args:
        file: a regular file.
        builder: json, csv or parquet.

    Returns:
        How many rows a JSONL holds; None for everything else.

    Raises:
        UserError: it cannot be opened, is empty or of another kind, or (JSONL) a line is too long, too deeply nested or no
            object; says which.
    """
    try:
        with file.open("rb", buffering=2**20) as opened:
            start = opened.read(1024)
            size = file.stat().st_size
            if size <= len(start) and not start.strip():
                raise UserError(f"{file}: the file is empty.")
            _refuse_kinds(file, start, builder)
            if builder == "parquet":
                _screen_footer(file, opened, size)
            if builder == "csv":
                opened.seek(0)
                _screen_heading(file, opened.readline(LINE_BYTES))
            if builder != "json":
                return None
            if (array := start.removeprefix(_BOM)).startswith(b"["):
                # datasets would make a column "text" of what is no object
                if (first := array[1:].lstrip()) and not first.startswith((b"{", b"]")):
                    raise UserError(
                        f"{file}: a JSON array whose first entry is no object: {first[:20].decode(errors='replace')!r}.",
                        "Every row is an object: [{…}, {…}].",
                    )
                if size > ARRAY_BYTES:
                    raise UserError(
                        f"{file}: one JSON array of {size:,} bytes; up to {ARRAY_BYTES:,} are read.",
                        "Save it as JSONL, one row a line: that is read in pieces.",
                    )
                return None
            opened.seek(0)
            return _screen_lines(file, opened)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.", "Mend that, or name another file.") from None


def _refuse_kinds(file: Path, start: bytes, builder: str) -> None:
    wanted = {"json": "JSON", "csv": "CSV", "parquet": "Parquet"}[builder]
    if start.startswith(_POINTER):
        raise UserError(
            f"{file}: holds a Git LFS pointer, not the data.",
            "Fetch the file itself: `git lfs pull`, or `hf download`.",
        )
    kinds = [*_MAGIC, *([] if builder == "parquet" else [(b"PAR1", "a Parquet file")])]
    for magic, kind in kinds:
        if start.startswith(magic):
            cure = "Unpack it first." if "archive" in kind else "Save it as UTF-8." if "UTF-16" in kind else ""
            raise UserError(
                f"{file}: is {kind}, not {wanted}.", cure or f"Name a {wanted} file, with a suffix that fits it."
            )
    if start[257:262] == b"ustar":
        raise UserError(f"{file}: is a tar archive, not {wanted}.", "Unpack it first.")
    if builder != "parquet" and start.lstrip().startswith(b"\0"):
        raise UserError(
            f"{file}: begins with NUL bytes; it was not written to its end, or is no text.", "Make or fetch it again."
        )
    if builder == "parquet" and not start.startswith(b"PAR1"):
        raise UserError(f"{file}: is not a Parquet file: it begins with {start[:8]!r}.", "Make or fetch it again.")


def _screen_footer(file: Path, opened: Any, size: int) -> None:
    """A Parquet file ends with its footer, the footer's length in four bytes, and PAR1."""
    opened.seek(max(0, size - 8))
    end = opened.read(8)
    cure = "The file is damaged or was cut off: make or fetch it again."
    if end[4:] == b"PARE":
        raise UserError(f"{file}: the footer is encrypted.", "Save it without encryption.")
    if size < 12 or end[4:] != b"PAR1":
        raise UserError(f"{file}: ends with {end[4:]!r}, a Parquet file with b'PAR1'.", cure)
    length = int.from_bytes(end[:4], "little")
    if not 0 < length <= size - 12:
        raise UserError(f"{file}: a footer of {length:,} bytes in a file of {size:,}.", cure)
    try:
        columns = pyarrow.parquet.read_metadata(file).num_columns
    except (pyarrow.ArrowException, OSError):  # said in the reader's own words when it comes to that
        return
    if columns > COLUMNS:
        raise UserError(f"{file}: {columns:,} columns; {COLUMNS:,} are the most that is read.", _FEW)


def _screen_heading(file: Path, line: bytes) -> None:
    if (columns := line.count(b",") + 1) > COLUMNS:
        raise UserError(f"{file} line 1: {columns:,} columns; {COLUMNS:,} are the most that is read.", _FEW)


def _screen_lines(file: Path, opened: Any) -> int | None:
    number = rows = depth = 0
    lines = True  # one value a line, as far as seen
    columns: set[str] = set()
    while line := opened.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise UserError(
                f"{file} line {number}: longer than {LINE_BYTES:,} bytes, the most that a row may have.",
                "Rows end with a newline each; split or remove this one.",
            )
        if number == 1:
            line = line.removeprefix(_BOM)
        whole = line.startswith(b"{") and line.endswith((b"}\n", b"}\r\n", b"}"))
        if not whole:
            line = line.strip()
            if not line:
                continue
            if not depth and not line.startswith(b"{" if rows else (b"{", b"[")):
                read_line(line, f"{file} line {number}")  # says what is wrong with it
                raise _no_object(line, f"{file} line {number}")
            whole = line.startswith(b"{") and line.endswith(b"}")
        if depth or not whole or line.count(b"{") + line.count(b"[") > NESTING:
            depth = _depth(line, depth, f"{file} line {number}")
            lines = lines and depth == 0 and whole
        if not depth and whole and (rows < _SAMPLED or rows % _SAMPLED == 0):
            columns.update(_keys(line))
            if len(columns) > COLUMNS:
                raise UserError(
                    f"{file} line {number}: more than {COLUMNS:,} columns up to here, {shown(next(iter(_keys(line)), ''))!r} "
                    "among them.",
                    _FEW,
                )
        if b"\r" in line and b"\r" in line[:-2]:  # a newline to some
            lines = False
        rows += 1
    return rows if lines else None


def _keys(line: bytes) -> list[str]:
    """The keys of a row, none where it cannot be read: what is wrong with it is found later."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return []
    return list(row) if isinstance(row, dict) else []


def _depth(line: bytes, depth: int, place: str) -> int:
    """How deep in brackets a line ends that begins ``depth`` deep."""
    # what is escaped goes first, then all but brackets and quotes, then what stands in quotes
    signs = line.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    outside = b"".join(signs.split(b'"')[::2])
    if depth + len(outside) <= NESTING:
        return max(depth + 2 * (outside.count(b"[") + outside.count(b"{")) - len(outside), 0)
    for sign in outside:
        depth += 1 if sign in b"[{" else -1
        if depth > NESTING:
            raise UserError(f"{place}: nested more than {NESTING} deep.", "No row of a chat is; mend or remove it.")
    return max(depth, 0)


def read_line(line: bytes, place: str) -> dict[str, Any]:
    """One row of a JSONL.

    Raises:
        UserError: it is not UTF-8, no JSON, no object, or has a key twice.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{place}: not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}).", "Save the file as UTF-8."
        ) from None
    if "\0" in text:
        raise UserError(
            f"{place}: NUL bytes; the file was not written to its end, or is no text.",
            "Remove the line, or make the file again.",
        )
    try:
        row = json.loads(text, object_pairs_hook=_once)
    except _Twice as twice:
        raise UserError(f"{place}: key {twice.key!r} stands twice in one object.", "Keep one of them.") from None
    except RecursionError:
        raise UserError(
            f"{place}: nested more than {NESTING} deep.", "No row of a chat is; mend or remove it."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{place}: broken JSON: {_reason(error)}: {_start(line)}.", "Mend the line, or remove it; one row a line."
        ) from None
    if not isinstance(row, dict):
        raise _no_object(line, place)
    return row


def _no_object(line: bytes, place: str) -> UserError:
    return UserError(f"{place}: expected an object {{…}}, found {_start(line)}.", "One row a line, each in braces.")


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return str(error).split(";")[0].replace(" for integer string conversion", "")


def _start(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace"))


class _Twice(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Twice(key)
        values[key] = value
    return values
