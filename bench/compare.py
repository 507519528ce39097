"""The fused engine and TRL side by side: tokens/s (SFT), pairs/s (DPO) and peak memory, on the same rows, in one run.

    python -m bench.compare                                          # SmolLM2-135M in NF4, the demo's rows
    python -m bench.compare --sft FILE_OR_FOLDER --dpo FILE_OR_FOLDER --out compare.json

Every variant is a process of its own that loads the base, warms up with one step and then waits for its turn: round by
round each does one optimizer step on the same rows, in an order that turns around, while the others sleep. A ratio is
the median over rounds of the quotient of two times of the same round, so that a machine that slows down for a while
slows both. Tokens are those of the rows, padding aside; a pair is a pair. Under load set OMP_NUM_THREADS=1 and compare
``cpu_seconds`` of the JSON: two processes' thread pools that spin on the same cores measure each other.

TRL runs at its fastest correct setting on a CPU: float32 instead of its default bfloat16, adapters cast back to
float32, rows packed best-fit, precomputed reference where the fused engine's is cached, recomputation on and off.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.command import header, run, save
from bench.mistral import TINY, prepare
from bench.turns import Runner, Variant, common_values, describe, frozen_adapter, times_faster

# goals of the quotients
TARGETS = {"sft": 1.3, "dpo live": 2.0, "dpo cached": 2.5}
WARM_UP = 1


def variants(method: str, engines: Sequence[str], sweep: bool) -> list[Variant]:
    """What is compared; ``sweep`` adds TRL's other ways to form micro-batches."""
    result = []
    if "fused" in engines:
        result.append(Variant(method, "fused"))
        if method == "dpo":
            result.append(Variant(method, "fused", cached=True))
    if "trl" in engines:
        result += [Variant(method, "trl"), Variant(method, "trl", recompute=True)]
        if method == "dpo":
            result.append(Variant(method, "trl", cached=True))
        if sweep and method == "sft":
            result.append(Variant(method, "trl", padded=True))
        if sweep and method == "dpo":
            result.append(Variant(method, "trl", per_device=2))
    return result


def measure(
    chosen: Sequence[Variant], values: dict[str, Any], rounds: int, *, threads: bool, folder: Path
) -> list[Runner]:
    """Load one after the other, warm up, then take turns. TRL's other settings take part in the first round alone, which
    decides whether one of them is the faster."""
    runners = []
    for place, variant in enumerate(chosen):
        told = {**values, "output_dir": str(folder / f"{variant.method}{place}")}
        runners.append(Runner(variant, told, threads=threads))
        runners[-1].load()
        for _ in range(WARM_UP):
            runners[-1].step()
    for number in range(rounds):
        for runner in runners if number % 2 == 0 else runners[::-1]:
            if number == 0 or not (runner.variant.recompute or runner.variant.padded or runner.variant.per_device > 1):
                runner.steps.append(runner.step())
    for runner in runners:
        runner.stop()
    return runners


def summarize(runners: Sequence[Runner], unit: str) -> dict[str, Any]:
    """Medians, and quotients against that variant of TRL which the first round found fastest."""
    ratios = {}
    for cached in (False, True):
        rivals = [r for r in runners if r.variant.engine == "trl" and r.variant.cached == cached]
        rival = min(rivals, key=lambda r: r.steps[0]["seconds"], default=None)
        for ours in runners:
            if ours.variant.engine == "fused" and rival is not None:
                ratios[f"{ours.variant.name} over {rival.variant.name}"] = times_faster(ours, rival)
    return {"variants": {r.variant.name: describe(r, unit) for r in runners}, "ratios": ratios}


def table(results: dict[str, Any]) -> list[str]:
    lines = []
    for method, unit in (("sft", "tokens"), ("dpo", "pairs")):
        if method not in results:
            continue
        lines.append(f"{method:28}{unit + '/s':>12}{'peak MiB':>12}")
        for name, found in results[method]["variants"].items():
            peak = f"{found['peak_bytes'] / 2**20:,.0f}" if found["peak_bytes"] else "–"
            lines.append(f"  {name:26}{found[unit + '_per_second']:12.3f}{peak:>12}")
        for name, ratio in results[method]["ratios"].items():
            lines.append(f"  {name}: {ratio:.2f}×")
    lines.append("wanted, over TRL: " + ", ".join(f"{name} {ratio}×" for name, ratio in TARGETS.items()))
    return lines


def demo_pairs(folder: Path) -> Path:
    """The demo's scored completions as preference pairs."""
    from zephyr_lite.demo import FEEDBACK
    from zephyr_lite.recipe.ultrafeedback import to_pairs

    pairs, _ = to_pairs([json.loads(line) for line in FEEDBACK.read_text(encoding="utf-8").splitlines()])
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def settings(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """The configuration of both methods."""
    from zephyr_lite.demo import CONVERSATIONS
    from zephyr_lite.demo.base import demo_base

    model = prepare(folder / "base", TINY)["base"]["folder"] if args.tiny else args.model or demo_base()
    steps = WARM_UP + args.rounds
    common = common_values(model, rank=args.rank, steps=steps)
    sft = {
        **common,
        "stage": "sft",
        "dataset": dataset(args.sft or CONVERSATIONS, "train_sft"),
        "lora_dropout": 0.05,
        "max_length": args.sft_length,
        "batch_size": args.sft_rows,
    }
    dpo = {
        **common,
        "stage": "dpo",
        "dataset": dataset(args.dpo or demo_pairs(folder), "train_prefs"),
        "lora_dropout": 0.0,
        "max_length": args.dpo_length,
        "max_prompt_length": args.dpo_length // 2,
        "batch_size": args.dpo_pairs,
        "adapters": [str(frozen_adapter(common, folder))],
        "beta": 0.1,
    }
    # a cached reference is computed for all pairs before the first step; no more than are used
    dpo["dataset"][0]["limit"] = args.dpo_pairs * steps
    return {"sft": sft, "dpo": dpo}


def dataset(path: str | Path, split: str) -> list[dict[str, Any]]:
    return [{"path": str(path), **({"split": split} if Path(path).is_dir() else {})}]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", default="fused,trl")
    parser.add_argument("--methods", default="sft,dpo")
    parser.add_argument("--model", help="a folder or hub id; default: the demo's SmolLM2-135M")
    parser.add_argument("--sft", help="conversations: a file, or a folder with a split train_sft; default: the demo's")
    parser.add_argument("--dpo", help="pairs: a file, or a folder with a split train_prefs; default: the demo's")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of every variant")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sft-length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--sft-rows", type=int, default=2, help="rows in a step")
    parser.add_argument("--dpo-length", type=int, default=384, help="tokens of prompt and one response, at most")
    parser.add_argument("--dpo-pairs", type=int, default=2, help="pairs in a step")
    parser.add_argument("--sweep", action="store_true", help="TRL's other ways to form micro-batches, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model in one process: does the bench run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    if args.tiny:
        args.sft_length, args.dpo_length, args.rank, args.rounds, args.dpo_pairs = 128, 192, 4, 2, 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    results: dict[str, Any] = {**header(), "settings": vars(args) | {"out": None}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = settings(args, folder)
        for method, unit in (("sft", "tokens"), ("dpo", "pairs")):
            if method in args.methods.split(","):
                chosen = variants(method, args.engines.split(","), args.sweep)
                runners = measure(chosen, values[method], args.rounds, threads=args.tiny, folder=folder)
                results[method] = summarize(runners, unit)
    save(args.out, results)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    run(main)
