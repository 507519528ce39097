"""The layout of a run's folder.

    runs/NAME/STAGE/  config.yaml  stage.json  metrics.jsonl  checkpoint-N/  adapter/  delta/

``adapter/`` is the adapter to load. For a stage trained on top of frozen adapters it is the whole chain composed into
one PEFT adapter, and ``delta/`` is the stage's own part; otherwise it is the stage's own adapter.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .atomic import file_aside as file_aside
from .atomic import folder_aside as folder_aside
from .atomic import make_folder, sweep, write_json
from .atomic import write_text as write_text

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class StageDir:
    """One stage's folder, ``output_dir/stage``."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path.parent

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def delta(self) -> Path:
        return self.path / "delta"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def own(self) -> Path:
        """The stage's own adapter: ``delta/`` where there is one."""
        return self.delta if self.delta.is_dir() else self.adapter

    def info(self) -> dict[str, Any] | None:
        """The content of stage.json, or None where there is none.

        Raises:
            UserError: the file is not the JSON object that a run writes.
        """
        return read_json(self.path / STAGE_FILE)

    def complete(self) -> bool:
        info = self.info()
        return info is not None and info.get("status") == "complete"

    def write_info(self, info: dict[str, Any]) -> None:
        write_json(self.path / STAGE_FILE, info)

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if p.is_dir() and p.name.split("-")[1].isdigit()]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def claim(self) -> None:
        """Make the folder, and remove temporary files of killed processes from it.

        Raises:
            UserError: the folder cannot be made, or holds files but no stage.json.
        """
        sweep(self.path)
        if self.path.is_dir() and any(self.path.iterdir()) and not (self.path / STAGE_FILE).is_file():
            names = ", ".join(sorted(p.name for p in self.path.iterdir())[:3])
            raise UserError(
                f"{self.path} exists and is not a stage of a run (it holds {names}).",
                "Choose another output_dir or stage, or move that folder away.",
            )
        try:
            make_folder(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be made: {error.strerror}.", "Choose another output_dir.") from None


def newest_run(root: Path, *, stage_complete: str | None = None) -> Path | None:
    """The run under ``root`` whose stage changed last; with ``stage_complete`` only runs whose stage of that name is
    complete."""
    candidates = []
    for run in root.glob("*"):
        for stage in stages_of(run):
            with suppress(UserError, OSError):  # a broken stage.json of another run
                if stage_complete is None or (stage.path.name == stage_complete and stage.complete()):
                    candidates.append(((stage.path / STAGE_FILE).stat().st_mtime_ns, stage.run))
    return max(candidates)[1] if candidates else None


def stages_of(run: Path) -> list[StageDir]:
    """A run's stages, by name, without the temporary folders of killed processes (``.NAME.xxxxxxxx``)."""
    found = [file.parent for file in run.glob(f"*/{STAGE_FILE}") if not file.parent.name.startswith(".")]
    return [StageDir(path) for path in sorted(found)]


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file.

    Raises:
        UserError: the file is there but holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.", "Choose another folder.") from None
    except ValueError as error:
        raise UserError(
            f"{path}: not readable as JSON: {error}.", "Restore the file, or start in another folder."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def cache_dir() -> Path:
    """The cache folder: ``$ZEPHYR_LITE_CACHE``, or ``$XDG_CACHE_HOME/zephyr-lite``, or ``~/.cache/zephyr-lite``."""
    if own := os.environ.get("ZEPHYR_LITE_CACHE"):
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "zephyr-lite"
