"""``manifest.json`` in a folder: the size and the hash of every file in it, so that damage is found."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .atomic import write_json

MANIFEST = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path) -> None:
    """Write ``manifest.json``: {"format": 1, "files": {name: {"bytes": …, "sha256": …}}} of every other file in a folder and
    below it.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def manifest_fault(folder: Path, *, deep: bool = True) -> str | None:
    """The first difference between a folder and its manifest, in words that follow the folder's name; None: there is none.
    Files that the manifest does not name do not matter.

    Args:
        deep: compare hashes (every byte is read); False: sizes only.
    """
    try:
        told = json.loads((folder / MANIFEST).read_bytes())
        version, files = told["format"], [(n, f["bytes"], f["sha256"]) for n, f in told["files"].items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    if version != FORMAT:
        return f"{MANIFEST} has the format {version!r}, this version knows {FORMAT}"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found:,} bytes, {size:,} were written"
        if deep and file_sha256(path) != digest:
            return f"{name} has another hash than was written"
    return None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
