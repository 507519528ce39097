"""Copies of complete checkpoints at another place, and a run restored from there on a new machine.

``sync: FOLDER`` or ``sync: hub:OWNER/NAME`` names the place. It holds what a new machine needs of each stage:

    NAME/STAGE/  stage.json  config.yaml  metrics.jsonl  reference-*.safetensors  checkpoint-N/  adapter/  delta/

with the newest and the best checkpoint. Every folder there has a manifest and appears complete or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from ..errors import Interrupted, UserError
from .atomic import copy_file, folder_aside, make_folder, remove_folder, sweep
from .lock import alone
from .manifest import MANIFEST, manifest_fault, write_manifest
from .redact import redact
from .run_dir import STAGE_FILE, StageDir, stages_of

logger = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
RETRY = 15.0  # seconds between attempts
ATTEMPTS = 12  # that ``finish`` waits for: the machine may be rented
SQUASH_EVERY = 20  # commits: the history of deleted checkpoints counts towards the account's storage
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


class FolderPlace:
    """A folder as the place: another disk, a mounted drive, a network share. Paths are relative to it, with ``/``."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def prepare(self) -> None:
        make_folder(self.root)

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders in a folder; empty if there is no such folder."""
        here = self.root / folder
        return sorted(p.name for p in here.iterdir() if not p.name.startswith(".")) if here.is_dir() else []

    def read(self, path: str) -> bytes | None:
        """A small file's content, or None."""
        file = self.root / path
        return file.read_bytes() if file.is_file() else None

    def put(self, folder: str, add: Sequence[Path], delete: Sequence[str]) -> None:
        """Add files and folders in this order, each complete or not at all; only then delete folders."""
        here = self.root / folder
        make_folder(here)
        sweep(here)
        for source in add:
            if source.is_dir():
                with folder_aside(here / source.name) as copy:
                    _copy_tree(source, copy)
                    if not (copy / MANIFEST).is_file():
                        write_manifest(copy)
                    if fault := manifest_fault(copy):
                        raise OSError(f"{source.name}: {fault}")
            else:
                copy_file(source, here / source.name)
        for name in delete:
            remove_folder(here / name)

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file to a path, or a folder's content into an existing folder."""
        source = self.root / path
        if links := [p for p in (source, *source.rglob("*")) if p.is_symlink()]:
            raise UserError(
                f"sync {self.name}: {links[0]} is a link.", "Only files and folders are copied: replace it."
            )
        if source.is_dir():
            _copy_tree(source, target)
        else:
            copy_file(source, target)


class HubPlace:
    """A repository of the Hugging Face hub as the place, made private; methods as ``FolderPlace``'s, ``put`` is one commit.

    Raises:
        UserError: ``repo`` is not OWNER/NAME, there is no token, or the hub is switched off.
    """

    def __init__(self, repo: str) -> None:
        self.repo, self.name, self.commits = repo, f"hub:{repo}", 0
        if not _REPO.fullmatch(repo):
            raise UserError(f"sync {self.name}: is not a repository's name.", "Write hub:OWNER/NAME.")
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"sync {self.name}: HF_HUB_OFFLINE is set.", "Unset it, or name a folder.")
        if get_token() is None:
            raise UserError(
                f"sync {self.name}: there is no token of the hub.",
                "Run `hf auth login`, or set HF_TOKEN (with write access).",
            )
        self.api = HfApi()

    def prepare(self) -> None:
        disable_progress_bars()  # they would run through the lines of training
        self.api.create_repo(self.repo, private=True, exist_ok=True)

    def names(self, folder: str) -> list[str]:
        try:
            found = {entry.path.rpartition("/")[2] for entry in self.api.list_repo_tree(self.repo, folder or None)}
        except (RemoteEntryNotFoundError, RepositoryNotFoundError):
            return []
        return sorted(name for name in found if not name.startswith("."))

    def read(self, path: str) -> bytes | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self.api.hf_hub_download(self.repo, path, local_dir=folder)).read_bytes()
            except (RemoteEntryNotFoundError, RepositoryNotFoundError):
                return None

    def put(self, folder: str, add: Sequence[Path], delete: Sequence[str]) -> None:
        operations: list[Any] = []
        with tempfile.TemporaryDirectory() as copies:
            for source in add:
                if source.is_dir() and not (source / MANIFEST).is_file():
                    _copy_tree(source, copy := Path(copies, source.name))
                    write_manifest(copy)
                    source = copy
                files = [path for path in sorted(source.rglob("*")) if path.is_file()] if source.is_dir() else [source]
                for file in files:
                    name = f"{folder}/{file.relative_to(source.parent).as_posix()}"
                    # a file of the stage itself is read now: the log grows
                    operations.append(CommitOperationAdd(name, str(file) if source.is_dir() else file.read_bytes()))
            operations += [CommitOperationDelete(f"{folder}/{name}/", is_folder=True) for name in delete]
            message = f"{folder}: {', '.join(source.name for source in add)}"[:200]
            self.api.create_commit(self.repo, operations, commit_message=message)
        self.commits += 1
        if self.commits % SQUASH_EVERY == 0:
            with suppress(HTTPError):
                self.api.super_squash_history(self.repo)

    def fetch(self, path: str, target: Path) -> None:
        aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            self.api.snapshot_download(self.repo, allow_patterns=[path, f"{path}/*"], local_dir=aside)
            if (aside / path).is_dir():
                shutil.copytree(aside / path, target, copy_function=os.replace, dirs_exist_ok=True)
            else:
                os.replace(aside / path, target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


Place = FolderPlace | HubPlace


def _copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile, dirs_exist_ok=True)


def place_of(sync: str, run: Path) -> Place:
    """The place that the key ``sync`` names, for copies of ``run``.

    Raises:
        UserError: it names none, or a folder in the run's own.
    """
    if sync.startswith("hub:"):
        return HubPlace(sync.removeprefix("hub:"))
    if "://" in sync or not sync.strip():
        raise UserError(f"sync {sync}: is neither a folder nor hub:OWNER/NAME.", "Mount it, and name the folder.")
    folder, here = Path(sync).expanduser().resolve(), run.resolve()
    if folder.is_relative_to(here) or (folder / here.name).is_relative_to(here):
        raise UserError(f"sync {sync}: is in the run's own folder, {run}.", "Name a folder on another disk.")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"sync {sync}: is a file.", "Name a folder, or hub:OWNER/NAME.")
    return FolderPlace(Path(sync).expanduser())


class Mirror:
    """Copies a stage to a place in a background thread: the newest and the best checkpoint. Only ``finish`` waits.

    Args:
        place: where to.
        folder: the stage's folder there: NAME/STAGE.
        stage: the stage.
    """

    def __init__(self, place: Place, folder: str, stage: StageDir) -> None:
        self.place, self.folder, self.stage = place, folder, stage
        self.retry = RETRY
        self._wanted: tuple[str, ...] | None = None  # checkpoints to be copied next
        self._at_work: tuple[str, ...] | None = None  # checkpoints being copied
        self._fault: str | None = None
        self._failures = 0
        self._sent: dict[str, object] = {}  # name → state of the copy there
        self._best: int | None = None
        self._prepared = self._closed = False
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None

    def changed(self, best: int | None) -> None:
        """A checkpoint was written: copy the newest, and the best one (a step, or None). If the place is slower than
        checkpoints are written, those not begun yet are left out."""
        self._best = best
        found = [path.name for path in self.stage.checkpoints()]
        wanted = dict.fromkeys([*found[-1:], *(name for name in found if name == f"checkpoint-{best}")])
        with self._turn:
            if self._closed:
                return
            self._wanted = tuple(wanted)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="zephyr-lite sync")
                self._thread.start()
            self._turn.notify_all()

    def busy(self) -> frozenset[str]:
        """Names of checkpoints that are being copied, or about to be: not to be deleted now."""
        with self._turn:
            return frozenset((*(self._wanted or ()), *(self._at_work or ())))

    def finish(self, timeout: float = 3600.0, *, attempts: int = ATTEMPTS) -> bool:
        """Copy the stage as it is now, and wait for it: ``timeout`` seconds, or until so many attempts failed.

        Returns:
            whether everything is there.
        """
        self.changed(self._best)
        with self._turn:
            most = self._failures + attempts
            done = self._turn.wait_for(
                lambda: (self._wanted or self._at_work) is None or self._closed or self._failures >= most, timeout
            )
            missing = self._wanted or self._at_work
        if done and missing is None:
            return True
        names = ", ".join(name for name in missing or () if name not in self._sent) or "the last state of the stage"
        logger.warning(
            f"sync: {self.place.name} does not have {names}{f': {self._fault}' if self._fault else ''}. It is here; the "
            "same command copies it there when it is started again."
        )
        return False

    def close(self) -> None:
        """Copy nothing more; a copy that is not complete does not appear there."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=2)

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._wanted is not None or self._closed)
                if self._closed:
                    return
                wanted, self._wanted = self._wanted, None
                self._at_work = wanted
            assert wanted is not None
            before, fault = self._fault, None
            try:
                self._send(wanted)
            except Exception as error:  # of whichever library: a copy is no reason to lose the run
                fault = _line(error)
            if fault is None and before is not None:
                logger.info(f"sync: {self.place.name} is up to date again")
            elif fault is not None and before is None:
                logger.warning(f"sync: {self.place.name}: {fault}; training continues, and the copy is tried again")
            with self._turn:
                self._at_work, self._fault = None, fault
                if fault is not None:
                    self._wanted = self._wanted or wanted
                    self._failures += 1
                self._turn.notify_all()
                if fault is not None:
                    self._turn.wait_for(lambda: self._closed, self.retry)

    def _send(self, wanted: tuple[str, ...]) -> None:
        if not self._prepared:
            self.place.prepare()
            self._send_other_stages()
            self._prepared = True
        there = self.place.names(self.folder)
        checkpoints = [name for name in there if CHECKPOINT.fullmatch(name)]
        states: dict[Path, object] = {path: _state(path) for path in _files(self.stage)}
        for name in wanted:
            manifest = self.stage.path / name / MANIFEST
            states[manifest.parent] = state = manifest.read_bytes() if manifest.is_file() else b""
            if state and name in there and name not in self._sent:
                self._sent[name] = self.place.read(f"{self.folder}/{name}/{MANIFEST}")
        if self.stage.complete():
            states |= {path: [(p.name, _state(p)) for p in sorted(path.iterdir())] for path in _adapters(self.stage)}
        info = self.stage.path / STAGE_FILE
        states[info] = _state(info)  # last: where it says "complete", the adapter is there
        add = [path for path, state in states.items() if path.name not in there or self._sent.get(path.name) != state]
        old = [name for name in checkpoints if wanted and name not in (*wanted, f"checkpoint-{self._best}")]
        if add or old:
            self.place.put(self.folder, add, old)
        self._sent.update({path.name: states[path] for path in add})
        for name in old:
            self._sent.pop(name, None)

    def _send_other_stages(self) -> None:
        """Copy the run's complete stages, which may have been trained without ``sync``."""
        for other in stages_of(self.stage.run):
            info = other.path / STAGE_FILE
            folder = f"{self.folder.rpartition('/')[0]}/{other.path.name}"
            if other.path == self.stage.path or not other.complete():
                continue
            if self.place.read(f"{folder}/{STAGE_FILE}") != info.read_bytes():
                self.place.put(folder, [*_files(other), *_adapters(other), info], [])


def open_mirror(sync: str | None, stage: StageDir) -> Mirror | None:
    """The mirror of a stage at the place that ``sync`` names; None: no place.

    Raises:
        UserError: ``sync`` names no place.
    """
    if sync is None:
        return None
    return Mirror(place_of(sync, stage.run), f"{stage.run.resolve().name}/{stage.path.name}", stage)


def catch_up(sync: str | None, stage: StageDir) -> None:
    """Copy a finished stage whose copy is not finished (the network was away at its end)."""
    mirror = open_mirror(sync, stage)
    if mirror is None:
        return
    try:
        there = mirror.place.read(f"{mirror.folder}/{STAGE_FILE}")
    except (OSError, HTTPError) as error:
        logger.warning(f"sync: {mirror.place.name}: {_line(error)}")
        return
    if there != (stage.path / STAGE_FILE).read_bytes():
        logger.info(f"copying {stage.path} to {mirror.place.name}, which does not have all of it")
        mirror.finish()
        mirror.close()


@contextmanager
def kept_elsewhere(mirror: Mirror | None, *, after_interrupt: float = 60.0) -> Iterator[None]:
    """A stage is trained and saved within; at the end, and when it is interrupted, its last state is copied too.

    Args:
        after_interrupt: seconds that the copy may take after an interrupt.
    """
    if mirror is None:
        yield
        return
    try:
        yield
        mirror.finish()
    except (Interrupted, UserError, OSError):
        mirror.finish(after_interrupt)
        raise
    finally:
        mirror.close()


def restore(sync: str | None, stage: StageDir) -> None:
    """Fetch what the place has of a run and this machine lacks: complete stages, and of ``stage`` the newest and the
    best checkpoint. Does nothing without ``sync``, or if the files here are as new.

    Raises:
        UserError: the place has another run of this name; the stage is not here and the place cannot be read; all
            checkpoints there are damaged; another process works on the run.
    """
    if sync is None:
        return
    place = place_of(sync, stage.run)
    with alone(stage.run):
        sweep(stage.run)
        try:
            _restore(place, stage)
        except (OSError, HTTPError) as error:
            if not _kept(stage):
                raise _unreadable(place, error) from None
            logger.warning(f"sync: {place.name}: {_line(error)}; continuing with the files here")


def newest_there(sync: str, run: Path, *, stage_complete: str) -> str | None:
    """The name of the run at the place whose stage of this name was finished last; None: there is none.

    Args:
        run: a run's folder here.

    Raises:
        UserError: the place cannot be read.
    """
    place, found = place_of(sync, run), []
    try:
        for name in place.names(""):
            info = _info_there(place, f"{name}/{stage_complete}")
            if info is not None and info.get("status") == "complete":
                found.append((str(info.get("finished", "")), name))
    except (OSError, HTTPError) as error:
        raise _unreadable(place, error) from None
    return max(found)[1] if found else None


def _restore(place: Place, stage: StageDir) -> None:
    run, name = stage.run, stage.run.resolve().name
    there = place.names(name)
    if not there and not _kept(stage):  # also the case if a drive is not mounted
        logger.info(
            f"sync: {place.name} has nothing of {name} yet, so it starts here. If it should, is that place mounted?"
        )
    infos = {folder: info for folder in there if (info := _info_there(place, f"{name}/{folder}")) is not None}
    theirs = {mark for folder, info in infos.items() for mark in _marks(folder, info)}
    kept = [each for each in stages_of(run) if _kept(each)]
    ours = {mark for each in kept for mark in _marks(each.path.name, each.info() or {})}
    if kept and infos and not ours & theirs:
        begun = min(str(info.get("created", "?")) for info in infos.values())
        raise UserError(
            f"sync {place.name}: holds another run named {name}, begun {begun}, not {run}.",
            "Choose another place or another output_dir; or move the one that is not wanted away.",
        )
    for folder, info in infos.items():
        here = StageDir(run / folder)
        if here.complete():
            continue
        if info.get("status") == "complete":
            _bring(place, here, ["adapter", "delta"], [])
            logger.info(f"{here.path} was fetched from {place.name}, complete")
        elif folder == stage.path.name:
            _bring_checkpoints(place, here)


def _bring_checkpoints(place: Place, here: StageDir) -> None:
    """Fetch the checkpoints there if the newest is newer than those here."""
    source = f"{here.run.resolve().name}/{here.path.name}"
    good = {p.name for p in here.checkpoints() if not (p / MANIFEST).is_file() or manifest_fault(p) is None}
    there = sorted(filter(CHECKPOINT.fullmatch, place.names(source)), key=_step, reverse=True)
    wanted = [name for name in there if name not in good]
    if not wanted or _step(wanted[0]) <= max(map(_step, good), default=-1):
        return
    try:
        brought = _bring(place, here, [], wanted)
    except _Damaged:
        if good:  # an earlier checkpoint is here
            return
        raise UserError(
            f"sync {place.name}: every checkpoint of {source} there is damaged.",
            "Delete that folder there to start again, or leave sync out.",
        ) from None
    logger.info(f"{here.path} was fetched from {place.name}, at {brought[0]}")


def _bring(place: Place, here: StageDir, folders: list[str], checkpoints: list[str]) -> list[str]:
    """Fetch a stage's files, folders and checkpoints; returns the checkpoints that are not damaged.

    Raises:
        _Damaged: all of them are.
        UserError: the folder here is not a stage's; a folder there is damaged.
    """
    if here.path.exists():
        here.claim()
    if _kept(here):
        return _fill(place, here, here.path, folders, checkpoints)
    make_folder(here.run)
    with folder_aside(here.path) as aside:  # replaces a stage without a checkpoint
        return _fill(place, here, aside, folders, checkpoints)


def _fill(place: Place, here: StageDir, target: Path, folders: list[str], checkpoints: list[str]) -> list[str]:
    source = f"{here.run.resolve().name}/{here.path.name}"
    there = place.names(source)
    # first the log, which may have more steps than a checkpoint, never fewer; last the file that makes it a stage
    for name in filter(_is_copied, there):
        place.fetch(f"{source}/{name}", target / name)
    brought = []
    for name in checkpoints:
        try:
            _fetch_folder(place, f"{source}/{name}", target / name)
            brought.append(name)
        except _Damaged as damage:
            logger.info(f"sync {place.name}: {source}/{name}: {damage}; taking the one before")
    if checkpoints and not brought:
        raise _Damaged
    for name in folders:
        if name in there:
            try:
                _fetch_folder(place, f"{source}/{name}", target / name)
            except _Damaged as damage:
                raise UserError(
                    f"sync {place.name}: {source}/{name}: {damage}.",
                    f"Bring {source} from another place, or delete it there to start again.",
                ) from None
            (target / name / MANIFEST).unlink(missing_ok=True)  # it was made for the copy
    place.fetch(f"{source}/{STAGE_FILE}", target / STAGE_FILE)
    return brought


def _fetch_folder(place: Place, source: str, target: Path) -> None:
    with folder_aside(target) as aside:
        place.fetch(source, aside)
        if fault := manifest_fault(aside):
            raise _Damaged(fault)


class _Damaged(Exception):
    """A folder at the place differs from its manifest."""


def _kept(stage: StageDir) -> bool:
    """Whether a stage has something that must not be lost."""
    return (stage.path / STAGE_FILE).is_file() and (bool(stage.checkpoints()) or stage.complete())


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint-"))


def _is_copied(name: str) -> bool:
    """Whether a file of a stage (other than stage.json) is copied."""
    logs = name.endswith(".jsonl") and not name.startswith(".")
    reference = name.startswith("reference-") and name.endswith(".safetensors")
    return logs or reference or name in ("config.yaml", "lengths.json", "report.html")


def _files(stage: StageDir) -> list[Path]:
    return sorted(path for path in stage.path.iterdir() if path.is_file() and _is_copied(path.name))


def _adapters(stage: StageDir) -> list[Path]:
    return [path for path in (stage.adapter, stage.delta) if path.is_dir()]


def _state(path: Path) -> object:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def _marks(stage: str, info: dict[str, Any]) -> set[str]:
    """What tells a run from another of its name: its id, or (earlier versions) when its stages were begun."""
    return {str(mark) for mark in (info.get("id"), info.get("created") and f"{stage} {info['created']}") if mark}


def _info_there(place: Place, folder: str) -> dict[str, Any] | None:
    """A stage's stage.json at the place, or None."""
    raw = place.read(f"{folder}/{STAGE_FILE}")
    if raw is None:
        return None
    try:
        return dict(json.loads(raw))
    except (ValueError, TypeError):
        raise UserError(
            f"sync {place.name}: {folder}/{STAGE_FILE} is not a JSON object.",
            "Delete this folder there, or name another place.",
        ) from None


def _unreadable(place: Place, error: Exception) -> UserError:
    return UserError(
        f"sync {place.name}: {_line(error)}. Whether it has the run is not known.",
        "Try again when it can be reached, or leave sync out to start here.",
    )


def _line(error: Exception) -> str:
    text = f"{error.message} {error.hint}" if isinstance(error, UserError) else str(error)
    return redact(" ".join(text.split())[:200] or type(error).__name__)
