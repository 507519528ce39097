"""A 16-bit base in NF4, made once and kept in the user's cache.

What is kept is the folder that ``save_pretrained`` of the quantized model would write, so that plain transformers loads
it too. It is made tensor by tensor from the mapped files: the 16-bit model is never in memory, neither the host's nor
the device's.

    ~/.cache/zephyr-lite/quantized/NAME-FINGERPRINT-nf4-double-bfloat16-v1/
        config.json  model-00001-of-00020.safetensors …  zephyr_lite.json

The environment variable ``ZEPHYR_LITE_CACHE`` names another folder than ``~/.cache/zephyr-lite``. What is kept is used
for the files that it was made of, by path, size and mtime, and for files of equal content (``base_content``); a base
that was changed in place is quantized again.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from ..errors import UserError
from ..ops.nf4 import quantize_parts
from ..rundir import cache_dir, folder_aside, write_json
from ..safetensors_stream import DTYPE_NAMES, SafetensorsFile, nbytes, row_blocks, tensor_bytes, write_stream
from .base_content import INDEX, SINGLE, BaseFiles, NotKept, Record, file_hash, is_record, still_there, tensor_hash

# raised when what is written changes, so that an older kit's folder is made again
FORMAT = 1
MANIFEST = "zephyr_lite.json"
# quantized tensors are held in memory until a file of them is full, then written at once
SHARD_BYTES = 128 * 2**20
# what is merely cast goes to the file so many bytes at a time
CAST_BYTES = 32 * 2**20
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
    """What is wrong with a kept folder; None: it is complete. The weights are not read, their headers are."""
    try:
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): int(size) for name, size in told.pop("files").items()}
        if not is_record(told.pop("sources", None)) or told != recipe.key:
            return f"{MANIFEST} is of another base or version"
        for name, size in files.items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, {size} were written"
            if name.endswith(".safetensors"):
                SafetensorsFile(folder / name)
            elif name.endswith(".json"):
                json.loads((folder / name).read_text(encoding="utf-8"))
    except UserError as error:
        return error.message
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, AttributeError, TypeError):
        return f"{MANIFEST} or another JSON file of it is not readable"
    return None


@dataclass(frozen=True)
class _Source:
    """A tensor of the base, and whether it is quantized."""

    file: SafetensorsFile
    name: str
    quantized: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def kept_bytes(self, recipe: Recipe) -> int:
        """What it takes in the kept folder, to a few hundred bytes."""
        elements = nbytes("U8", self.shape)
        if not self.quantized:
            return elements * recipe.dtype.itemsize
        blocks = -(-elements // 64)
        return -(-elements // 2) + (blocks + blocks // 64 + 1024 if recipe.key["double_quant"] else 4 * blocks)


def _plan(base: BaseFiles, config: Any, recipe: Recipe) -> list[_Source]:
    """All tensors to keep, in the model's order.

    Raises:
        NotKept: the files name their tensors otherwise than the model.
    """
    wanted = _model_tensors(config, recipe.settings)
    found: dict[str, SafetensorsFile] = {}
    for file in base.files:
        opened = SafetensorsFile(file)
        found |= dict.fromkeys(opened.entries, opened)
    if missing := [name for name, (_, needed) in wanted.items() if needed and name not in found]:
        raise NotKept(f"{base.source}: no tensor {missing[0]} in its files.")
    return [_Source(found[name], name, quantized) for name, (quantized, _) in wanted.items() if name in found]


def _model_tensors(config: Any, settings: BitsAndBytesConfig) -> dict[str, tuple[bool, bool]]:
    """The model's tensors in its order: whether transformers quantizes each, and whether it must be in the files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = list(model.state_dict())
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=None)
    return {name: (quantizer.param_needs_quantization(model, name), name not in tied) for name in names}


def _make(base: BaseFiles, config: Any, recipe: Recipe, device: torch.device, say: Say) -> Path:
    """Make the folder, unless another process did so meanwhile.

    Raises:
        NotKept: the disk is full, or the base is not one to keep.
        OSError: the cache cannot be written.
    """
    tensors = _plan(base, config, recipe)
    size = sum(tensor.kept_bytes(recipe) for tensor in tensors)
    parent = quantized_dir()
    parent.mkdir(parents=True, exist_ok=True)
    with _alone(recipe, say):
        if (found := _find(recipe, base, say)) is not None:
            return found
        _sweep(recipe)
        folder, wrong = _place(recipe, base)
        if wrong:
            say(f"{folder}: {wrong}; the quantized base is made again")
            _remove(folder)
        free = shutil.disk_usage(parent).free
        if free < size + SPARE_BYTES:
            raise NotKept(
                f"{parent}: {free / 1e9:.2f} GB free, the quantized base wants "
                f"{(size + SPARE_BYTES) / 1e9:.2f} GB there; free some, or {_ELSEWHERE}."
            )
        say(f"quantizing the base once ({size / 1e9:.2f} GB); later starts read {folder}")
        with folder_aside(folder) as aside:
            _write(aside, base, config, recipe, tensors, device)
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


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


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
                shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            continue


def _write(
    folder: Path, base: BaseFiles, config: Any, recipe: Recipe, tensors: list[_Source], device: torch.device
) -> None:
    """Everything, into an empty folder; the base's files are hashed as they are read."""
    files = {tensor.file.path: tensor.file for tensor in tensors}
    known: dict[Path, dict[str, bytes]] = {path: {} for path in files}
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        if waiting:
            shards.append(list(waiting))
            _write_shard(folder / f"{len(shards)}.safetensors", waiting, recipe.dtype)
            waiting.clear()
            for file in files.values():
                file.forget()

    total = size = 0
    for tensor in tensors:
        weight = tensor.file.tensor(tensor.name)
        known[tensor.file.path][tensor.name] = tensor_hash(tensor.file, tensor.name)
        if tensor.quantized:
            parts = quantize_parts(weight, double_quant=recipe.key["double_quant"], dtype=recipe.dtype, device=device)
            waiting |= {f"{tensor.name}.{part}" if part else tensor.name: value for part, value in parts.items()}
        else:
            waiting[tensor.name] = weight  # mapped: it takes no memory, and is cast on its way to the file
        size += tensor.kept_bytes(recipe)
        total += tensor.kept_bytes(recipe)
        if size >= SHARD_BYTES:
            flush()
            size = 0
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        os.rename(folder / f"{number}.safetensors", folder / name)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        stored = sum((folder / name).stat().st_size for name in set(index.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": stored}, "weight_map": dict(sorted(index.items()))})
    _write_config(folder, base.source, config, recipe)
    hashes = {
        base.name(path): file_hash(files.get(path) or SafetensorsFile(path), known.get(path, {})) for path in base.files
    }
    if base.changed():
        raise NotKept(f"{base.source}: its files were changed while they were read.")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {**recipe.key, "files": sizes, "sources": base.record(hashes)})


def _write_shard(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In the order of their items' sizes, largest first, so that every tensor is aligned to its items."""

    def stored(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if not tensor.is_floating_point() or _is_scale(name) else dtype

    order = sorted(tensors, key=lambda name: -stored(name, tensors[name]).itemsize)

    def write(name: str, out: BinaryIO) -> None:
        tensor = tensors[name]
        wanted = stored(name, tensor)
        if tensor.dtype == wanted:
            out.write(tensor_bytes(tensor))
            return
        row = wanted.itemsize * (tensor.numel() // max(1, tensor.shape[0]))
        for rows in row_blocks(tensor.shape[0], row, CAST_BYTES):
            out.write(tensor_bytes(tensor[rows].to(wanted)))

    header = {name: (DTYPE_NAMES[stored(name, tensors[name])], tuple(tensors[name].shape)) for name in order}
    write_stream(path, header, write, {"format": "pt"})


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _write_config(folder: Path, source: Path, config: Any, recipe: Recipe) -> None:
    quantized = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    quantized.architectures = [type(model).__name__]
    quantized.dtype = recipe.key["dtype"]
    quantized.quantization_config = recipe.settings.to_dict()
    quantized.save_pretrained(folder)
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    else:
        model.generation_config.save_pretrained(folder)
