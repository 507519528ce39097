"""Copies of complete checkpoints at another place, and a run restored from there on a new machine.

``sync: FOLDER`` or ``sync: hub:OWNER/NAME`` names the place. It holds what a new machine needs of each stage:

    NAME/STAGE/  stage.json  config.yaml  metrics.jsonl  reference-*.safetensors  checkpoint-N/  adapter/  delta/

with the newest and the best checkpoint. A folder there appears complete or not at all.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from ..errors import Interrupted, UserError
from .atomic import MANIFEST, alone, copy_file, folder_aside, manifest_fault, remove_folder, sweep
from .redact import redact
from .run_dir import STAGE_FILE, StageDir, stages_of

logger = logging.getLogger(__name__)

RETRY = 15.0  # seconds between attempts of ``finish``
ATTEMPTS = 12  # of ``finish``: the machine may be rented
AFTER_INTERRUPT = 60.0  # seconds that a copy may take after an interrupt
SQUASH_EVERY = 20  # commits: the history of deleted checkpoints counts towards the account's storage
# a stage's files beside stage.json that are copied
FILES = ("*.jsonl", "reference-*.safetensors", "config.yaml", "lengths.json", "report.html")
_REPO = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class FolderPlace:
    """A folder as the place: another disk, a mounted drive, a network share."""

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    @contextmanager
    def files(self, patterns: Sequence[str]) -> Iterator[Path]:
        """A folder with at least those of the place's files whose paths match (``fnmatch``)."""
        yield self.root

    def push(self, stage: StageDir, folder: str, checkpoints: Sequence[str]) -> None:
        """Copy a stage with these checkpoints, then delete other checkpoints there.

        Args:
            folder: of the stage at the place: NAME/STAGE.
        """
        target = self.root / folder
        target.mkdir(parents=True, exist_ok=True)
        sweep(target)
        for path in _content(stage, checkpoints):
            copy = target / path.name
            if path.is_file():
                copy_file(path, copy)
                continue
            manifest, copied = path / MANIFEST, copy / MANIFEST
            if manifest.is_file() and copied.is_file() and manifest.read_bytes() == copied.read_bytes():
                continue
            if manifest.is_file() and (fault := manifest_fault(path)):  # do not replace a good copy
                raise OSError(f"{path.name}: {fault}")
            _copy_folder(path, copy)
        for old in StageDir(target).checkpoints():
            if old.name not in checkpoints:
                remove_folder(old)


class HubPlace:
    """A repository of the Hugging Face hub as the place, made private; methods as ``FolderPlace``'s, ``push`` is one commit."""

    def __init__(self, repo: str) -> None:
        self.repo, self.name, self.commits = repo, f"hub:{repo}", 0
        check_repo(repo, "sync hub:")
        self.api = HfApi()
        disable_progress_bars()  # they would run through the lines of training

    @contextmanager
    def files(self, patterns: Sequence[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            with suppress(RepositoryNotFoundError):
                self.api.snapshot_download(self.repo, allow_patterns=list(patterns), local_dir=folder)
            yield Path(folder)

    def push(self, stage: StageDir, folder: str, checkpoints: Sequence[str]) -> None:
        if not self.commits:
            self.api.create_repo(self.repo, private=True, exist_ok=True)
        content = _content(stage, checkpoints)
        self.api.upload_folder(
            repo_id=self.repo,
            folder_path=stage.path,
            path_in_repo=folder,
            commit_message=f"{folder}: {', '.join(path.name for path in content)}"[:200],
            allow_patterns=[path.name if path.is_file() else f"{path.name}/*" for path in content],
            delete_patterns=["checkpoint-*"],  # those that are not uploaded
        )
        self.commits += 1
        if self.commits % SQUASH_EVERY == 0:
            with suppress(HTTPError):  # the next time will do
                self.api.super_squash_history(self.repo)


def check_repo(repo: str, prefix: str = "") -> None:
    """Check what can be known of a repository of the hub before there is anything to upload.

    Args:
        prefix: what the user wrote before its name.
    """
    if not _REPO.fullmatch(repo):
        raise UserError(f"{prefix}{repo}: is not a repository's name.", f"Write {prefix}OWNER/NAME.")
    if constants.HF_HUB_OFFLINE or get_token() is None:
        missing = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no token of the hub"
        raise UserError(
            f"{prefix}{repo}: {missing}.", "Unset HF_HUB_OFFLINE, and run `hf auth login` (with write access)."
        )


def place_of(sync: str, run: Path) -> FolderPlace | HubPlace:
    """The place that the key ``sync`` names, for copies of ``run``."""
    if sync.startswith("hub:"):
        return HubPlace(sync.removeprefix("hub:"))
    folder, here = Path(sync).expanduser().resolve(), run.resolve()
    if "://" in sync or folder.is_file():
        raise UserError(f"sync {sync}: is neither a folder nor hub:OWNER/NAME.", "Name a folder on a mounted disk.")
    if folder.is_relative_to(here) or (folder / here.name).is_relative_to(here):
        raise UserError(f"sync {sync}: is in the run's own folder, {run}.", "Name a folder on another disk.")
    return FolderPlace(Path(sync).expanduser())


def _content(stage: StageDir, checkpoints: Iterable[str]) -> list[Path]:
    """The files and folders of a stage that are copied, stage.json last: a stage that it calls complete has its adapter."""
    files = [p for p in sorted(stage.path.iterdir()) if p.is_file() and _is_copied(p.name)]
    folders = [stage.path / name for name in checkpoints]
    if stage.complete():
        folders += [path for path in (stage.adapter, stage.delta) if path.is_dir()]
    return [*files, *folders, stage.path / STAGE_FILE]


def _is_copied(name: str) -> bool:
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in FILES)


def _copy_folder(source: Path, target: Path) -> None:
    with folder_aside(target) as aside:
        shutil.copytree(source, aside, copy_function=shutil.copyfile, dirs_exist_ok=True)


class Mirror(AbstractContextManager["Mirror"]):
    """Copies a stage to a place in the background: the newest and the best checkpoint. Only ``finish`` waits. A copy that
    fails is logged once, and the next checkpoint's copy makes up for it. A stage is trained and saved within it as a
    context; at the end, and when it is interrupted, its last state is copied too.

    Args:
        sync: the key ``sync``, which names the place.
        stage: the stage.

    Raises:
        UserError: ``sync`` names no place.
    """

    def __init__(self, sync: str, stage: StageDir) -> None:
        self.place, self.stage = place_of(sync, stage.run), stage
        self.folder = f"{stage.run.resolve().name}/{stage.path.name}"
        self._best: int | None = None
        self._wanted: tuple[str, ...] = ()  # checkpoints to be copied next
        self._running: tuple[str, ...] = ()  # checkpoints being copied
        self._fault: str | None = None  # of the last copy
        self._others_sent = self._closed = False  # the run's other stages are at the place; nothing is copied any more
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, Interrupted | UserError | OSError):
            self.finish(AFTER_INTERRUPT)
        self._closed = True  # a copy that is not complete does not appear there
        if self._thread is not None:
            self._thread.join(timeout=2)

    def changed(self, best: int | None) -> None:
        """A checkpoint was written: copy the newest, and the best one (a step, or None). If the place is slower than
        checkpoints are written, those in between are left out."""
        self._best = best
        found = [path.name for path in self.stage.checkpoints()]
        self._wanted = tuple(dict.fromkeys([*found[-1:], *(name for name in found if name == f"checkpoint-{best}")]))
        self._thread = threading.Thread(target=self._push, args=(self._wanted,), daemon=True, name="zephyr-lite sync")
        self._thread.start()

    def busy(self) -> frozenset[str]:
        """Names of checkpoints that are being copied, or about to be: not to be deleted now."""
        waiting = self._wanted if self._thread is not None and self._thread.is_alive() else ()
        return frozenset((*waiting, *self._running))

    def finish(self, timeout: float = 3600.0, *, attempts: int = ATTEMPTS) -> bool:
        """Copy the stage as it is now, and wait for it: ``timeout`` seconds, or until so many attempts failed.

        Returns:
            whether everything is there.
        """
        end = time.monotonic() + timeout
        for attempt in range(attempts):
            if attempt:
                time.sleep(min(RETRY, max(0.0, end - time.monotonic())))
            self.changed(self._best)
            assert self._thread is not None
            self._thread.join(max(0.0, end - time.monotonic()))
            if not self._thread.is_alive() and self._fault is None:
                return True
            if self._thread.is_alive():
                break
        logger.warning(
            f"sync: {self.place.name} does not have the last state of the stage ({self._fault or 'it is too slow'}). The same "
            "command copies it there when it is started again."
        )
        return False

    def _push(self, wanted: tuple[str, ...]) -> None:
        with self._one_at_a_time:
            if wanted is not self._wanted or self._closed:  # a newer copy waits
                return
            self._running, before = wanted, self._fault
            try:
                for other in stages_of(self.stage.run):  # may have been trained without ``sync``
                    if not self._others_sent and other.path != self.stage.path and other.complete():
                        self.place.push(other, f"{self.stage.run.resolve().name}/{other.path.name}", ())
                self._others_sent = True
                self.place.push(self.stage, self.folder, wanted)
                self._fault = None
            except Exception as error:  # of any library: a copy is no reason to lose the run
                self._fault = _line(error)
            self._running = ()
        if self._fault is None and before is not None:
            logger.info(f"sync: {self.place.name} is up to date again")
        elif self._fault is not None and before is None:
            logger.warning(f"sync: {self.place.name}: {self._fault}; training continues, and the copy is tried again")


def restore(sync: str, stage: StageDir) -> None:
    """Fetch what the place has of a run and this machine lacks: complete stages, and of ``stage`` the newest and the
    best checkpoint. Does nothing if the files here are as new.

    Raises:
        UserError: the place has another run of this name; the stage is not here and the place cannot be read; all
            checkpoints there are damaged; another process works on the run.
    """
    place, name = place_of(sync, stage.run), stage.run.resolve().name
    with alone(stage.run):
        sweep(stage.run)
        here = [each for each in stages_of(stage.run) if each.complete() or each.checkpoints()]
        is_here = stage.path in [each.path for each in here]
        try:
            with place.files([f"{name}/*/{STAGE_FILE}", f"{name}/*/{MANIFEST}"]) as there:
                copies = stages_of(there / name)
                if here and copies and not _marks(here) & _marks(copies):
                    raise UserError(
                        f"sync {place.name}: holds another run named {name}, not {stage.run}.",
                        "Choose another place or another output_dir; or move the one that is not wanted away.",
                    )
                missing = {copy.path.name: parts for copy in copies if (parts := _missing(copy, stage))}
            if not copies and not is_here:  # also the case if a drive is not mounted
                logger.info(
                    f"sync: {place.name} has nothing of {name} yet, so it starts here. If it should, is that place mounted?"
                )
            for folder, parts in missing.items():
                wanted = (STAGE_FILE, *FILES, *(f"{part}/*" for part in parts))
                with place.files([f"{name}/{folder}/{file}" for file in wanted]) as there:
                    _fetch(place, StageDir(there / name / folder), StageDir(stage.run / folder), parts)
        except (OSError, HTTPError) as error:
            if not is_here:
                raise _unreadable(place, error) from None
            logger.warning(f"sync: {place.name}: {_line(error)}; continuing with the files here")


def _missing(copy: StageDir, stage: StageDir) -> list[str]:
    """The folders to fetch of a stage at the place: its adapters, or, if it is ``stage`` and unfinished, its checkpoints, the
    newest first. Of the copy's checkpoints only the manifests need to be there."""
    here = StageDir(stage.run / copy.path.name)
    if here.complete():
        return []
    if copy.complete():
        return ["adapter", "delta"]
    if here.path != stage.path:
        return []
    names, newest = [path.name for path in reversed(copy.checkpoints())], -1
    for path in here.checkpoints():
        if not (path / MANIFEST).is_file() or manifest_fault(path) is None:
            newest = int(path.name.removeprefix("checkpoint-"))
    return names if names and int(names[0].removeprefix("checkpoint-")) > newest else []


def newest_there(sync: str, runs: Path) -> str | None:
    """The name of the run at the place whose stage ``sft`` was finished last; None: there is none. ``runs``: the folder of
    the runs here."""
    place, found = place_of(sync, runs / "new"), []
    try:
        with place.files([f"*/sft/{STAGE_FILE}"]) as there:
            for file in there.glob(f"*/sft/{STAGE_FILE}"):
                stage = StageDir(file.parent)
                if stage.complete():
                    found.append((str((stage.info() or {}).get("finished", "")), stage.run.name))
    except (OSError, HTTPError) as error:
        raise _unreadable(place, error) from None
    return max(found)[1] if found else None


def _fetch(place: FolderPlace | HubPlace, copy: StageDir, here: StageDir, folders: list[str]) -> None:
    """Replace a stage here by its copy: its files and the undamaged ones of these folders."""
    if here.path.exists():
        here.claim()
    complete, brought = copy.complete(), []
    with folder_aside(here.path) as target:
        for path in copy.path.iterdir():
            if path.is_file() and (_is_copied(path.name) or path.name == STAGE_FILE):
                copy_file(path, target / path.name)
        for folder in (copy.path / name for name in folders if (copy.path / name).is_dir()):
            # adapters have a manifest where an earlier version copied them
            fault = manifest_fault(folder) if not complete or (folder / MANIFEST).is_file() else None
            if fault is None:
                _copy_folder(folder, target / folder.name)
                brought.append(folder.name)
            else:
                logger.warning(f"sync {place.name}: {copy.path.name}/{folder.name}: {fault}; not taken")
        if not brought or (complete and here.adapter.name not in brought):
            raise UserError(
                f"sync {place.name}: {here.run.name}/{here.path.name} is damaged there.",
                "Delete that folder there to start again or to continue with the files here, or leave sync out.",
            )
    logger.info(f"{here.path} was fetched from {place.name}, {'complete' if complete else f'at {brought[0]}'}")


def _marks(stages: list[StageDir]) -> set[str]:
    """What tells a run from another of its name: its id, or (earlier versions) when its stages were begun."""
    infos = [(stage.path.name, stage.info() or {}) for stage in stages]
    return {str(info["id"]) for _, info in infos if "id" in info} | {f"{n} {i.get('created')}" for n, i in infos}


def _unreadable(place: FolderPlace | HubPlace, error: Exception) -> UserError:
    return UserError(
        f"sync {place.name}: {_line(error)}. Whether it has the run is not known.",
        "Try again when it can be reached, or leave sync out to start here.",
    )


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split())[:200] or type(error).__name__)
