"""The short stages of ``bench.evidence`` that are no bench of their own: the machine, the base, the tests.

python -m bench.stages machine|base|tests --out FILE
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import command

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "triton",
    "bitsandbytes",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "trl",
    "liger_kernel",
    "zephyr_lite.cli.app",
)
# Parts of tests' names: attention, the decoder, step 0, NF4, keep policies, packing, streaming, out of memory, peaks.
TESTS = (
    "equals_float64",
    "decoder_on_the_gpu",
    "step_0",
    "nf4_on_the_gpu",
    "keep_policies",
    "packed_equals",
    "other_storages",
    "to_the_bit and LateCopies and input",
    "do_not_wait",
    "redone_and_the_same",
    "a_twentieth and planned",
    "under_a_cap",
)
TINY_TESTS = ("segments_of_like_length", "step_0")  # the second is skipped where there is no card

Save = Callable[[dict[str, Any]], None]


def machine(tiny: bool, base: Path | None, save: Save) -> dict[str, Any]:
    """Hardware, versions, importable packages, and the speed of a copy and of a large matrix product."""
    code = "import time; t = time.time(); import unsloth; print(unsloth.__version__, round(time.time() - t, 1))"
    unsloth = None
    if find_spec("unsloth") is not None and not tiny:  # first of all others, so in a process of its own, and meanwhile
        unsloth = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    begun = time.monotonic()
    import torch

    found: dict[str, Any] = {
        "python": sys.version,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "seconds_to_import_torch": round(time.monotonic() - begun, 1),
        "on_a_card": torch.cuda.is_available(),
    }
    save(found)
    if found["on_a_card"]:
        found["capability"] = torch.cuda.get_device_capability()
        found["arch_list"] = torch.cuda.get_arch_list()
    from bench.card import Clock, copy_bandwidth, describe_card, matmul_ceiling
    from bench.mistral import MISTRAL_7B, TINY
    from zephyr_lite.model.base import compute_device, compute_dtype

    device = compute_device()
    peers = ("accelerate", "liger_kernel", "unsloth", "unsloth_zoo", "xformers", "flash_attn", "pytest-xdist")
    found |= {**command.header(*peers), "card": describe_card(device)}
    save(found)
    clock = Clock(device, 2 if tiny else 10, 1 if tiny else 3)
    found["copy_bytes_per_second"] = copy_bandwidth(clock, 2**20 if tiny else 2**30)
    sizes = (TINY, 16, 32) if tiny else (MISTRAL_7B, 4096, 8192)
    found["products"] = matmul_ceiling(clock, *sizes, compute_dtype("auto", device))
    save(found)
    found["imports"] = {name: _imports(name) for name in PACKAGES}
    if unsloth is not None:
        save(found)
        found["imports"]["unsloth"] = unsloth.communicate()[0].strip()[-1500:]
    return found


def _imports(name: str) -> str:
    begun = time.monotonic()
    try:
        importlib.import_module(name)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
    return f"in {time.monotonic() - begun:.1f} s"


def base(tiny: bool, base: Path | None, save: Save) -> dict[str, Any]:
    """Build the model that later stages share."""
    from bench.mistral import MISTRAL_7B, TINY, prepare

    return prepare(base, TINY if tiny else MISTRAL_7B)


class Recorder:
    """A plugin of pytest that counts outcomes and saves them as they come."""

    def __init__(self, save: Save) -> None:
        self.save = save
        self.found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": {}, "seconds": {}}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.found[report.outcome] += 1
            self.found["seconds"][report.nodeid] = round(report.duration, 2)
        if report.failed:
            self.found["failures"][report.nodeid] = report.longreprtext[-2000:]
        self.save(self.found)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.found["failed"] += 1
            self.found["failures"][report.nodeid] = report.longreprtext[-2000:]


def selection(names: Sequence[str]) -> str:
    """For pytest's -k."""
    return " or ".join(f"({name})" for name in names)


def tests(tiny: bool, base: Path | None, save: Save) -> dict[str, Any]:
    """The tests that need a GPU, those of ``TESTS``; several processes share the card where pytest-xdist is installed."""
    import pytest

    recorder = Recorder(save)
    chosen = selection(TINY_TESTS if tiny else TESTS)
    words = ["-p", "no:cacheprovider", "-k", chosen, "-v", "--tb=short", "--rootdir", str(ROOT)]
    words += ["-m", "gpu or not gpu" if tiny else "gpu", str(ROOT / "tests/test_gpu.py")]
    words += [str(ROOT / "tests/ops/test_ops.py")] if tiny else [str(ROOT / "tests/memory/test_gpu_memory.py")]
    if find_spec("xdist") is not None and not tiny:
        words += ["-n", "4"]
    code = int(pytest.main(words, plugins=[recorder]))
    found = {"exit_code": code, "selected": chosen, **recorder.found}
    if code or not (tiny or found["passed"]):
        save(found)
        sys.exit(f"pytest ended with {code}; {found['passed']} passed, failed: {', '.join(found['failures'])}")
    return found


STAGES = {"machine": machine, "base": base, "tests": tests}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--base", type=Path, help="the shared model's folder; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    save = partial(command.save, args.out)
    found = STAGES[args.stage](args.tiny, args.base, save)
    save(found)
    return found


if __name__ == "__main__":
    command.run(main)
