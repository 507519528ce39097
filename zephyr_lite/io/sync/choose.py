"""Which place ``sync`` names."""

from __future__ import annotations

from pathlib import Path

from ...config.load import RunConfig
from ...errors import UserError
from .folder import FolderPlace
from .hub import HubPlace
from .place import Place


def place_of(config: RunConfig) -> Place:
    """The place that ``sync`` names.

    Raises:
        UserError: it is none.
    """
    where = config.sync
    assert where is not None
    if where.startswith("hub:"):
        return HubPlace(where.removeprefix("hub:"))
    if "://" in where or not where.strip():
        raise UserError(f"sync {where}: is neither a folder nor hub:OWNER/NAME.", "Mount it, and name the folder.")
    folder, run = Path(where).expanduser(), Path(config.output_dir)
    there = (folder / run.name).resolve()
    if there == run.resolve() or there.is_relative_to(run.resolve()) or folder.resolve().is_relative_to(run.resolve()):
        raise UserError(f"sync {where}: lies in the run's own folder, {run}.", "Name a folder on another disk.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"sync {where}: is a file.", "Name a folder, or hub:OWNER/NAME.")
    return FolderPlace(folder)
