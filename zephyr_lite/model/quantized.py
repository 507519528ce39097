"""NF4 copies of 16-bit bases, kept in the user's cache.

The first start quantizes a base with transformers and bitsandbytes, tensor by tensor, and saves the 4-bit model with
``save_pretrained``; later starts load that copy. Plain transformers loads it too.

    ~/.cache/zephyr-lite/quantized/NAME-FINGERPRINT-nf4-double-bfloat16-v2/
        config.json  model-00001-of-00008.safetensors …  zephyr_lite.json

The environment variable ``ZEPHYR_LITE_CACHE`` replaces ``~/.cache/zephyr-lite``. A copy is used as long as the base's files
have the names, sizes and modification times that they had when it was made, and its own files the hashes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from ..io.atomic import folder_aside, make_folder, remove_tree, write_json
from ..io.run_dir import cache_dir, read_json
from .shards import weight_files

logger = logging.getLogger(__name__)

FORMAT = 2  # part of the folder's name: a copy of another format is made again
MANIFEST = "zephyr_lite.json"
SHARD_SIZE = "512MB"  # a shard is copied to the host as a whole when it is written


def load_quantized(
    source: Path,
    name: str,
    fingerprint: str,
    settings: BitsAndBytesConfig,
    dtype: torch.dtype,
    load: Callable[[Path, bool], Any],
) -> Any:
    """The quantized model, from its copy in the cache, which is made first if there is none or the base's files have changed.

    Where the cache cannot be written, the model is quantized in memory and the reason is said.

    Args:
        source: the 16-bit base's folder.
        name: the base's name, for the copy's folder name only.
        fingerprint: of the base (``base.fingerprint``).
        settings: how the base is quantized.
        dtype: compute dtype; tensors that are not quantized are stored in it.
        load: (folder, whether it is still to be quantized) → model.
    """
    double = "-double" if settings.bnb_4bit_use_double_quant else ""
    suffix = f"{fingerprint[:16]}-nf4{double}-{str(dtype).removeprefix('torch.')}-v{FORMAT}"

    def not_kept(error: Exception) -> None:
        logger.warning(
            f"{quantized_dir()}: the quantized base cannot be kept there ({getattr(error, 'strerror', None) or error}); make "
            "room, make it writable, or name another folder in the environment variable ZEPHYR_LITE_CACHE. The base is "
            "quantized in memory, now and at every start."
        )

    def manifest(copy: Path) -> dict[str, Any]:
        stats = {path.name: path.stat() for path in weight_files(source)}
        return {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "files": {path.name: _hash(path) for path in sorted(copy.glob("*.safetensors"))},
            "sources": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }

    try:
        make_folder(quantized_dir())
        lock = FileLock(quantized_dir() / f".lock-{suffix}").acquire()
    except (OSError, NotImplementedError) as error:  # a file system without locks, too
        not_kept(error)
        return load(source, True)
    with lock:
        existing = sorted(quantized_dir().glob(f"[!.]*-{suffix}"))  # whatever name the base had when it was made
        folder = existing[0] if existing else quantized_dir() / f"{Path(name).name.lstrip('.')[:40] or 'base'}-{suffix}"
        if read_json(folder / MANIFEST) != manifest(folder):
            if folder.exists():
                logger.warning(f"{folder}: incomplete, damaged, or made of other files of the base; it is made again")
                remove_tree(folder)
            logger.info(f"quantizing the base once; later starts read {folder}")
            model = load(source, True)
            try:
                with folder_aside(folder) as aside:
                    model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
                    write_json(aside / MANIFEST, manifest(aside))
            except (OSError, SafetensorError) as error:
                not_kept(error)
                return model
            del model
    return load(folder, False)


def _hash(path: Path) -> str:
    """Hexadecimal XXH3 of a file: one inverted bit would train on silently. SHA-256 would take several times as long."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def quantized_dir() -> Path:
    """The folder of quantized bases in the user's cache."""
    return cache_dir() / "quantized"


def kept_bases() -> dict[Path, int]:
    """Folder → bytes of each quantized base in the cache, unfinished ones included."""
    folder = quantized_dir()
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found}
