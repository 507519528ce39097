"""The short stages of ``bench.evidence`` that are no bench of their own: the machine, the base, the tests, rates of products.

python -m bench.stages machine|base|tests|rates --out FILE
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
TINY_TESTS = ("after_a_residual", "step_0")  # the second is skipped where there is no card

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
    from bench.card import Clock, commit, copy_bandwidth, describe_card, matmul_ceiling, versions
    from bench.mistral import MISTRAL_7B, TINY
    from bench.turns import machine as host
    from zephyr_lite.model.base import compute_device, compute_dtype

    device = compute_device()
    found |= {"host": host(), "commit": commit(), "card": describe_card(device)}
    save(found)
    clock = Clock(device, 2 if tiny else 10, 1 if tiny else 3)
    found["copy_bytes_per_second"] = copy_bandwidth(clock, 2**20 if tiny else 2**30)
    sizes = (TINY, 16, 32) if tiny else (MISTRAL_7B, 4096, 8192)
    found["products"] = matmul_ceiling(clock, *sizes, compute_dtype("auto", device))
    found["versions"] = versions(
        "accelerate", "liger_kernel", "unsloth", "unsloth_zoo", "xformers", "flash_attn", "pytest-xdist"
    )
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
    """Build the models that later stages share: bench.gpu's base, and bench.memory's of two layers."""
    from bench.memory_parts import prepare
    from bench.mistral import MISTRAL_7B, TINY

    return prepare(base, TINY if tiny else MISTRAL_7B, base.parent / "shallow" if tiny and base else None)


class Recorder:
    """A plugin of pytest that counts outcomes as they come, so that a run which is cut short has told what it saw."""

    def __init__(self, save: Save) -> None:
        self.save, self.counts, self.failed = save, dict.fromkeys(("passed", "failed", "skipped"), 0), {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
            self.seconds[report.nodeid] = round(report.duration, 2)
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext[-2000:]
        self.save(self.told())

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.failed[report.nodeid] = report.longreprtext[-2000:]

    def told(self) -> dict[str, Any]:
        slowest = dict(sorted(self.seconds.items(), key=lambda item: -item[1])[:10])
        return {**self.counts, "failures": self.failed, "slowest": slowest}


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
    found = {"exit_code": code, "selected": chosen, **recorder.told()}
    if code or not (tiny or found["passed"]):
        save(found)
        sys.exit(
            f"pytest ended with {code}; {found['passed']} passed, {found['failed']} failed: {', '.join(recorder.failed)}"
        )
    return found


def rates(tiny: bool, base: Path | None, save: Save) -> dict[str, Any]:
    """FLOP/s of the products of a Mistral's layer in 16 bits, in FP8 and in INT8, without quantizing or scaling the inputs."""
    import torch

    from bench.card import Clock, describe_card
    from bench.mistral import MISTRAL_7B, TINY
    from zephyr_lite.model.base import compute_device, compute_dtype

    device = compute_device()
    clock = Clock(device, 2 if tiny else 15, 1 if tiny else 3)
    shape = TINY if tiny else MISTRAL_7B
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = {
        "qkv": (hidden + 2 * keys, hidden),
        "o": (hidden, hidden),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    dtype = compute_dtype("auto", device)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def fp8(m: int, n: int, k: int, rowwise: bool) -> Callable[[], Any]:
        x, w = (drawn(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        of_x, of_w = (torch.ones(s if rowwise else (), device=device) for s in ((m, 1), (1, n)))
        return lambda: torch._scaled_mm(x, w.t(), of_x, of_w, out_dtype=torch.bfloat16)

    def int8(m: int, n: int, k: int) -> Callable[[], Any]:
        x, w = (torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8) for rows in (m, n))
        return lambda: torch._int_mm(x, w.t())

    def plain(m: int, n: int, k: int) -> Callable[[], Any]:
        x, w, out = drawn(m, k), drawn(n, k), drawn(m, n)
        return lambda: torch.mm(x, w.t(), out=out)

    kinds: dict[str, Callable[[int, int, int], Callable[[], Any]]] = {
        str(dtype).removeprefix("torch."): plain,
        "int8 (_int_mm)": int8,
        "fp8 (_scaled_mm, a scale a tensor)": lambda *size: fp8(*size, False),
        "fp8 (_scaled_mm, a scale a row)": lambda *size: fp8(*size, True),
    }
    found: dict[str, Any] = {"card": describe_card(device), "rates": {}}
    for tokens in (64,) if tiny else (2048, 4096):
        for kind, make in kinds.items():
            told = found["rates"].setdefault(kind, {}).setdefault(tokens, {})
            done = taken = 0.0
            for name, (n, k) in sizes.items():
                try:
                    seconds = clock.seconds(make(tokens, n, k))
                except Exception as error:  # a card, or a build, without such a product
                    told[name] = f"not available: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    continue
                told[name], done, taken = 2 * tokens * n * k / seconds, done + 2 * tokens * n * k, taken + seconds
            told["layer"] = done / taken if taken else None
            print(f"{tokens} tokens, {kind}: {told['layer'] and round(told['layer'] / 1e12, 1)} TFLOP/s")
        save(found)
    return found


STAGES = {"machine": machine, "base": base, "tests": tests, "rates": rates}


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--base", type=Path, help="the shared model's folder; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(words)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def save(found: dict[str, Any]) -> None:
        args.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")

    found = STAGES[args.stage](args.tiny, args.base, save)
    save(found)
    return found


if __name__ == "__main__":
    command.run(main)
