"""Hardware, versions, importable packages, and the speed of a copy and of matrix products.

python -m bench.machine --out FILE
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.card import Clock, copy_bandwidth, describe_card, matmul_ceiling
from bench.command import header, run, save
from bench.mistral import MISTRAL_7B, TINY
from zephyr_lite.model.base import compute_device, compute_dtype

PACKAGES = ("triton", "bitsandbytes", "transformers", "accelerate", "peft", "datasets", "trl", "liger_kernel")


def imports(name: str) -> str:
    """How long an import takes, or why it fails."""
    begun = time.monotonic()
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    return f"in {time.monotonic() - begun:.1f} s"


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    unsloth = None
    if (
        find_spec("unsloth") is not None and not args.tiny
    ):  # before all others, so in a process of its own, and meanwhile
        code = "import time; t = time.time(); import unsloth; print(unsloth.__version__, round(time.time() - t, 1))"
        process = [sys.executable, "-c", code]
        unsloth = subprocess.Popen(process, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    device = compute_device()
    on_a_card = device.type == "cuda"
    found: dict[str, Any] = {
        **header("accelerate", "liger_kernel", "unsloth", "unsloth_zoo", "xformers", "flash_attn", "pytest-xdist"),
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "on_a_card": on_a_card,
        "capability": torch.cuda.get_device_capability() if on_a_card else None,
        "arch_list": torch.cuda.get_arch_list(),
        "card": describe_card(device),
    }
    found["imports"] = {name: imports(name) for name in PACKAGES}
    if unsloth is not None:
        found["imports"]["unsloth"] = unsloth.communicate()[0].strip()[-1500:]
    save(args.out, found)
    clock = Clock(device, 2 if args.tiny else 10, 1 if args.tiny else 3)
    found["copy_bytes_per_second"] = copy_bandwidth(clock, 2**20 if args.tiny else 2**30)
    sizes = (TINY, 16, 32) if args.tiny else (MISTRAL_7B, 4096, 8192)
    found["products"] = matmul_ceiling(clock, *sizes, compute_dtype("auto", device))
    save(args.out, found)
    return found


if __name__ == "__main__":
    run(main)
