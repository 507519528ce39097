"""What a place for copies can do, and which one a ``sync`` key names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ...config.load import RunConfig
from ...errors import UserError
from ..run_dir import STAGE_FILE

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class PlaceError(Exception):
    """The place could not do it now; trying again later may help.

    Args:
        kind: in a word or two, the same for the same cause.
        message: what happened.
        wait: seconds after which the place wants to be asked again, where it said so.
    """

    def __init__(self, kind: str, message: str, wait: float | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.wait = kind, wait


class Place(Protocol):
    """Where copies lie. Paths are relative, with ``/``. Every method raises ``PlaceError``."""

    name: str  # as it is shown

    def prepare(self) -> None:
        """Make the place ready to be written; before the first copy."""

    def names(self, folder: str) -> list[str]:
        """What lies in a folder: files and folders; nothing where there is no such folder."""

    def read(self, path: str) -> bytes | None:
        """A small file's content, or None where there is none."""

    def put(self, folder: str, add: Mapping[str, Path | bytes], delete: Sequence[str]) -> None:
        """Add files and folders, in this order, each complete or not at all; only then delete."""

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file or a folder to a path that is not there yet."""


def run_name(config: RunConfig) -> str:
    """Under which name the run lies there."""
    return Path(config.output_dir).resolve().name


def is_copied(name: str) -> bool:
    """Whether a file of a stage belongs to its copy (stage.json by itself): its configuration, its logs and report, a
    reference that took time."""
    logs = name.endswith(".jsonl") and not name.startswith(".")
    reference = name.startswith("reference-") and name.endswith(".safetensors")
    return logs or reference or name in ("config.yaml", "lengths.json", "report.html")


def marks(stage: str, info: dict[str, Any]) -> set[str]:
    """What tells a run from another of its name: its id, and for one of an earlier version when its stages were begun."""
    return {str(mark) for mark in (info.get("id"), info.get("created") and f"{stage} {info['created']}") if mark}


def info_there(place: Place, folder: str) -> dict[str, Any] | None:
    """A stage's stage.json at the place, or None.

    Raises:
        PlaceError: it cannot be read now.
        UserError: it is not what a run writes.
    """
    raw = place.read(f"{folder}/{STAGE_FILE}")
    if raw is None:
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"sync {place.name}: {folder}/{STAGE_FILE} is not the JSON object that a run writes.",
            "Delete this folder there, or name another place.",
        )
    return value
