"""One process at a time on a folder: a lock that a dead process, a reboot or a lost machine cannot leave in the way.

``.lock`` in the folder says who works there (JSON: host, machine, boot_id, pid, started, command, since). On top of it
the file is locked with flock while its owner lives, so the system itself frees it however a process ends. The content
decides where flock does not: across machines (a shared folder), and on file systems without it. There the owner touches
the file every ``HEARTBEAT`` seconds, and a machine that has not done so for ``SILENT`` seconds is taken for lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from .flock import flock

LOCK_FILE = ".lock"
HEARTBEAT = 20.0  # seconds
SILENT = 300.0  # seconds: clocks of two machines differ, and a file server may be slow
CLOCKS = 60.0  # a sign of life so far in the future says only that one of two clocks is wrong


@dataclass
class _Held:
    path: Path
    handle: int
    token: str
    count: int = 1
    stop: threading.Event = field(default_factory=threading.Event)


_held: dict[str, _Held] = {}
_guard = threading.RLock()


@contextlib.contextmanager
def alone(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Nobody else works in this folder while the block runs; the same process may enter again.

    The folder is made where it is not there, and goes again with the lock where nothing was put into it.

    Args:
        say: is told where a lock of somebody who is gone was taken over.

    Raises:
        UserError: somebody else works there, or the lock cannot be made.
    """
    folder = Path(os.path.abspath(folder))
    path = folder / LOCK_FILE
    key = str(path.resolve())
    with _guard:
        held = _held.get(key)
        if held is not None:
            held.count += 1
            made: list[Path] = []
        else:
            made = _make(path.parent)
            try:
                held = _held[key] = _acquire(path, folder, say)
            except BaseException:
                _unmake(made)
                raise
            beat = threading.Thread(target=_touch, args=(held, folder, say), daemon=True, name="zephyr-lite lock")
            beat.start()
    try:
        yield
    finally:
        with _guard:
            held.count -= 1
            if held.count == 0:
                del _held[key]
                held.stop.set()
                _release(held)
                _unmake(made)


def _acquire(path: Path, folder: Path, say: Callable[[str], None]) -> _Held:
    token = uuid.uuid4().hex
    for attempt in range(50):
        handle = _open(path)
        try:
            flocked = flock(handle)
            owner = _read(handle)
            if flocked is False:
                if attempt < 5 and not owner:  # somebody has just taken it and writes who he is
                    os.close(handle)
                    time.sleep(0.05)
                    continue
                raise _refusal(folder, owner)
            if not _is(path, handle):  # its owner took it away between our opening and our locking it
                os.close(handle)
                continue
            if owner and (reason := _in_the_way(owner, handle, say, flocked=bool(flocked))):
                raise _refusal(folder, owner, reason)
            _write(handle, {**_self(), "token": token})
            if flocked is None:  # two may have come this far: the later writer has it
                time.sleep(0.2)
                now = _read(handle)
                if now.get("token") != token:
                    raise _refusal(folder, now)
            if owner:
                say(f"{folder}: the lock of {_who(owner)} is left from a process that is gone; taken over")
            return _Held(path, handle, token)
        except OSError as error:
            _close(handle)
            raise UserError(f"{path}: cannot be locked: {error.strerror}.", "Choose another output_dir.") from None
        except BaseException:
            _close(handle)
            raise
    raise _refusal(folder, {})


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise UserError(
            f"{path}: the lock of the folder cannot be made: {error.strerror}.",
            "Make the folder writable and free some space, or choose another output_dir.",
        ) from None


def _in_the_way(owner: dict[str, Any], handle: int, say: Callable[[str], None], *, flocked: bool) -> str | None:
    """Why the owner that the content names may be at work, or None where he is not."""
    ours = _self()
    silence = time.time() - os.fstat(handle).st_mtime
    same_machine = (owner.get("host"), owner.get("machine")) == (ours["host"], ours["machine"])
    if owner.get("boot_id") == ours["boot_id"] and ours["boot_id"] is not None:
        if flocked:  # the same kernel would not have given it to us
            return None
        if same_machine:
            return "is running" if _alive(owner) else None
    elif same_machine:
        if ours["boot_id"] is None and not flocked:  # no Linux: a reboot does not show
            return "is running" if _alive(owner) else None
        return None
    if silence < -CLOCKS:
        say(f"the lock of {_who(owner)} is of a time to come; looking for {3 * HEARTBEAT:.0f} s whether it is alive")
        return None if _still(handle) else "is at work"
    if silence < SILENT:
        return f"was at work {max(0, int(silence))} s ago"
    return None


def _still(handle: int) -> bool:
    """Whether nobody touches the lock for three heartbeats: its time alone says nothing."""
    touched, until = os.fstat(handle).st_mtime_ns, time.monotonic() + 3 * HEARTBEAT
    while time.monotonic() < until:
        time.sleep(min(1.0, HEARTBEAT))
        if os.fstat(handle).st_mtime_ns != touched:
            return False
    return True


def _alive(owner: dict[str, Any]) -> bool:
    pid = owner.get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    started = _started(pid)
    return started is None or owner.get("started") in (None, started)


def _started(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None where that is not to be had."""
    try:
        # the second field is the command in parentheses, which may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def this_host() -> dict[str, Any]:
    """What tells this machine, and this boot of it, from another: host, machine, boot_id (None where not to be had)."""
    return {
        "host": platform.node(),
        "machine": _line("/etc/machine-id"),
        "boot_id": _line("/proc/sys/kernel/random/boot_id"),
    }


def _self() -> dict[str, Any]:
    words = [Path(sys.argv[0]).name, *sys.argv[1:2]]  # no further: what follows may hold a secret
    return {
        **this_host(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "command": " ".join(word for word in words if word),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _who(owner: dict[str, Any]) -> str:
    shown = {
        key: "".join(c for c in str(owner.get(key, "?"))[:80] if c.isprintable()) for key in ("pid", "host", "since")
    }
    command = "".join(c for c in str(owner.get("command", ""))[:80] if c.isprintable())
    return f"process {shown['pid']} on {shown['host']} ({command + ', ' if command else ''}since {shown['since']})"


def _refusal(folder: Path, owner: dict[str, Any], reason: str = "is running") -> UserError:
    if not owner:
        return UserError(
            f"{folder}: another process is at work here.", "Wait for it, end it, or choose another output_dir."
        )
    cure = f"Wait for it, end it (kill {owner.get('pid')}), or choose another output_dir."
    ours = this_host()
    if any(
        owner.get(key) != ours[key] for key in ("host", "machine", "boot_id")
    ):  # the number means another process here
        cure = (
            "Wait for it, or end it there; if that machine is gone, "
            f"the lock gives way {SILENT / 60:.0f} minutes after its last sign of life."
        )
    return UserError(f"{folder}: {_who(owner)} {reason} and works here.", cure)


def _read(handle: int) -> dict[str, Any]:
    """What the file says; nothing where a process died before it had written it."""
    try:
        value = json.loads(os.pread(handle, 65536, 0)) if hasattr(os, "pread") else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(handle: int, value: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    data = (json.dumps(value) + "\n").encode()
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except OSError:
        return False


def _touch(held: _Held, folder: Path, say: Callable[[str], None]) -> None:
    while not held.stop.wait(HEARTBEAT):
        with _guard:
            if held.stop.is_set():
                return
            with contextlib.suppress(OSError):  # a file server that is away for a moment
                os.utime(held.handle if os.utime in os.supports_fd else held.path)
            taken = _read(held.handle).get("token") not in (held.token, None)
        if taken:
            say(f"{folder}: another machine took this one for lost and works here now; end one of the two")
            return


def _release(held: _Held) -> None:
    """Take the file away and let go of it, in this order: whoever locks what is gone sees that (``_is``)."""
    with contextlib.suppress(OSError):
        if _is(held.path, held.handle) and _read(held.handle).get("token") == held.token:
            held.path.unlink()
    _close(held.handle)


def _close(handle: int) -> None:
    with contextlib.suppress(OSError):
        os.close(handle)


def _make(folder: Path) -> list[Path]:
    """Make a folder; returns those that were not there, the lowest first."""
    missing = []
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        missing.append(place)
        place = place.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"{place} is a file" if place.is_file() else error.strerror
        _unmake(missing)
        raise UserError(f"{folder}: cannot be made: {reason}.", "Choose another output_dir.") from None
    return missing


def _unmake(made: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: something was put there
        for folder in made:
            folder.rmdir()


def _forget_in_child() -> None:
    """A forked worker shares the lock and would hold it after its parent's death: close it there, which frees nothing
    here."""
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        held.stop.set()
        _close(held.handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
