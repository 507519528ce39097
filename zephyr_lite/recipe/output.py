"""Checks of a data command's output folder and options, before any work."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.atomic import sweep
from ..io.run_dir import read_json

REPORT, DROPPED = "report.json", "dropped.tsv"


def request_of(out: Path, sources: Sequence[str], **options: Any) -> str:
    """A hash of a command's input and options, saved as ``request`` in ``report.json``.

    Args:
        out: the output folder; it may be inside a source's folder.
        sources: hub ids, or paths (``PATH#SPLIT`` too), whose files' sizes and dates are part of the hash.
        options: all other options that the result depends on.
    """
    files = []
    for source in sources:
        path = Path(source if Path(source).expanduser().exists() else source.partition("#")[0]).expanduser()
        found = [path] if path.is_file() else sorted(path.rglob("[!.]*")) if path.is_dir() else []
        read = [file for file in found if file.is_file() and out.resolve() not in file.resolve().parents]
        files.append([(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in read])
    return hashlib.sha256(repr((list(sources), sorted(options.items()), files)).encode()).hexdigest()


def check_output(out: Path, sources: Sequence[str], made_by: str, overwrite: bool, request: str) -> bool:
    """Refuse an output folder that cannot be made, or contains a source or anything but an earlier result.

    Args:
        sources: paths (or hub ids) that are read.
        made_by: the field of ``report.json`` in an earlier result.
        overwrite: an earlier result may be replaced.
        request: of ``request_of``.

    Returns:
        Whether the folder has the result of the same request already.

    Raises:
        UserError: the folder is refused.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder.", "Choose another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}.", "Choose another --out.") from None
    for source in sources:
        path = Path(source).expanduser()
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{out} holds the source {source}, which it would replace.", "Choose another --out.")
    sweep(out.absolute().parent, out.name)
    if not out.is_dir() or not any(out.iterdir()):
        return False
    report = read_json(out / REPORT) or {}
    if report.get("made_by") != made_by:
        names = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise UserError(f"{out} exists and holds other things ({names}).", "Choose another --out.")
    if overwrite:
        return False
    if report.get("request") != request:
        raise UserError(
            f"{out} holds a set that {made_by} made with other options, or of other files.",
            "Replace it with --overwrite, or choose another --out.",
        )
    return True


def check_held_out(test: float | None, num_proc: int | None) -> None:
    """Refuse a ``--test`` that is neither a share nor a number of rows, and a ``--num-proc`` below 1."""
    if test is not None and not (0 <= test < 1 or (test >= 1 and float(test).is_integer())):
        raise UserError(f"test {test:g}: is neither a share below 1 nor a number of rows.", "Write --test 0.1.")
    if num_proc is not None and num_proc < 1:
        raise UserError(f"num-proc {num_proc}: has to be at least 1.")
