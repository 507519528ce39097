"""A stage's copy elsewhere, kept up to date by a thread of its own: the newest and the best checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...config.load import RunConfig
from ...errors import Interrupted, UserError
from ..interrupts import Output
from ..manifest import MANIFEST
from ..run_dir import STAGE_FILE, StageDir, stages_of
from .choose import place_of
from .place import CHECKPOINT, Place, PlaceError, info_there, is_copied, marks, run_name

Say = Callable[[str], None]
WAITS = (5.0, 15.0, 60.0, 300.0)  # seconds before another attempt
TOLD_EVERY = 15.0  # seconds, while somebody waits
PATIENCE = 180.0  # seconds of nothing but failures, while somebody waits: the machine may be rented


@dataclass(frozen=True)
class _Wanted:
    """What is to lie there: checkpoints' names, the newest first; ``keep`` are those that are not to be deleted."""

    checkpoints: tuple[str, ...]
    keep: frozenset[str]


class Mirror:
    """Copies a stage to a place, in the background. No method but ``finish`` waits, and none fails because of the place.

    Args:
        place: where to.
        folder: the stage's folder there: NAME/STAGE.
        stage: the stage.
    """

    def __init__(self, place: Place, folder: str, stage: StageDir, say: Say, waits: tuple[float, ...] = WAITS) -> None:
        self.place, self.folder, self.stage, self.waits = place, folder, stage, waits
        self.say = Output().of(say)  # a thread that cannot print goes on copying
        self._wanted: _Wanted | None = None
        self._at_work: _Wanted | None = None
        self._fault: PlaceError | None = None
        self._said: set[str] = set()
        self._sent: dict[str, object] = {}  # name → what of it lies there
        self._known: set[str] = set()  # checkpoints there that are ours, or were there before
        self._best: int | None = None
        self._prepared = self._closed = False
        self._finishing = False  # somebody waits: attempts follow each other sooner
        self._failing_since: float | None = None
        self._turn = threading.Condition()
        self._thread: threading.Thread | None = None

    def changed(self, best: int | None) -> None:
        """A checkpoint was written (and older ones deleted): copy the newest, and the best one (a step, or None).

        Where the place is slower than checkpoints come, what was not begun yet is left out.
        """
        self._best = best
        found = [path.name for path in self.stage.checkpoints()]
        newest = found[-1:]
        good = [name for name in found if best is not None and name == f"checkpoint-{best}"]
        wanted = tuple(dict.fromkeys([*newest, *good]))
        kept = frozenset(wanted) | ({f"checkpoint-{best}"} if best is not None else frozenset())
        with self._turn:
            if self._closed:
                return
            self._wanted = _Wanted(wanted, kept)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="zephyr-lite sync")
                self._thread.start()
            self._turn.notify_all()

    def busy(self) -> frozenset[str]:
        """Names of checkpoints that are being read, or are about to be: not to be deleted now."""
        with self._turn:
            parts = [part.checkpoints for part in (self._wanted, self._at_work) if part is not None]
            return frozenset(name for part in parts for name in part)

    def finish(self, timeout: float = 3600.0, *, patience: float = PATIENCE) -> bool:
        """Copy the stage as it is now, and wait until it is there.

        Args:
            timeout: seconds; then it is said what is missing.
            patience: seconds for which every attempt may fail.
        Returns:
            whether everything is there.
        """
        self.changed(self._best)
        begun = time.monotonic()
        end, tell = begun + timeout, begun + TOLD_EVERY
        with self._turn:
            self._finishing = True
            self._turn.notify_all()
            while self._wanted is not None or self._at_work is not None:
                now = time.monotonic()
                failing = self._failing_since is not None and now - max(begun, self._failing_since) >= patience
                if now >= end or self._closed or failing:
                    break
                if now >= tell:
                    tell = now + TOLD_EVERY
                    why = f" ({self._fault})" if self._fault else ""
                    self.say(f"sync: still copying to {self.place.name}{why}; {end - now:.0f} s more at most")
                self._turn.wait(min(end, tell, now + patience) - now)
            self._finishing = False
            missing = self._wanted or self._at_work
            if missing is None:
                return True
            names = ", ".join(name for name in missing.checkpoints if name not in self._sent)
            why = f": {self._fault}" if self._fault else ""
        self.say(
            f"sync: {self.place.name} does not have {names or 'the last state of the stage'}{why}. It is here; the same "
            "command copies it there when it is started again."
        )
        return False

    def close(self) -> None:
        """Copy nothing more; what is being copied does not appear there if it is not complete."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=2)

    def _work(self) -> None:
        failures = 0
        while True:
            with self._turn:
                while self._wanted is None and not self._closed:
                    self._turn.wait()
                if self._closed:
                    return
                wanted = self._at_work = self._wanted
                self._wanted = None
            assert wanted is not None
            fault = self._try(wanted)
            with self._turn:
                self._at_work = None
                self._fault = fault
                if fault is None:
                    self._failing_since = None
                elif self._failing_since is None:
                    self._failing_since = time.monotonic()
                if fault is not None and self._wanted is None:
                    self._wanted = wanted  # unless there is something newer by now
                self._turn.notify_all()
            if fault is None:
                if failures:
                    self.say(f"sync: {self.place.name} is up to date again")
                    self._said.clear()
                failures = 0
                continue
            self._tell(fault)
            wait = self.waits[min(failures, len(self.waits) - 1)]
            failures += 1
            failed = time.monotonic()
            end = failed + max(wait, min(fault.wait or 0.0, 3600.0))
            with self._turn:
                while not self._closed:
                    until = min(end, failed + self.waits[0]) if self._finishing else end
                    if (left := until - time.monotonic()) <= 0:
                        break
                    self._turn.wait(left)

    def _tell(self, fault: PlaceError) -> None:
        if fault.kind not in self._said:
            self._said.add(fault.kind)
            self.say(f"sync: {self.place.name}: {fault}; training goes on, and it is tried again")

    def _try(self, wanted: _Wanted) -> PlaceError | None:
        try:
            self._send(wanted)
        except PlaceError as error:
            return error
        except UserError as error:
            return PlaceError(error.message, error.hint)
        except Exception as error:  # whatever a library has: a copy is no reason to lose the run
            return PlaceError(type(error).__name__, str(error))
        return None

    def _send(self, wanted: _Wanted) -> None:
        if not self._prepared:
            self.place.prepare()
            self._is_ours()
            self._send_others()
            self._known.update(self.place.names(self.folder))
            self._prepared = True
        there = self.place.names(self.folder)
        strangers = [name for name in there if CHECKPOINT.fullmatch(name) and name not in self._known]
        if strangers:
            raise PlaceError(
                "another machine",
                f"{self.folder}/{strangers[-1]} was not copied from here: the run goes on elsewhere too; end one of the two",
            )
        self._known.update(wanted.checkpoints)
        add: dict[str, Path | bytes] = {}
        marks: dict[str, object] = {}

        def wants(name: str, path: Path, mark: object) -> None:
            if self._sent.get(name) != mark or name not in there:  # a place may lose what it had
                add[name], marks[name] = path, mark

        for path in _files(self.stage):
            wants(path.name, path, _mark(path))
        for name in wanted.checkpoints:
            manifest = self.stage.path / name / MANIFEST
            mark = manifest.read_bytes() if manifest.is_file() else b""
            if name in there and name not in self._sent and mark:
                lies_there = self.place.read(f"{self.folder}/{name}/{MANIFEST}")
                if lies_there == mark:
                    self._sent[name] = mark
            wants(name, self.stage.path / name, mark)
        if self.stage.complete():
            for path in _adapters(self.stage):
                wants(path.name, path, [(p.name, _mark(p)) for p in sorted(path.iterdir())])
        info = self.stage.path / STAGE_FILE
        wants(STAGE_FILE, info, _mark(info))  # last: where it says "complete", the adapter is there
        old = [name for name in there if CHECKPOINT.fullmatch(name) and name not in wanted.keep]
        if not wanted.checkpoints:
            old = []
        if add or old:
            self.place.put(self.folder, add, old)
        self._sent.update(marks)
        for name in old:
            self._sent.pop(name, None)

    def _is_ours(self) -> None:
        """Raises:
        PlaceError: another run of this name lies there (one that began at the same time, on another machine).
        """
        theirs, ours = info_there(self.place, self.folder), self.stage.info() or {}
        name = self.stage.path.name
        if theirs is None or marks(name, theirs) & marks(name, ours):
            return
        kept = [n for n in self.place.names(self.folder) if CHECKPOINT.fullmatch(n)]
        if kept or theirs.get("status") == "complete":
            raise PlaceError("another run", f"{self.folder} there is another run, begun {theirs.get('created', '?')}")

    def _send_others(self) -> None:
        """The run's complete stages, which this one may stand on: they may have been trained without ``sync``."""
        for other in stages_of(self.stage.run):
            file = other.path / STAGE_FILE
            folder = f"{self.folder.rsplit('/', 1)[0]}/{other.path.name}"
            if other.path == self.stage.path or not other.complete():
                continue
            if self.place.read(f"{folder}/{STAGE_FILE}") != file.read_bytes():
                self.place.put(folder, {path.name: path for path in (*_files(other), *_adapters(other), file)}, [])


def _files(stage: StageDir) -> list[Path]:
    """A stage's files, stage.json excepted."""
    return sorted(path for path in stage.path.iterdir() if path.is_file() and is_copied(path.name))


def _adapters(stage: StageDir) -> list[Path]:
    return [path for path in (stage.adapter, stage.delta) if path.is_dir()]


def _mark(path: Path) -> object:
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def open_mirror(config: RunConfig, stage_dir: StageDir, say: Say) -> Mirror | None:
    """The copy of this stage that ``sync`` asks for, or None where it asks for none.

    Raises:
        UserError: ``sync`` names no place.
    """
    if config.sync is None:
        return None
    return Mirror(place_of(config), f"{run_name(config)}/{stage_dir.path.name}", stage_dir, say)


def catch_up(config: RunConfig, stage_dir: StageDir, say: Say) -> None:
    """Copy a finished stage whose copy is not finished (the network was away at its end)."""
    mirror = open_mirror(config, stage_dir, say)
    if mirror is None:
        return
    here = (stage_dir.path / STAGE_FILE).read_bytes()
    try:
        if mirror.place.read(f"{mirror.folder}/{STAGE_FILE}") == here:
            return
    except PlaceError as error:
        say(f"sync: {mirror.place.name}: {error}")
        return
    say(f"copying {stage_dir.path} to {mirror.place.name}, which does not have the whole of it")
    mirror.finish()
    mirror.close()


@contextmanager
def kept_elsewhere(mirror: Mirror | None, *, after_interrupt: float = 60.0) -> Iterator[None]:
    """Within, a stage is trained and closed; at the end, and where it is stopped, what it is then is copied too.

    Args:
        after_interrupt: seconds that may take when it is stopped: who asked for that may not wait much longer.
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
