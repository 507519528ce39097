"""A disk that fails: the k-th call of ``zephyr_lite.io.atomic`` that changes the disk raises an error, or the process dies."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from zephyr_lite.io import atomic

# full: no space is left; died: the process ends before the call; torn: it ends when half is written
KINDS = ("full", "died", "torn")


class Died(BaseException):
    """The process is gone: nothing that it would still do reaches the disk."""


class Disk:
    """What reaches the disk.

    Attributes:
        at, kind: the call that fails (from 0; None: none), and how.
        calls: (name, path) of every call: write, fsync, replace, remove.
    """

    def __init__(self, at: int | None, kind: str) -> None:
        self.at, self.kind, self.dead = at, kind, False
        self.calls: list[tuple[str, str]] = []

    def call(self, name: str, path: Any, do: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        if self.dead:
            raise Died
        self.calls.append((name, os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)))
        if len(self.calls) - 1 != self.at:
            return do()
        if self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.dead = True
        if self.kind == "torn":
            half()
        raise Died


@contextmanager
def faulty(at: int | None = None, kind: str = "full") -> Iterator[Disk]:
    """Within, the call of that number fails; with None all are only noted."""
    disk = Disk(at, kind)
    remove_tree = atomic.remove_tree

    class File(io.FileIO):
        def write(self, data: Any) -> int:
            write = super().write
            return disk.call("write", self.name, lambda: write(data), lambda: write(bytes(data)[: len(data) // 2]))

    def opened(path: Any, mode: str = "r", buffering: int = -1) -> Any:
        if mode == "rb":
            return open(path, mode)
        return File(path, mode) if buffering == 0 else io.BufferedWriter(File(path, mode))

    class System:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, handle: int) -> None:
            disk.call("fsync", handle, lambda: os.fsync(handle))

        def replace(self, source: Path, target: Path) -> None:
            disk.call("replace", target, lambda: os.replace(source, target))

    def remove(path: Path) -> None:
        if not disk.dead:
            disk.calls.append(("remove", str(path)))
            remove_tree(path)

    with (
        patch.object(atomic, "os", System()),
        patch.object(atomic, "open", opened, create=True),
        patch.object(atomic, "remove_tree", remove),
    ):
        yield disk


def left_aside(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob(".*") if atomic._ASIDE.fullmatch(path.name)]
