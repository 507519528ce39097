"""What ``data pairs`` reads: raw UltraFeedback's schema in files, folders and hub sets; anything else refused with what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa

from ..config import DatasetSpec
from ..errors import UserError
from ..strict_json import shown
from .opening import BUILDERS, find_broken_json, open_source
from .questions import split_said_as
from .sources import own_faults_only
from .ultrafeedback import TRUTHFUL_QA

_RAW = ("source", "instruction", "completions")


def open_input(spec: DatasetSpec) -> Iterator[tuple[datasets.Dataset, str, DatasetSpec]]:
    """An input's rows, their label in messages, and where they are; file by file where a folder is read whole."""
    for each in _files_by_source(spec):
        with own_faults_only(each), split_said_as("--split {}"):
            raw, label = open_source(each)
        if len(raw) == 0:
            raise UserError(f"{label}: empty; there is no row in it.")
        _check_schema(raw.column_names, label, each)
        yield raw.select_columns([c for c in _RAW if c in raw.column_names]), label, each


def _files_by_source(spec: DatasetSpec) -> list[DatasetSpec]:
    folder = Path(spec.path).expanduser()
    if not folder.is_dir() or spec.split is not None or (folder / "data").is_dir():
        return [spec]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in BUILDERS)
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


@contextmanager
def text_as_it_must_be(label: str) -> Iterator[None]:
    """Arrow's JSON reader takes any bytes for text, and fails where it becomes a string."""
    try:
        yield
    except UnicodeDecodeError:
        if Path(label).is_file():
            find_broken_json(Path(label))
        raise UserError(f"{label}: text that is not UTF-8.", "Save the file as UTF-8.") from None


def own_questions(raw: datasets.Dataset) -> list[str]:
    if "source" not in raw.column_names or pa.types.is_nested(raw.features.arrow_schema.field("source").type):
        return []
    found: list[str] = []
    for batch in raw.select_columns(["source", "instruction"]).with_format("arrow").iter(batch_size=10_000):
        ours = pa.compute.equal(batch.column("source").cast(pa.string()), TRUTHFUL_QA)
        found += [text for text in batch.filter(ours).column("instruction").to_pylist() if isinstance(text, str)]
    return found
