"""A 16-bit base in NF4, made once and kept in the user's cache.

What is kept is the folder that ``save_pretrained`` of the quantized model would write, so that plain transformers loads
it too. It is made tensor by tensor from the mapped files: the 16-bit model is never in memory, neither the host's nor
the device's (``quantized_files``).

    ~/.cache/zephyr-lite/quantized/NAME-FINGERPRINT-nf4-double-bfloat16-v1/
        config.json  model-00001-of-00020.safetensors …  zephyr_lite.json

The environment variable ``ZEPHYR_LITE_CACHE`` names another folder than ``~/.cache/zephyr-lite``. What is kept is used
for the files that it was made of, by path, size and mtime, and for files of equal content (``base_content``); a base
that was changed in place is quantized again, and so is one whose kept files no longer have the hashes that they were written
with.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from transformers import BitsAndBytesConfig

from ..io.atomic import folder_aside, make_folder, remove_tree, write_json
from ..io.run_dir import cache_dir
from .base_content import BaseFiles, NotKept, Record, is_record, still_there
from .quantized_files import tensors_to_keep, write_quantized

# raised when what is written changes, so that an older kit's folder is made again
FORMAT = 1
MANIFEST = "zephyr_lite.json"
# of the disk, beside the weights: configuration, headers, and room for somebody else
SPARE_BYTES = 64 * 2**20
# of a base's name in a folder's, so that no file system finds it too long
NAME_BYTES = 80
# a kept folder's name, of which a half-made one's is made (``folder_aside``), ends so
_SUFFIX = re.compile(r"[0-9a-f]{16}-nf4-[a-z0-9-]+")
_ELSEWHERE = "name another folder in the environment variable ZEPHYR_LITE_CACHE"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """What a kept folder depends on.

    Attributes:
        name: what the base is called, for the folder's name only.
        fingerprint: of the base's files.
        settings: how it is quantized.
        dtype: of what is not quantized, and what the rest dequantizes to.
    """

    name: str
    fingerprint: str
    settings: BitsAndBytesConfig
    dtype: torch.dtype

    @property
    def key(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "double_quant": bool(self.settings.bnb_4bit_use_double_quant),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def suffix(self) -> str:
        """How the names of its folders end."""
        words = [self.fingerprint[:16], "nf4", *(["double"] if self.key["double_quant"] else [])]
        return "-".join([*words, self.key["dtype"], f"v{FORMAT}"])

    def folder(self, content: str = "") -> Path:
        """Where it is kept from now on; `content` tells it from another base of its fingerprint."""
        name = Path(self.name).name.lstrip(".").encode(errors="replace")[:NAME_BYTES].decode(errors="ignore") or "base"
        return quantized_dir() / "-".join([name, *([content] if content else []), self.suffix])

    def folders(self) -> list[Path]:
        """Where it may be kept, under whatever names the base was called then; files and dangling links included."""
        return sorted(quantized_dir().glob(f"[!.]*-{self.suffix}"))


def quantized_dir() -> Path:
    """Where quantized bases are kept."""
    return cache_dir() / "quantized"


def kept_bases() -> dict[Path, int]:
    """Folder → bytes of what is kept, whether complete or left by a process that was killed."""
    folder = quantized_dir()
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in sorted(found)}


def quantized_folder(source: Path, config: Any, recipe: Recipe, device: torch.device, say: Say) -> Path | None:
    """The folder with a base in NF4, made from `source` if there is none yet.

    Args:
        source: the 16-bit base.
        config: its configuration, of transformers.
        device: where to quantize.
        say: is told in a line what is made, and why something is not kept.
    Returns:
        None: it cannot be kept (said why); ``from_pretrained`` has to quantize it in memory.

    Raises:
        UserError: a file of the base is broken.
    """
    try:
        base = BaseFiles(source)
        folder = _find(recipe, base, say)
        if folder is None:
            return _make(base, config, recipe, device, say)
        with suppress(OSError):  # in a cache that others keep for us: compared again at the next start
            _remember(folder, recipe, base)
        return folder
    except NotKept as found:
        reason = str(found)
    except OSError as error:
        what = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
        reason = (
            f"{quantized_dir()}: the quantized base cannot be kept there ({what}); "
            f"make room or make it writable, or {_ELSEWHERE}."
        )
    say(f"{reason} The base is quantized in memory now, and again at every start.")
    return None


def _find(recipe: Recipe, base: BaseFiles, say: Say) -> Path | None:
    """A complete folder that was made of these files, or of equal ones."""
    intact = {folder: _record(folder) for folder in recipe.folders() if fault(folder, recipe) is None}
    for folder, record in intact.items():
        if base.seen_in(record):
            return folder
    if intact and not base.hashed:
        say(
            f"{base.source}: not the files that were quantized, or changed since; "
            f"comparing their contents ({base.nbytes / 1e9:.2f} GB)"
        )
    for folder, record in intact.items():
        if base.equal(record):
            return folder
    return None


def _record(folder: Path) -> Record:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sources"]


def _remember(folder: Path, recipe: Recipe, base: BaseFiles) -> None:
    """Note in the manifest that these files were compared.

    Raises:
        OSError: it cannot be written, or another process holds the lock.
    """
    if base.seen_in(_record(folder)):
        return
    with open(_lock(recipe.suffix), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if base.equal(told["sources"]):  # not replaced meanwhile
            write_json(folder / MANIFEST, {**told, "sources": base.added_to(told["sources"])})


def fault(folder: Path, recipe: Recipe) -> str | None:
    """What is wrong with a kept folder; None: every file is as it was written. All of it is read."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(told.pop("files"))
        if not is_record(told.pop("sources", None)) or told != recipe.key:
            return f"{MANIFEST} is of another base or version"
        for name, written in files.items():
            if _hash(folder / name) != written:
                return f"{name} has another hash than was written"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} is not readable"
    return None


def _hash(path: Path) -> str:
    """Against damage, not against an attacker: several GB/s, so that every start can check."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _make(base: BaseFiles, config: Any, recipe: Recipe, device: torch.device, say: Say) -> Path:
    """Make the folder, unless another process did so meanwhile.

    Raises:
        NotKept: the disk is full, or the base is not one to keep.
        OSError: the cache cannot be written.
    """
    tensors = tensors_to_keep(base, config, recipe.settings)
    size = sum(tensor.kept_bytes(recipe.settings, recipe.dtype) for tensor in tensors)
    parent = quantized_dir()
    make_folder(parent)
    with _alone(recipe, say):
        if (found := _find(recipe, base, say)) is not None:
            return found
        _sweep(recipe)
        folder, wrong = _place(recipe, base)
        if wrong:
            say(f"{folder}: {wrong}; the quantized base is made again")
            remove_tree(folder)
        free = shutil.disk_usage(parent).free
        if free < size + SPARE_BYTES:
            raise NotKept(
                f"{parent}: {free / 1e9:.2f} GB free, the quantized base wants "
                f"{(size + SPARE_BYTES) / 1e9:.2f} GB there; free some, or {_ELSEWHERE}."
            )
        say(f"quantizing the base once ({size / 1e9:.2f} GB); later starts read {folder}")
        with folder_aside(folder) as aside:
            hashes = write_quantized(aside, base, config, recipe.settings, recipe.dtype, tensors, device)
            files = {path.name: _hash(path) for path in sorted(aside.iterdir())}
            write_json(aside / MANIFEST, {**recipe.key, "files": files, "sources": base.record(hashes)})
    return folder


def _place(recipe: Recipe, base: BaseFiles) -> tuple[Path, str]:
    """The folder to make, and what is wrong with the one that is there. None that is there is of this base.

    What was made of files that are still as they were is left alone: somebody uses both bases.
    """
    there = recipe.folders()
    for folder in there:
        if wrong := fault(folder, recipe):
            return folder, wrong
    for folder in there:
        if not still_there(_record(folder)):
            return folder, "the base has changed since"
    if there:
        return recipe.folder(base.content[:16]), ""
    return recipe.folder(), ""


@contextmanager
def _alone(recipe: Recipe, say: Say) -> Iterator[None]:
    """Only one process at a time, on a machine, makes a base's folder. The lock goes with the process that held it."""
    with open(_lock(recipe.suffix), "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is quantizing this base; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _lock(suffix: str) -> Path:
    return quantized_dir() / f".lock-{suffix}"


def _sweep(recipe: Recipe) -> None:
    """Remove what processes that were killed left half-made. The recipe's lock is held; what others are at work on stays."""
    for left in quantized_dir().glob(".*"):
        name = left.name.rpartition(".")[0]  # what mkdtemp drew has no dot
        found = _SUFFIX.search(name)
        if found is None or found.end() != len(name) or not left.is_dir():
            continue
        try:
            with open(_lock(found[0]), "a") as lock:
                if found[0] != recipe.suffix:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_tree(left)
        except BlockingIOError:
            continue
