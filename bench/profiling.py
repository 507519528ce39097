"""Profile of an optimizer step on a GPU: kernels by class, launches against the counted ones, gaps, copies.

    python -m bench.profiling --out profile.json           # an SFT and a DPO step, 2048 and 4096 tokens at once

Under a cap of ``--card`` GiB, on ``bench.gpu``'s base. The profiler records kernels and CUDA calls only, so that it hardly
slows the step down. Another step is run under ``set_sync_debug_mode("warn")``: what makes the processor wait, and where.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import command
from zephyr_lite.errors import UserError
from zephyr_lite.model.allocator import set_allocator

# The first that matches a kernel's name; FlashAttention's kernels have "cutlass" in their names, so order matters.
CLASSES = {
    "dequantize": r"dequant",
    "attention": r"flash|fmha|attention",
    "optimizer, clipping": r"optimizer|adam|multi_tensor|_foreach",
    "matmul": r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|::(mm|addmm|bmm|linear)",
    "norm, rope, SwiGLU, dropout, softmax in Triton": r"^_(forward|backward|rotate|drop|softmax)",
    "copy": r"memcpy|memset|copy|catarray|fill|::(cat|zero)",
    "elementwise": r"elementwise|reduce|index|scatter|gather|embedding|scan|sort|aten::",
}
STEP = 1  # of the run: step 0 checks that policy and reference are equal, which holds once
ON_A_CARD, ON_A_CPU = ("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",)


def class_of(name: str) -> str:
    return next((what for what, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def summarize(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What a Chrome trace of one step tells; times in seconds. On a CPU operations contain each other, so sums mean little."""
    done = [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_A_CARD]
    done = sorted(
        done or [e for e in events if e.get("ph") == "X" and e.get("cat") in ON_A_CPU], key=lambda event: event["ts"]
    )
    if not done:
        return {"error": "the profiler recorded neither kernels nor operations"}
    classes: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0])
    names: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0])
    copies: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0, 0])
    gaps, end = [], done[0]["ts"]
    for event in done:
        seconds = event["dur"] / 1e6
        for found, key in ((classes, class_of(event["name"])), (names, event["name"])):
            found[key][0] += seconds
            found[key][1] += 1
        if event["cat"] == "gpu_memcpy":
            copied = copies[event["name"]]
            copied[0], copied[1] = copied[0] + seconds, copied[1] + 1
            copied[2] += event.get("args", {}).get("bytes", 0)
        if event["ts"] > end:
            gaps.append((event["ts"] - end) / 1e6)
        end = max(end, event["ts"] + event["dur"])
    span = (end - done[0]["ts"]) / 1e6
    calls = Counter(e["name"] for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver"))
    slowest = sorted(names.items(), key=lambda item: -item[1][0])[:25]
    return {
        "on": "a card" if done[0]["cat"] in ON_A_CARD else "a CPU",
        "span": span,
        "idle": sum(gaps),
        "gaps": {"count": len(gaps), "over_10_us": sum(g > 1e-5 for g in gaps), "longest": sorted(gaps)[-5:][::-1]},
        "kernels": sum(e["cat"] == "kernel" for e in done),
        "operations": len(done),
        "launch_calls": {name: count for name, count in calls.items() if "Launch" in name},
        "waiting_calls": {name: count for name, count in calls.items() if "Synchronize" in name},
        "classes": {k: {"seconds": s, "count": n} for k, (s, n) in sorted(classes.items(), key=lambda c: -c[1][0])},
        "copies": {k: {"seconds": s, "count": n, "bytes": b} for k, (s, n, b) in copies.items()},
        "slowest": [{"name": name[:160], "seconds": s, "count": n} for name, (s, n) in slowest],
    }


def waits(run: Any) -> dict[str, int]:
    """Where the processor waited for the card in a call: file and line → how often."""
    import torch

    if not torch.cuda.is_available():
        return {}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = (w for w in caught if "synchroniz" in str(w.message))
    return dict(
        Counter(f"{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}" for w in found).most_common()
    )


def measure_step(case: Any, begun: float) -> dict[str, Any]:
    """A case of ``memory_case``: one step, profiled, with each number of tokens at once.

    Options:
        tokens: numbers of tokens.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    from bench.memory_case import opened, wait
    from zephyr_lite.memory.speed import LAUNCHES
    from zephyr_lite.train.loop import accumulate_gradients, examples_of_step, update
    from zephyr_lite.train.steps import micro_batches

    said: list[str] = []
    stage, state = opened(case, said)
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = {"plan": stage.plan.as_dict(), "steps": {}}

    def step() -> dict[str, float]:
        metrics = accumulate_gradients(state, STEP)
        update(state, metrics)
        return metrics

    for tokens in case.options["tokens"]:
        state.objective.oom.follow(replace(stage.plan, micro_tokens=tokens))
        seconds = []
        for _ in range(3):
            wait()
            start = time.perf_counter()
            metrics = step()
            wait()
            seconds.append(time.perf_counter() - start)
        where = waits(step)
        wait()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            step()
            wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(path))
            trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        groups = len(list(micro_batches(examples_of_step(state, STEP), stage.data.lengths, tokens)))
        layers = stage.base.model.config.num_hidden_layers
        passes = groups * layers * (LAUNCHES["forward"] * (1 + (case.method == "dpo")) + LAUNCHES["backward"])
        found["steps"][tokens] = {
            "seconds": seconds,
            "metrics": metrics,
            "adapted": stage.plan.micro_tokens != tokens,
            "waits": where,
            "launches_counted_by_the_plan": {"micro_batches": groups, "layers": layers, "kernels": passes},
            **summarize(trace["traceEvents"]),
        }
    return found | {"said": said[-5:]}


def table(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['card']['name']}, {results['dtype']}"]
    for method, case in results["methods"].items():
        if "error" in case:
            lines.append(f"{method}: NO RESULT ({case['kind']}): {' '.join(case['error'].split())[-300:]}")
            continue
        for tokens, step in case["steps"].items():
            head = f"{method}, {tokens} tokens at once: best step {min(step['seconds']) * 1e3:,.1f} ms"
            if "error" in step:
                lines.append(f"{head}; {step['error']}")
                continue
            counted = step["launches_counted_by_the_plan"]["kernels"]
            idle, copied = step["idle"] * 1e3, sum(c["seconds"] for c in step["copies"].values()) * 1e3
            lines.append(
                f"{head}; profiled {step['span'] * 1e3:,.1f} ms, idle {idle:,.1f}, copies {copied:,.1f}; {step['kernels']} "
                f"kernels ({counted} counted); waits {sum(step['waits'].values())} at {', '.join(step['waits']) or 'no place'}"
            )
            lines += [f"  {k:48}{c['seconds'] * 1e3:10,.2f} ms{c['count']:8}" for k, c in step["classes"].items()]
    return lines


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096], help="at once")
    parser.add_argument("--card", type=float, default=24.0, help="GiB of the card imitated")
    parser.add_argument("--base", type=Path, help="the model's folder, built where it is not there; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    args.cards, args.rows = [args.card], max(1, max(args.tokens) // 2048)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    set_allocator()
    import torch

    from bench import mistral
    from bench.contest import save
    from bench.memory_case import Case, play
    from bench.memory_parts import Bench, prepare

    if not args.tiny and not torch.cuda.is_available():
        raise UserError(
            "bench.profiling measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shape, shallow = (mistral.TINY, folder / "shallow") if args.tiny else (mistral.MISTRAL_7B, None)
        results = prepare(args.base or (folder / "base" if args.tiny else None), shape, shallow)
        bench = Bench(args, results, folder, 0.0)
        results["methods"] = {}
        tokens = [int(n * bench.scale) for n in args.tokens]
        for method, rows in (("sft", args.rows), ("dpo", 2 * args.rows)):
            values = bench.values(method, {"micro_tokens": max(tokens)}, batch_size=rows)
            case = Case(method, measure_step, method, values, bench.card(args.card), {"tokens": tokens})
            results["methods"][method] = play(case, 0.0, here=True)  # peaks are not measured: no process of its own
            gc.collect()
            save(args.out, results)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    command.run(main)
