"""Whether a base's files still hold what they held: by their dates at once, by a hash of all of them where those differ.

``load.fingerprint`` tells bases apart by samples; a base that was changed in place, a few layers of it, may keep its
fingerprint. What is made of a base and kept therefore records

    {"model.safetensors": {"sha256": "…", "seen": [["/resolved/path", size, mtime_ns], …]}, …}

and a file is taken for the one that was read where path, size and mtime are among those seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..io.safetensors import SafetensorsFile, tensor_bytes
from .shards import INDEX, SINGLE, weight_files

# copies of a base that a kept folder remembers the dates of
REMEMBERED = 8
Record = dict[str, dict[str, Any]]


class NotKept(Exception):
    """Why a base is not kept quantized; the run goes on without."""


class BaseFiles:
    """The safetensors files of a base, links (the hub's snapshots consist of them) or not.

    Args:
        source: the base's folder.

    Attributes:
        files: those that transformers reads.
        stamps: name → [resolved path, size, mtime_ns], as of now.

    Raises:
        NotKept: there are none.
        UserError: the index is broken, or names a file that is not there.
    """

    def __init__(self, source: Path) -> None:
        self.source, self.files = source, _files(source)
        self.stamps = {self.name(path): _stamp(path) for path in self.files}
        self._hashes: dict[str, str] | None = None

    def name(self, path: Path) -> str:
        """Of a file, in the base's folder."""
        return path.relative_to(self.source).as_posix()

    @property
    def nbytes(self) -> int:
        return sum(size for _, size, _ in self.stamps.values())

    @property
    def hashed(self) -> bool:
        """Whether ``hashes`` costs nothing any more."""
        return self._hashes is not None

    def hashes(self) -> dict[str, str]:
        """Name → hash of the content. The first call reads all of it.

        Raises:
            UserError: a file is broken.
        """
        if self._hashes is None:
            self._hashes = {self.name(path): file_hash(SafetensorsFile(path), {}) for path in self.files}
        return self._hashes

    @property
    def content(self) -> str:
        """A hash of all of ``hashes``."""
        return hashlib.sha256(repr(sorted(self.hashes().items())).encode()).hexdigest()

    def changed(self) -> bool:
        """Whether a file was changed since this was made."""
        return any(_stamp(path) != self.stamps[self.name(path)] for path in self.files)

    def seen_in(self, record: Record) -> bool:
        """Whether these very files were read for what the record is of."""
        return record.keys() == self.stamps.keys() and all(
            stamp in record[name]["seen"] for name, stamp in self.stamps.items()
        )

    def equal(self, record: Record) -> bool:
        """Whether these files hold what the record is of; they are read if need be."""
        return record.keys() == self.stamps.keys() and self.hashes() == {n: r["sha256"] for n, r in record.items()}

    def record(self, hashes: Mapping[str, str]) -> Record:
        return {name: {"sha256": hashes[name], "seen": [stamp]} for name, stamp in self.stamps.items()}

    def added_to(self, record: Record) -> Record:
        """The record, with these files among those seen."""
        return {
            name: {**told, "seen": [*(old for old in told["seen"] if old[0] != stamp[0]), stamp][-REMEMBERED:]}
            for (name, told), stamp in zip(record.items(), (self.stamps[name] for name in record))
        }


def still_there(record: Record) -> bool:
    """Whether files that a record has seen lie where they were, unchanged."""
    return all(any(_unchanged(stamp) for stamp in told["seen"]) for told in record.values())


def is_record(value: Any) -> bool:
    """Whether what was read from a file has a record's form."""
    return isinstance(value, dict) and all(
        isinstance(told, dict)
        and isinstance(told.get("sha256"), str)
        and isinstance(told.get("seen"), list)
        and all(isinstance(stamp, list) and len(stamp) == 3 for stamp in told["seen"])
        for told in value.values()
    )


def tensor_hash(file: SafetensorsFile, name: str) -> bytes:
    return hashlib.sha256(tensor_bytes(file.tensor(name))).digest()


def file_hash(file: SafetensorsFile, known: Mapping[str, bytes]) -> str:
    """Of every tensor's name, dtype, shape and bytes.

    Args:
        known: ``tensor_hash`` of those that were read before; the others are read here.
    """
    digest = hashlib.sha256()
    for name, entry in file.entries.items():
        digest.update(repr((name, entry.dtype, entry.shape)).encode())
        digest.update(known[name] if name in known else tensor_hash(file, name))
        if name not in known:
            file.forget()
    return digest.hexdigest()


def _files(source: Path) -> list[Path]:
    """The safetensors files that transformers reads of a folder.

    Raises:
        NotKept: there are none.
        UserError: the index is broken.
    """
    if not (files := weight_files(source)):
        raise NotKept(f"{source}: neither {SINGLE} nor {INDEX} there.")
    return files


def _stamp(path: Path) -> list[Any]:
    resolved = path.resolve(strict=True)
    told = resolved.stat()
    return [str(resolved), told.st_size, told.st_mtime_ns]


def _unchanged(stamp: Sequence[Any]) -> bool:
    try:
        return _stamp(Path(str(stamp[0]))) == list(stamp)
    except OSError:
        return False
