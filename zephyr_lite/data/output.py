"""The folder that a data command makes: whether it may be made there, checked before any work."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..rundir import read_json

REPORT, DROPPED = "report.json", "dropped.tsv"


def check_output(out: Path, sources: Sequence[str], made_by: str, overwrite: bool) -> None:
    """Refuse a folder that cannot be made, that holds a source, or that holds anything but an earlier result to replace.

    Args:
        sources: paths of what is read (hub ids are none).
        made_by: what ``report.json`` says of an earlier result.
        overwrite: whether that may be replaced.

    Raises:
        UserError: as above.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; a folder is to be made there.", "Choose another --out.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise UserError(f"{out}: cannot be made: {error.strerror}.", "Choose another --out.") from None
    for source in sources:
        path = Path(source).expanduser()
        if path.exists() and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"{out} holds the source {source}, which it would replace.", "Choose another --out.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (read_json(out / REPORT) or {}).get("made_by") != made_by:
        names = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise UserError(f"{out} exists and holds other things ({names}).", "Choose another --out.")
    if not overwrite:
        raise UserError(
            f"{out} holds a set of {made_by} already.", "Replace it with --overwrite, or choose another --out."
        )


def check_held_out(test: float | None, num_proc: int | None) -> None:
    """Refuse a ``--test`` that is neither a share nor a number of rows, and a number of processes below 1."""
    if test is not None and not (0 <= test < 1 or (test >= 1 and float(test).is_integer())):
        raise UserError(f"test {test:g}: is neither a share below 1 nor a number of rows.", "Write --test 0.1.")
    if num_proc is not None and num_proc < 1:
        raise UserError(f"num-proc {num_proc}: has to be at least 1.")
