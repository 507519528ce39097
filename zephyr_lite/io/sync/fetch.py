"""A run brought from the place of its copies, before anything of it is read here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config.load import RunConfig
from ...errors import UserError
from ..atomic import folder_aside, make_folder, sweep
from ..lock import alone
from ..manifest import MANIFEST, manifest_fault
from ..run_dir import STAGE_FILE, StageDir, stages_of
from .choose import place_of
from .place import CHECKPOINT, Place, PlaceError, info_there, is_copied, marks, run_name

Say = Callable[[str], None]


def restore(config: RunConfig, say: Say) -> None:
    """Bring what the place has of this run and this machine has not: its complete stages, and of this stage the newest
    and the best checkpoint. Does nothing where ``sync`` is not set, and where what is here is as new.

    Raises:
        UserError: another run of this name lies there; nothing is here and the place cannot be asked; all checkpoints
            there are damaged; another process works on the run.
    """
    if config.sync is None:
        return
    place = place_of(config)
    run = Path(config.output_dir)
    with alone(run):
        sweep(run)  # what a killed start had fetched a part of
        try:
            _Fetch(place, run, run_name(config), say).run_for(config.stage)
        except PlaceError as error:
            if not _kept(StageDir(run / config.stage)):
                raise _unknown(place, error) from None
            say(f"sync: {place.name}: {error}; going on with what is here")


def newest_there(config: RunConfig, *, stage_complete: str) -> str | None:
    """The name of the run at the place whose stage of this name was finished last; None where there is none.

    Raises:
        UserError: the place cannot be asked.
    """
    place = place_of(config)
    try:
        found = []
        for name in place.names(""):
            info = info_there(place, f"{name}/{stage_complete}")
            if info is not None and info.get("status") == "complete":
                found.append((str(info.get("finished", "")), name))
    except PlaceError as error:
        raise _unknown(place, error) from None
    return max(found)[1] if found else None


class _Fetch:
    """One run's way from the place."""

    def __init__(self, place: Place, run: Path, name: str, say: Say) -> None:
        self.place, self.run, self.name, self.say = place, run, name, say

    def run_for(self, stage: str) -> None:
        infos = {}
        there = self.place.names(self.name)
        if not there and not _kept(StageDir(self.run / stage)):
            # a drive that is not mounted looks like this too
            self.say(
                f"sync: nothing of {self.name} is in {self.place.name} yet, so it begins here. If there should be, end it, "
                "and see whether that place is mounted and the right one."
            )
        for folder in there:
            if (info := info_there(self.place, f"{self.name}/{folder}")) is not None:
                infos[folder] = info
        self._same_run(infos)
        for folder, info in infos.items():
            here = StageDir(self.run / folder)
            if info.get("status") == "complete":
                if not here.complete():
                    self._bring(here, ["adapter", "delta"], [])
                    self.say(f"{here.path} was fetched from {self.place.name}, complete")
            elif folder == stage:
                self._checkpoints(here)

    def _same_run(self, infos: dict[str, dict[str, Any]]) -> None:
        theirs = {mark for folder, info in infos.items() for mark in marks(folder, info)}
        kept = [stage for stage in stages_of(self.run) if _kept(stage)]
        ours = {mark for stage in kept for mark in marks(stage.path.name, stage.info() or {})}
        if kept and infos and not ours & theirs:
            begun = min(str(info.get("created", "?")) for info in infos.values())
            raise UserError(
                f"sync {self.place.name}: holds another run named {self.name}, begun {begun}, than {self.run} is.",
                "Choose another place or another output_dir; or move the one that is not wanted away.",
            )

    def _checkpoints(self, here: StageDir) -> None:
        """The checkpoints there, where the newest is newer than what is here."""
        if here.complete():
            return
        there = sorted(
            (_step(name), name) for name in self.place.names(f"{self.name}/{here.path.name}") if _step(name) >= 0
        )
        good = {p.name for p in here.checkpoints() if not (p / MANIFEST).is_file() or manifest_fault(p) is None}
        newest_here = max((_step(name) for name in good), default=-1)
        wanted = [name for _, name in reversed(there) if name not in good]
        if not wanted or _step(wanted[0]) <= newest_here:
            return
        try:
            brought = self._bring(here, [], wanted)
        except _Damaged:
            if good:  # an earlier one, but whole
                return
            raise UserError(
                f"sync {self.place.name}: every checkpoint of {self.name}/{here.path.name} there is damaged.",
                f"Delete {self.name} there to start anew, or leave sync out.",
            ) from None
        self.say(f"{here.path} was fetched from {self.place.name}, at {brought[0]}")

    def _bring(self, here: StageDir, folders: list[str], checkpoints: list[str]) -> list[str]:
        """Folders and files of a stage; returns the checkpoints that came whole.

        Raises:
            _Damaged: none of the checkpoints did.
            UserError: the folder here is not a stage's; a folder there is damaged.
        """
        if here.path.exists():
            here.claim()
        if _kept(here):
            return self._fill(here.path, here.path.name, folders, checkpoints)
        make_folder(here.path.parent)
        with folder_aside(here.path) as aside:  # replaces what a start without a checkpoint left
            return self._fill(aside, here.path.name, folders, checkpoints)

    def _fill(self, target: Path, stage: str, folders: list[str], checkpoints: list[str]) -> list[str]:
        source = f"{self.name}/{stage}"
        there = self.place.names(source)
        # first the log, which may know more steps than a checkpoint, never fewer; last what makes the rest a stage
        for name in there:
            if is_copied(name):
                self.place.fetch(f"{source}/{name}", target / name)
        brought = [name for name in checkpoints if self._folder(f"{source}/{name}", target / name)]
        if checkpoints and not brought:
            raise _Damaged
        for name in folders:
            if name in there and not self._folder(f"{source}/{name}", target / name):
                raise UserError(
                    f"sync {self.place.name}: {source}/{name} is damaged.",
                    f"Bring {source} from another place, or delete {self.name} there to start anew.",
                )
            (target / name / MANIFEST).unlink(missing_ok=True)  # it was made for the way
        self.place.fetch(f"{source}/{STAGE_FILE}", target / STAGE_FILE)
        return brought

    def _folder(self, source: str, target: Path) -> bool:
        """A folder that is whole when it is here; False, said, where it is damaged there."""
        try:
            with folder_aside(target) as aside:
                self.place.fetch(source, aside)
                if fault := manifest_fault(aside):
                    raise _Damaged(fault)
        except _Damaged as damage:
            before = "; taking the one before" if CHECKPOINT.fullmatch(target.name) else ""
            self.say(f"sync {self.place.name}: {source}: {damage}{before}")
            return False
        return True


class _Damaged(Exception):
    pass


def _kept(stage: StageDir) -> bool:
    """Whether there is something of a stage that may not be lost."""
    return (stage.path / STAGE_FILE).is_file() and (bool(stage.checkpoints()) or stage.complete())


def _step(name: str) -> int:
    found = CHECKPOINT.fullmatch(name)
    return int(found[1]) if found else -1


def _unknown(place: Place, error: PlaceError) -> UserError:
    return UserError(
        f"sync {place.name}: {error}. Whether the run lies there is not known.",
        "Try again when it can be reached, or leave sync out to start anew here.",
    )
