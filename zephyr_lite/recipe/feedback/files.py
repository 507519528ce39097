"""Files of a job: its folder, rows written aside until they are whole, rows kept on the disk for later."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ...config.strict_yaml import dump_yaml
from ...errors import UserError
from ...io.atomic import sweep, write_text
from ...io.redact import refuse_secrets

CONFIG = "config.yaml"


def claim(out: Path, kind: str, config: BaseModel) -> None:
    """Make a job's folder, or go on with one that is there.

    Args:
        out: the folder.
        kind: the command's name.
        config: what the job was given; written where the folder is new.

    Raises:
        UserError: the folder holds something else, or another command's job; or the configuration holds a secret.
    """
    refuse_secrets(config.model_dump(mode="json", exclude_unset=True), "the job's configuration")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; the job's folder cannot be made there.", "Choose another --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        there = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}.", "Choose another --out.") from None
    if not there:
        write_config(out, kind, config)
        return
    try:
        head = (out / CONFIG).read_text(encoding="utf-8").split("\n", 1)[0].strip()
    except (OSError, UnicodeDecodeError):
        head = ""
    if head != _first_line(kind):
        what = f"it is one of {head.removeprefix('# ')}" if head.startswith(_first_line("")) else ""
        raise UserError(
            f"{out} exists and is not a job of zephyr-lite {kind} ({what or 'it holds ' + ', '.join(there[:3])}).",
            "Choose another --out, or move that folder away.",
        )


def write_config(out: Path, kind: str, config: BaseModel) -> None:
    """What the job was given, which holds no key: ``zephyr-lite KIND --config`` takes it again."""
    values = config.model_dump(mode="json", exclude_unset=True)
    write_text(out / CONFIG, _first_line(kind) + "\n" + dump_yaml(values))


def _first_line(kind: str) -> str:
    return f"# zephyr-lite {kind}"


def line_of(row: dict[str, Any]) -> str:
    """One row of a JSONL file."""
    return valid(json.dumps(row, ensure_ascii=False)) + "\n"


def valid(text: str) -> str:
    """Text with ? for halves of surrogate pairs: servers send them (a reply cut within an emoji), UTF-8 has none."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Spool:
    """Rows that wait on the disk, by number; the latest of a number counts."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile("w+b", dir=folder, prefix=".rows.")  # noqa: SIM115
        self._places: dict[int, int] = {}

    def put(self, number: int, row: dict[str, Any]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._places[number] = self._file.tell()
        self._file.write(json.dumps(row).encode("ascii") + b"\n")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row), by number."""
        for number in sorted(self._places):
            self._file.seek(self._places[number])
            yield number, json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()
