"""The first lines of an engine's process. Nothing heavy is imported here: Unsloth has to come before transformers."""

from __future__ import annotations

import importlib.util
import os
import pickle
import shutil
import sys
from multiprocessing.connection import Connection

from zephyr_lite.errors import UserError

FLASH_ATTN = "2.8.3+aten"  # as flash_attn_shim.__version__: importing that would import torch before Unsloth


def install_flash_attn(folder: str) -> None:
    """Put a package flash_attn that is ``flash_attn_shim`` on the path, unless there is one.

    Transformers and Unsloth look for its files, its distribution and its version, so it is written as pip would.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        return
    package, distribution = (
        os.path.join(folder, name) for name in ("flash_attn", f"flash_attn-{FLASH_ATTN}.dist-info")
    )
    module = "from bench.flash_attn_shim import *\nfrom bench.flash_attn_shim import __version__\n"
    files = {
        os.path.join(package, f"{name}.py"): module for name in ("__init__", "flash_attn_interface", "bert_padding")
    }
    files[os.path.join(distribution, "METADATA")] = f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {FLASH_ATTN}\n"
    files[os.path.join(distribution, "top_level.txt")] = "flash_attn\n"
    for path, text in files.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()


def begin(pipe: Connection, engine: str, folder: str | None, packed: bytes) -> None:
    """Run ``worker.worker``.

    Args:
        folder: where libraries may keep what they generate, which several at once must not share; None: a thread.
        packed: the worker's other arguments, pickled: unpickling them imports everything.
    """
    if folder is not None:
        os.environ["UNSLOTH_COMPILE_LOCATION"] = os.path.join(folder, "unsloth")
        os.environ["HF_DATASETS_CACHE"] = os.path.join(folder, "datasets")
        if engine != "fused" and shutil.which("nvidia-smi"):
            install_flash_attn(os.path.join(folder, "packages"))
    if engine == "unsloth":
        from zephyr_lite.engines import start_unsloth

        try:
            start_unsloth()
        except UserError as error:
            pipe.send({"kind": "refused", "error": str(error)})
            return
    from bench.worker import worker

    worker(pipe, *pickle.loads(packed))
