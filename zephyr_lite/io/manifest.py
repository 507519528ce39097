"""``manifest.json`` in a folder: the size and the hash of every file in it, so that damage is known for what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .atomic import write_json

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``manifest.json``: {"format": 1, "files": {name: {"bytes": …, "sha256": …}}} of every file in a folder and
    below it, itself excepted.

    Args:
        known: name → sha256 of files that were hashed while they were written; the others are read.
    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": (known or {}).get(name) or file_sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def manifest_fault(folder: Path, *, deep: bool = True) -> str | None:
    """What is wrong with a folder, in words that follow its name; None: every file is there, as it was written. Files
    that the manifest does not name do not matter.

    Args:
        deep: compare contents (every byte is read); False: sizes only.
    """
    if (folder / MANIFEST).exists() and not (folder / MANIFEST).is_file():  # a pipe would be waited for
        return f"{MANIFEST} is no file"
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = told["format"]
        files = {_inner(name): (int(of["bytes"]), str(of["sha256"])) for name, of in told["files"].items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if version != FORMAT:
        return f"{MANIFEST} has the format {version!r}, this version knows {FORMAT}"
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            if not path.is_file():  # a pipe would be waited for
                return f"{name} is missing"
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, {size:,} were written"
            if deep and file_sha256(path) != digest:
                return f"{name} has another hash than was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def file_sha256(path: Path) -> str:
    """Hexadecimal, of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _inner(name: Any) -> str:
    """A file's name in the folder.

    Raises:
        ValueError: it leads out of it.
    """
    parts = PurePosixPath(name)
    if not parts.parts or parts.is_absolute() or ".." in parts.parts or "\0" in name or "\\" in name:
        raise ValueError(name)
    return str(parts)
