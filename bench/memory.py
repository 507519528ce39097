"""What runs take of a card's memory against what the plan said, on a Mistral-7B.

    python -m bench.memory --out memory.json                    # on one NVIDIA card; smaller ones are imitated
    python -m bench.memory --cards 8 6

The model has random weights (built once, 4 GB, see ``mistral``). Every case is a process of its own, which opens a stage
as a user's run does and runs two steps under the plan that the planner makes by itself, with a cap on PyTorch's allocator:
a card's nominal size less 0.7 GiB for the CUDA context. The largest micro-batch comes before the first step. The whole takes
``--minutes``; what there is no time for is listed as such.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import mistral, rows
from bench.command import header, run, save
from bench.turns import CONTEXT_BYTES, Failed, Runner, Variant, common_values, frozen_adapter, set_environment
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.model.base import load_tokenizer

GIB = 2**30
CARDS = (24.0, 16.0, 12.0, 8.0, 6.0)
SFT_RANK, DPO_RANK = 16, 128
STEPS = 2


def play(method: Any, values: dict[str, Any], card: float, seconds: float, tiny: bool) -> dict[str, Any]:
    """Run a case; ``error`` and ``kind`` (memory, refused, late, died or error) where it fails.

    Args:
        card: GiB of the card imitated.
        seconds: after so many it is ended.
        tiny: in this process (a test of the bench, where memory means nothing).
    """
    until = time.monotonic() + seconds
    runner = Runner(Variant(method, "fused"), values, threads=tiny, cap=None if tiny else card)
    try:
        runner.load(seconds)
        for _ in range(STEPS):
            runner.steps.append(runner.step(max(0.0, until - time.monotonic())))
        runner.stop()
    except Failed as error:
        return {"kind": error.kind, "error": error.text}
    first, last, plan = runner.steps[0], runner.steps[-1], runner.ready["plan"]
    return {
        "plan": plan,
        "predicted": predicted(plan),
        "measured": {
            "reserved": last["peak_bytes"],
            "allocated": last.get("peak_allocated_bytes"),
            "managed": last["managed_bytes"],
        },
        "loaded": runner.ready["now_bytes"],
        "seconds": [first["seconds"], last["seconds"]],
        "adapted": last["plan"] != plan,
        "plan_at_the_end": last["plan"],
    }


def predicted(plan: dict[str, Any]) -> dict[str, Any]:
    """What the plan counts, in bytes, less the CUDA context, which no allocator sees.

    The allocator's slack counts as reserved memory, not as allocated memory.
    """
    parts = {name: size for name, size in plan["account"].items() if name not in ("peak", "CUDA context")}
    reserved = sum(parts.values())
    return {
        "reserved": reserved,
        "allocated": reserved - parts.get("allocator's slack", 0),
        "managed": plan["managed"],
        "host": sum(plan["host"].values()),
        "at": plan["at"],
        "parts": parts,
    }


def configurations(args: argparse.Namespace, base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """A stage's configuration for each method: the recipe's, with an 8-bit optimizer; rows are written to ``folder``."""
    template, scale = resolve_template("auto", load_tokenizer(base)), 0.1 if args.tiny else 1.0
    length = int(2048 * scale)
    rows.write_conversations(folder / "sft.jsonl", template, 2 * args.rows * length, scale)
    rows.write_pairs(folder / "dpo.jsonl", template, 4 * args.rows, scale)
    common = common_values(base, rank=SFT_RANK, steps=100) | {"optim": "adamw_8bit", "batch_size": args.rows}
    dpo = {
        "lora_r": DPO_RANK,
        "lora_alpha": DPO_RANK,
        "max_length": int(1024 * scale),
        "max_prompt_length": int(512 * scale),
        "beta": 0.01,
        "adapters": [str(frozen_adapter(common, folder))],
        "lora_dropout": 0.0,
    }
    return {"sft": {**common, "max_length": length}, "dpo": {**common, **dpo}}


def measure(
    args: argparse.Namespace, found: dict[str, Any], folder: Path, deadline: float
) -> dict[str, dict[str, Any]]:
    """Both methods on each card, up to three cases at once. One that there is no time for is told as late."""
    values = configurations(args, Path(found["base"]["folder"]), folder)
    at_once = 1 if args.tiny else max(1, min(3, int(found["card"].get("free_bytes", 0) / GIB // (max(args.cards) + 2))))

    def one(case: tuple[float, str]) -> dict[str, Any]:
        card, method = case
        left = deadline - time.monotonic()
        if left < 5:
            return {"kind": "late", "error": "no time was left; give more --minutes, or fewer --cards"}
        print(f"{method} at {card:g} GB …", flush=True)
        own = {"stage": method, "dataset": [{"path": str(folder / f"{method}.jsonl")}]}
        own["output_dir"] = str(folder / f"{method}-{card:g}")
        return play(method, values[method] | own, card, min(left, 240), args.tiny)

    cases = [(card, method) for card in args.cards for method in ("sft", "dpo")]
    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip([f"{method} at {card:g} GB" for card, method in cases], pool.map(one, cases)))


def table(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['card']['name']}, {results['dtype']}; sizes in GiB, without the CUDA context"]
    if not results["on_a_card"]:
        lines.append("A CPU: peaks are the resident set of the whole process, and say nothing of a plan.")
    lines.append(f"  {'':20}{'predicted':>10}{'reserved':>10}{'allocated':>10}{'managed':>9}{'host':>7}  plan")
    for name, case in results["cases"].items():
        if "error" in case:
            row = f"NO RESULT ({case['kind']}): {' '.join(case['error'].split())[-300:]}"
        else:
            told, found = case["predicted"], case["measured"]
            sizes = (told["reserved"], found["reserved"], found["allocated"])
            row = "".join(f"{size / GIB:10.2f}" if size is not None else f"{'-':>10}" for size in sizes)
            row += f"{found['managed'] / GIB:9.2f}{told['host'] / GIB:7.1f}  {_plan(case['plan'])}"
            row += "; DID NOT FIT, and adapted" if case["adapted"] else ""
        lines.append(f"  {name:20}{row}")
    return lines


def _plan(plan: dict[str, Any]) -> str:
    keep = plan["keep"]
    words = [f"{plan['micro_tokens']:,} at once"]
    words.append("keeps " + ", ".join(f"{keep.count(word)} {word}" for word in dict.fromkeys(keep)))
    words += [f"{plan['offload']} offloaded"] if plan["offload"] else []
    words += ["streamed"] if plan["stream"] else []
    words += [f"tile {plan['tile']:,}"] if plan["tile"] else []
    return "; ".join([*words, f"scratch {plan['scratch']}", f"reference {plan['reference']}"])


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cards", type=float, nargs="+", default=list(CARDS), help="GiB of the cards imitated")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2048 tokens, or pairs, in a step")
    mistral.add_options(parser)
    args, begun = parser.parse_args(words), time.monotonic()
    set_environment()
    with tempfile.TemporaryDirectory() as name:
        found = mistral.on_card(mistral.prepare, args)
        results: dict[str, Any] = {
            **header("accelerate"),
            "settings": vars(args) | {"out": None, "base": None},
            "context_bytes": CONTEXT_BYTES,
            **found,
        }
        results["cases"] = measure(args, found, Path(name).resolve(), begun + 60 * args.minutes)
    results["minutes"] = round((time.monotonic() - begun) / 60, 2)
    save(args.out, results)
    print("\n".join(table(results)))
    return results


if __name__ == "__main__":
    run(main)
