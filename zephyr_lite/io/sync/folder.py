"""A folder as the place for copies: another disk, a mounted drive, a network share."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..atomic import bytes_aside, copy_file, folder_aside, make_folder, remove_folder, sweep
from ..manifest import MANIFEST, manifest_fault, write_manifest
from .place import PlaceError

KINDS = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "read-only",
    errno.EACCES: "not permitted",
    errno.EPERM: "not permitted",
    errno.EIO: "I/O error",
    errno.ENOENT: "not there",
    errno.ENOTCONN: "not connected",
    errno.ESTALE: "not connected",
}


class FolderPlace:
    """See ``place.Place``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def prepare(self) -> None:
        with _named():
            make_folder(self.root)

    def names(self, folder: str) -> list[str]:
        with _named():
            here = self._at(folder)
            if not here.is_dir():
                return []
            return sorted(path.name for path in here.iterdir() if not path.name.startswith("."))

    def read(self, path: str) -> bytes | None:
        with _named():
            place = self._at(path)
            return place.read_bytes() if place.is_file() else None

    def put(self, folder: str, add: Mapping[str, Path | bytes], delete: Sequence[str]) -> None:
        with _named():
            here = self._at(folder)
            make_folder(here)
            sweep(here)
            for name, source in add.items():
                if isinstance(source, bytes):
                    with bytes_aside(here / name) as file:
                        file.write(source)
                elif source.is_dir():
                    with folder_aside(here / name) as copy:
                        _copy_tree(source, copy)
                        if not (copy / MANIFEST).is_file():
                            write_manifest(copy)
                        if fault := manifest_fault(copy):
                            raise PlaceError("not copied", f"{name}: {fault}")
                else:
                    copy_file(source, here / name)
            for name in delete:
                remove_folder(here / name)

    def fetch(self, path: str, target: Path) -> None:
        with _named():
            source = self._at(path)
            if source.is_dir():
                make_folder(target)
                _copy_tree(source, target)
            else:
                _regular(source)
                copy_file(source, target)

    def _at(self, path: str) -> Path:
        return self.root.joinpath(*path.split("/"))


def _copy_tree(source: Path, target: Path) -> None:
    """What lies in one folder into another: regular files only, a link could lead anywhere."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and not path.is_symlink():
            make_folder(target / path.name)
            _copy_tree(path, target / path.name)
        else:
            _regular(path)
            copy_file(path, target / path.name)


def _regular(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PlaceError("no plain file", f"{path} is a link or a device; only files and folders are copied")


@contextmanager
def _named() -> Iterator[None]:
    """The system's errors, by their kind."""
    try:
        yield
    except OSError as error:
        kind = KINDS.get(error.errno or 0, error.strerror or type(error).__name__)
        raise PlaceError(kind, str(error)) from None
