"""NF4 copies of 16-bit bases, kept in the user's cache.

The first start quantizes a base with transformers and bitsandbytes, tensor by tensor, and saves the 4-bit model with
``save_pretrained``; later starts load that copy. Plain transformers loads it too.

    ~/.cache/zephyr-lite/quantized/NAME-FINGERPRINT-nf4-double-bfloat16-v2/
        config.json  model-00001-of-00008.safetensors …  zephyr_lite.json

The environment variable ``ZEPHYR_LITE_CACHE`` replaces ``~/.cache/zephyr-lite``. A copy is used as long as the base's files
have the names, sizes and modification times that they had when it was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from ..io.atomic import folder_aside, make_folder, remove_tree, write_json
from ..io.run_dir import cache_dir, read_json
from .shards import weight_files

FORMAT = 2  # part of the folder's name: a copy of another format is made again
MANIFEST = "zephyr_lite.json"
SHARD_SIZE = "512MB"  # a shard is copied to the host as a whole when it is written

Say = Callable[[str], None]


@dataclass(frozen=True)
class QuantizedCopy:
    """The copy of one base with one set of quantization settings.

    Attributes:
        source: the 16-bit base's folder.
        name: the base's name, for the copy's folder name only.
        fingerprint: of the base (``base.fingerprint``).
        settings: how the base is quantized.
        dtype: compute dtype; tensors that are not quantized are stored in it.
    """

    source: Path
    name: str
    fingerprint: str
    settings: BitsAndBytesConfig
    dtype: torch.dtype

    @property
    def suffix(self) -> str:
        """End of the folder's name: everything that the copy depends on."""
        double = "-double" if self.settings.bnb_4bit_use_double_quant else ""
        return f"{self.fingerprint[:16]}-nf4{double}-{str(self.dtype).removeprefix('torch.')}-v{FORMAT}"

    @property
    def folder(self) -> Path:
        """An existing copy, whatever name the base had when it was made; else the folder to make."""
        name = Path(self.name).name.lstrip(".")[:40] or "base"
        found = sorted(quantized_dir().glob(f"[!.]*-{self.suffix}"))
        return found[0] if found else quantized_dir() / f"{name}-{self.suffix}"

    def is_current(self) -> bool:
        """Whether the copy is complete and the base's files are unchanged since it was made."""
        manifest = read_json(self.folder / MANIFEST)
        return manifest == self._manifest(self.folder) if manifest else False

    def save(self, model: Any) -> None:
        """Write the quantized model to the cache, complete or not at all.

        Raises:
            OSError, SafetensorError: it cannot be written.
        """
        with folder_aside(self.folder) as aside:
            model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
            write_json(aside / MANIFEST, self._manifest(aside))

    def _manifest(self, folder: Path) -> dict[str, Any]:
        stats = {path.name: path.stat() for path in weight_files(self.source)}
        return {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "files": {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))},
            "sources": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }


def load_quantized(copy: QuantizedCopy, load: Callable[[Path, bool], Any], say: Say) -> Any:
    """The base in NF4: from the cached copy, or quantized now and saved as the copy for later starts.

    Where the cache cannot be written, the model is quantized in memory and the reason is said.

    Args:
        load: (folder, whether it is still to be quantized) → model.
    """
    failed = (
        "{place}: the quantized base cannot be kept there ({error}); make room, make it writable, or name another folder in "
        "the environment variable ZEPHYR_LITE_CACHE. The base is quantized in memory, now and at every start."
    )
    try:
        make_folder(quantized_dir())
        lock = FileLock(quantized_dir() / f".lock-{copy.suffix}").acquire()
    except (OSError, NotImplementedError) as error:  # a file system without locks, too
        say(failed.format(place=quantized_dir(), error=getattr(error, "strerror", None) or error))
        return load(copy.source, True)
    with lock:
        if not copy.is_current():
            remove_tree(copy.folder)
            say(f"quantizing the base once; later starts read {copy.folder}")
            model = load(copy.source, True)
            try:
                copy.save(model)
            except (OSError, SafetensorError) as error:
                say(failed.format(place=quantized_dir(), error=getattr(error, "strerror", None) or error))
                return model
            del model
    return load(copy.folder, False)


def quantized_dir() -> Path:
    """The folder of quantized bases in the user's cache."""
    return cache_dir() / "quantized"


def kept_bases() -> dict[Path, int]:
    """Folder → bytes of each quantized base in the cache, unfinished ones included."""
    folder = quantized_dir()
    found = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found}
