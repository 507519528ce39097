"""What ``data pairs`` reads: raw UltraFeedback's schema in files, folders and hub sets; anything else refused with what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.load import DatasetSpec
from ..data.opening import Source, kind_of, open_source
from ..errors import UserError
from ..io.text import shown
from .questions import split_said_as
from .ultrafeedback import TRUTHFUL_QA

_RAW = ("source", "instruction", "completions")


def open_input(spec: DatasetSpec) -> Iterator[tuple[Source, DatasetSpec]]:
    """An input's rows and where they are; file by file where a folder is read whole."""
    for each in _files_by_source(spec):
        with split_said_as("--split {}"):
            raw = open_source(each)
        if len(raw) == 0:
            raise UserError(f"{raw.label}: empty; there is no row in it.")
        _check_schema(raw.columns, raw.label, each)
        yield raw.select_columns(_RAW), each


def _files_by_source(spec: DatasetSpec) -> list[DatasetSpec]:
    folder = Path(spec.path).expanduser()
    if not folder.is_dir() or spec.split is not None or (folder / "data").is_dir():
        return [spec]
    files = sorted(p for p in folder.iterdir() if p.is_file() and kind_of(p))
    splits = [file for file in files if file.stem.lower().startswith(("train", "test", "valid", "eval", "dev"))]
    if len(splits) == 1:  # beside a report or a journal, as `zephyr-lite feedback` leaves it
        return [spec.model_copy(update={"path": str(Path(spec.path) / splits[0].name)})]
    if splits or len(files) < 2:
        return [spec]
    return [spec.model_copy(update={"path": str(Path(spec.path) / file.name)}) for file in files]


def _check_schema(columns: Sequence[str], label: str, spec: DatasetSpec) -> None:
    if {"instruction", "completions"} <= set(columns):
        return
    found = f"{label}: found columns {shown(', '.join(columns), 500)}; "
    needs = "scored completions are needed: columns instruction and completions, as in openbmb/UltraFeedback"
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            found + "these are preference pairs already.",
            f"Train on them as they are: zephyr-lite dpo dataset.path={spec.path}"
            + (f" dataset.split={spec.split}" if spec.split else ""),
        )
    if {"messages", "conversations", "prompt", "data"} & set(columns):
        raise UserError(
            found + needs + ".", "Conversations have no scores; `zephyr-lite feedback` makes some for their prompts."
        )
    raise UserError(found + needs + ".", "Name another file, or rename the columns.")


def own_questions(raw: Source) -> list[str]:
    rows = raw.select_columns(["source", "instruction"])
    return [str(row["instruction"]) for row in rows if row.get("source") == TRUTHFUL_QA and row.get("instruction")]
