"""Each Triton kernel against its plain PyTorch twin, bitsandbytes, and PyTorch's own operations.

    python -m bench.ops --out ops.json                         # Mistral-7B's shapes, 4096 tokens
    TRITON_INTERPRET=1 python -m bench.ops --tiny              # on a CPU: does everything run?

GB/s counts the least that an operation must read and write, whatever an implementation moves; the share is of what a
plain copy reaches on the same card, a large one (``share``), and one that moves as many bytes as the operation
(``share_of_same_size``: a short kernel is over before the memory is at full speed). ``token_logps`` is bound by its
matrix products, so FLOP/s are given instead.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from bench.card import Clock, copy_bandwidth, describe_card
from bench.cases import Bench, Case, cases
from bench.command import header, run, save
from bench.mistral import MISTRAL_7B, TINY
from zephyr_lite.errors import UserError
from zephyr_lite.model.base import compute_device, compute_dtype
from zephyr_lite.ops import dispatch

TARGET = 0.8  # of the copy bandwidth, for what is bound by memory


def measure(bench: Bench, case: Case, clock: Clock, copied: float) -> list[dict[str, Any]]:
    """Times of the kernel, of its twin and of other libraries.

    Args:
        copied: bytes a second of a large copy.
    """
    same_size = None if clock.device.type == "cpu" else copy_bandwidth(clock, case.bytes // 2)
    results = []
    for who, call in {"kernel": case.ours, "twin": case.ours, **case.peers}.items():
        record: dict[str, Any] = {"operation": case.name, "by": who}
        results.append(record)
        if who == "kernel" and not dispatch.runs_triton(
            case.op, torch.empty(0, device=bench.device, dtype=bench.dtype)
        ):
            record["not_run"] = f"no kernel runs on {bench.device} in {bench.dtype}, so the twin does"
            continue
        with dispatch.twins() if who == "twin" else nullcontext():
            record["seconds"] = clock.seconds(call)
        if case.flops is not None:
            record["flop_per_second"] = case.flops / record["seconds"]
            continue
        record["bytes_per_second"] = case.bytes / record["seconds"]
        record["share"] = record["bytes_per_second"] / copied
        if same_size is not None:
            record["share_of_same_size"] = record["bytes_per_second"] / same_size
    return results


def table(results: dict[str, Any]) -> list[str]:
    lines = [
        f"{results['card']['name']}, {results['dtype']}, {results['tokens']} tokens; a copy reaches "
        f"{results['copy_bytes_per_second'] / 1e9:,.0f} GB/s; wanted: {TARGET:.0%} of it for what memory bounds",
        f"{'':36}{'by':14}{'µs':>10}{'GB/s':>9}{'share':>8}{'same size':>11}",
    ]
    for r in results["operations"]:
        head = f"{r['operation']:36}{r['by']:14}"
        if "not_run" in r:
            lines.append(f"{head}not run: {r['not_run'][:120]}")
        elif "flop_per_second" in r:
            lines.append(f"{head}{r['seconds'] * 1e6:10,.1f}  {r['flop_per_second'] / 1e12:,.1f} TFLOP/s")
        else:
            same = f"{r['share_of_same_size']:11.0%}" if "share_of_same_size" in r else ""
            short = "  below" if same and r["by"] == "kernel" and r["share"] < TARGET else ""
            speed = f"{r['bytes_per_second'] / 1e9:9,.0f}{r['share']:8.0%}"
            lines.append(f"{head}{r['seconds'] * 1e6:10,.1f}{speed}{same}{short}")
    return [*lines, *results["kernels_replaced"]]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25, help="runs that the median is taken of")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: does everything run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    if args.tokens < 1 or args.rounds < 1:
        raise UserError(f"--tokens {args.tokens} --rounds {args.rounds}: must be 1 or more.")
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("bench.ops measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU.")
    device = compute_device()
    dtype = compute_dtype("auto", device)
    tokens, rounds = (8, 2) if args.tiny else (args.tokens, args.rounds)
    clock = Clock(device, rounds, 1 if args.tiny else 5)
    bench = Bench(TINY | {"vocab_size": 96} if args.tiny else MISTRAL_7B, tokens, device, dtype)
    torch.manual_seed(0)
    copied = copy_bandwidth(clock, 2**20 if args.tiny else 2**30)
    replaced = dispatch.check_kernels(device, dtype)
    results: dict[str, Any] = {
        **header(),
        "card": describe_card(device),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "rounds": rounds,
        "copy_bytes_per_second": copied,
        "target_share": TARGET,
        "kernels_replaced": replaced,
        "operations": [],
    }

    for case in cases(bench):
        results["operations"] += measure(bench, case, clock, copied)
        results["minutes"] = round((time.monotonic() - begun) / 60, 2)
        save(args.out, results)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    run(main)
