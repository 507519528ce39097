"""Malformed rows and places, and what is said of each (``tests/malformed.py`` explains a case)."""

# ruff: noqa: E501 (an exact message is best read in one piece)
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.malformed import Case, Fixtures, dpo, row, sft, show
from zephyr_lite.config.load import LIST_KEYS

Make = Callable[[Path, Fixtures], list[str]]
GOOD = row("a", "b")
MEANING = "If the columns mean something else, add dataset.columns.OURS=THEIRS (found messages)."
MEND = "Correct the line, or remove it; each line holds one row."
QUOTES = "Every row has as many cells as the header; a cell with separators, quotes or newlines is in double quotes."
DAMAGED = "The file is damaged, was cut off or is a Git LFS pointer: make it or fetch it again."
UTF8 = "Save the file as UTF-8."
SAVED = "Save its content to a file first, and name that."


def rows_of(content: str | bytes, name: str = "rows.jsonl", **changes: object) -> Make:
    """A data set of these bytes, shown as sft sees it."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return show(fixtures, **{"dataset": name, **changes})

    return make


def pairs_of(*rows: object) -> Make:
    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        return ["data", "show", *dpo(fixtures, dataset="rows.jsonl")]

    return make


def parquet(footer: int, end: bytes = b"PAR1") -> Make:
    """A file of 100 bytes that would be Parquet, were it not for its end."""
    return rows_of(b"PAR1" + bytes(88) + footer.to_bytes(4, "little") + end, "rows.parquet")


def folder(**files: str) -> Make:
    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "set.jsonl").mkdir()
        for name, text in files.items():
            (tmp / "set.jsonl" / name.replace("_DOT_", ".")).write_text(text)
        return show(fixtures, dataset="set.jsonl")

    return make


def keys(**changes: object) -> Make:
    return lambda tmp, fixtures: sft(fixtures, **changes)


CASES = [
    # -- rows: JSONL and JSON
    Case("rows: an empty file", rows_of(""), "rows.jsonl: empty; there is no row in it."),
    Case(
        "rows: invalid UTF-8",
        rows_of(GOOD.encode() + b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}\n'),
        "rows.jsonl line 2: not UTF-8 (byte 44 is 0xff).",
        UTF8,
    ),
    Case(
        "rows: null",
        rows_of("null\n"),
        "rows.jsonl line 1: expected an object {…}, found 'null'.",
        "Each row is one object.",
    ),
    Case(
        "rows: cut off in the last line",
        rows_of(GOOD + GOOD[:30]),
        'rows.jsonl line 2: broken JSON: Expecting property name enclosed in double quotes: \'{"messages": [{"role": "user",\'.',
        MEND,
    ),
    Case(
        "rows: a column of two types",
        rows_of('{"prompt": {"a": 1}, "completion": "x"}\n{"prompt": "q", "completion": [1]}\n'),
        "rows.jsonl: none of 2 rows can be used (read as prompt and completion): a turn of completion is int, not {role, content}: 1 (rows.jsonl row 2); a turn of prompt has no role: 1 (rows.jsonl row 1).",
        MEANING.replace("messages", "prompt, completion"),
    ),
    Case(
        "rows: a role that nobody has",
        rows_of(GOOD.replace("user", "\\u001b[2Jroot")),
        "rows.jsonl: none of 1 rows can be used (read as messages): unknown role '\\x1b[2Jroot': 1 (rows.jsonl row 1).",
        MEANING,
    ),
    Case(
        "rows: a broken array",
        rows_of('[{"messages": [}]', "rows.json"),
        "rows.json line 1: broken JSON: Expecting value: '}]'.",
        "Correct the line, or remove it.",
    ),
    Case(
        "rows: a pointer of Git LFS",
        rows_of("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"),
        "rows.jsonl line 1: broken JSON: Expecting value: 'version https://git-lfs.github.com/spec/v1\\noid sha256:ab\\nsiz'.",
        "Correct the line, or remove it.",
    ),
    Case(
        "rows: pairs that are equal",
        pairs_of({"prompt": "q", "chosen": "same", "rejected": "same"}),
        "rows.jsonl: none of 1 rows can be used (read as preference pairs with a prompt column): chosen equals rejected: 1 (rows.jsonl row 1).",
        MEANING.replace("messages", "prompt, chosen, rejected"),
    ),
    # -- rows: CSV and Parquet
    Case(
        "csv: more cells than the header",
        rows_of("prompt,completion\na,b\nc,d,e\n", "rows.csv"),
        "rows.csv line 3: not readable as CSV: expected 2 cells, found 3.",
        QUOTES,
    ),
    Case(
        "csv: a quote that never ends",
        rows_of('prompt,completion\n"a,b\nc,d\n', "rows.csv"),
        "rows.csv line 2: not readable as CSV: unexpected end of data.",
        QUOTES,
    ),
    Case(
        "csv: Latin-1",
        rows_of("prompt,completion\na,b\nä,b\n".encode("latin-1"), "rows.csv"),
        "rows.csv line 3: not UTF-8 (byte 1 is 0xe4).",
        UTF8,
    ),
    Case(
        "parquet: cut off",
        parquet(20, b"ding"),
        "rows.parquet: cannot be read: ArrowInvalid: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file.",
        DAMAGED,
    ),
    # -- places
    Case(
        "place: a device",
        lambda tmp, fixtures: show(fixtures, dataset="/dev/zero"),
        "/dev/zero: is a device or a pipe, not a file.",
        SAVED,
    ),
    Case(
        "place: a folder named like a file",
        folder(),
        "set.jsonl: no data in this folder.",
        "Files are named by split: train_sft.jsonl, or data/train_sft-00000-of-00001.parquet (one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet).",
    ),
    Case(
        "place: a suffix that is not read",
        rows_of(GOOD, "rows.txt"),
        "rows.txt: .txt is not read.",
        "Give one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet; text may be compressed (.gz, .zst, .bz2).",
    ),
    Case(
        "place: no such file",
        keys(dataset="./nowhere.jsonl"),
        "./nowhere.jsonl: there is no such file or folder.",
        "The working directory is {tmp}.",
    ),
    Case(
        "place: control characters in output_dir",
        keys(output_dir="runs/\x1b[2J\x07"),
        "the command line: output_dir: holds a control character, or bytes that are no UTF-8 (found 'runs/\\x1b[2J\\x07').",
        LIST_KEYS,
    ),
    Case(
        "place: an empty model name",
        keys(model_name_or_path='" "'),
        "the command line: model_name_or_path: is empty (found ' ').",
        LIST_KEYS,
    ),
]
