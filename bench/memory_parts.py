"""The parts of ``bench.memory``: which cases each plays, what is wanted of them, and the table."""

from __future__ import annotations

import argparse
import datetime
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import mistral, rows
from bench.card import commit, describe_card, versions
from bench.contest import alone, save
from bench.memory_case import (
    CONTEXT_BYTES,
    Case,
    measure_peak,
    measure_reference,
    measure_speed,
    measure_start,
    play,
)
from bench.memory_context import measure_context, plan_context
from bench.turns import frozen_adapter, machine
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.memory.machine import main_memory
from zephyr_lite.model.base import compute_device, compute_dtype, load_tokenizer

GIB = 2**30
CONTEXT_GIB = CONTEXT_BYTES / GIB
CARDS = (24.0, 16.0, 12.0, 8.0, 6.0)
SFT_RANK, DPO_RANK = 16, 128
SPEED_TOKENS = (1024, 2048, 4096, 8192)
# the goals: GiB on the card, tokens, shares
OFFLOADED_GIB, STREAMED_GIB, DPO_GIB = 5.0, 2.0, 8.0
LONGEST = {24.0: 65536, 8.0: 24576}
STREAMED_SHARE, AT_TOKENS = 0.9, 4096
RIGHT_TO = 0.05


class Bench:
    """What the parts share.

    Attributes:
        args: the command's.
        base, shallow: folders of the whole model and of one of two layers.
        folder: for rows and runs.
        deadline: when to have ended, of ``time.monotonic``.
        at_once: cases that may share the card where only memory is measured.
    """

    def __init__(self, args: argparse.Namespace, found: dict[str, Any], folder: Path, deadline: float) -> None:
        self.args, self.folder, self.deadline = args, folder, deadline
        self.base, self.shallow = Path(found["base"]["folder"]), Path(found["shallow"]["folder"])
        self.layers = found["base"]["shape"]["num_hidden_layers"]
        room = found["card"].get("free_bytes", 0)
        self.at_once = 1 if args.tiny else max(1, min(3, int(room / GIB // (max(args.cards) + 2))))
        # on a CPU the longest context by the plan is that of a consumer card
        major, minor = found["card"].get("compute_capability", "8.6").split(".")
        self.capability, self.dtype = (int(major), int(minor)), getattr(torch, found["dtype"])
        self.scale = 0.1 if args.tiny else 1.0
        self.runs = 0
        template = resolve_template("auto", load_tokenizer(self.base))
        length = int(2048 * self.scale)
        tokens = 2 * args.rows * length
        rows.write_conversations(folder / "sft.jsonl", template, tokens, scale=self.scale)
        rows.write_pairs(folder / "dpo.jsonl", template, 4 * args.rows, scale=self.scale)
        adapter = {"model_name_or_path": str(self.base), "lora_r": SFT_RANK}
        self.frozen = frozen_adapter(adapter, folder)
        self.template = template

    def values(self, method: str, memory: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        """A stage's configuration: the recipe's, with an 8-bit optimizer."""
        self.runs += 1
        common: dict[str, Any] = {
            "model_name_or_path": str(self.base),
            "load_in_4bit": True,
            "optim": "adamw_8bit",
            "stage": method,
            "chat_template": "auto",
            "eval_dataset": [],
            "eval_steps": None,
            "save_steps": None,
            "max_steps": 100,
            "learning_rate": 1e-5,
            "output_dir": str(self.folder / f"run-{self.runs}"),
            "memory": memory or {},
            "dataset": [{"path": str(self.folder / f"{method}.jsonl")}],
            "batch_size": self.args.rows,
        }
        if method == "sft":
            own: dict[str, Any] = {"lora_r": SFT_RANK, "lora_alpha": SFT_RANK, "max_length": int(2048 * self.scale)}
        else:
            own = {
                "lora_r": DPO_RANK,
                "lora_alpha": DPO_RANK,
                "max_length": int(1024 * self.scale),
                "beta": 0.01,
                "max_prompt_length": int(512 * self.scale),
                "adapters": [str(self.frozen)],
                "lora_dropout": 0.0,
            }
        return common | own | changes

    def card(self, gib: float) -> float | None:
        return None if self.args.tiny else gib

    def play(self, cases: list[Case], *, at_once: int = 1, at_most: float = 240) -> dict[str, dict[str, Any]]:
        """Run cases, several at once where they say nothing of time. One that there is no time for is told as late."""

        def one(case: Case) -> dict[str, Any]:
            left = self.deadline - time.monotonic()
            if left < 5:
                return {"kind": "late", "error": "no time was left; give more --minutes, or fewer --parts"}
            print(f"{case.name} …", flush=True)
            return play(case, min(left, at_most), here=self.args.tiny)

        with ThreadPoolExecutor(at_once) as pool:
            return dict(zip([case.name for case in cases], pool.map(one, cases)))


# -- the parts ---------------------------------------------------------------------------------------------------------


def goals(bench: Bench) -> dict[str, Any]:
    """What the issue wants of a recipe's memory; the sizes here are the allocator's, without the CUDA context."""
    offloaded = {"keep": "input", "offload": True, "stream": False}
    steps = {"steps": 2}
    cases = [
        Case(
            "sft, inputs offloaded",
            measure_peak,
            "sft",
            bench.values("sft", offloaded),
            bench.card(OFFLOADED_GIB + CONTEXT_GIB),
            steps,
        ),
        Case(
            "sft, streamed",
            measure_peak,
            "sft",
            bench.values("sft", {"stream": True}),
            bench.card(STREAMED_GIB + CONTEXT_GIB),
            steps,
        ),
        Case("dpo", measure_peak, "dpo", bench.values("dpo"), bench.card(DPO_GIB), steps),
        Case("reference", measure_reference, "dpo", bench.values("dpo", {"micro_tokens": int(4096 * bench.scale)})),
    ]
    found = bench.play(cases, at_once=bench.at_once)
    row = {"micro_tokens": int(2048 * bench.scale), "keep": "input", "offload": True}
    again = [
        Case(
            f"{name}, on the whole card",
            measure_peak,
            "sft",
            bench.values("sft", row | {"stream": stream}),
            None,
            steps,
        )
        for name, stream in (("sft, inputs offloaded", False), ("sft, streamed", True))
        if "error" in found[name]  # then at least: what would it have taken?
    ]
    return found | bench.play(again, at_once=bench.at_once)


def cards(bench: Bench) -> dict[str, Any]:
    """Peaks against the plan that the planner makes by itself, on each card."""
    cases = [
        Case(f"{method} at {card:g} GB", measure_peak, method, bench.values(method), bench.card(card), {"steps": 2})
        for card in bench.args.cards
        for method in ("sft", "dpo")
    ]
    return bench.play(cases, at_once=bench.at_once)


def start(bench: Bench) -> dict[str, Any]:
    """From the start of the process to the first step."""
    return bench.play([Case("start", measure_start, "sft", bench.values("sft", batch_size=1))])


def speed(bench: Bench) -> dict[str, Any]:
    """A streamed base and a resident one, with the same tokens at once; what layers keep is their inputs, on the card."""
    tokens = [int(n * bench.scale) for n in bench.args.tokens]
    options = {"tokens": tokens, "rounds": 2}
    found: dict[str, Any] = {}
    for name, stream in (("resident", False), ("streamed", True)):
        memory = {"keep": "input", "offload": False, "stream": stream, "micro_tokens": max(tokens)}
        values = bench.values("sft", memory, max_length=min(tokens), batch_size=max(tokens) // min(tokens))
        found |= bench.play([Case(name, measure_speed, "sft", values, None, options)])
    return found


def context(bench: Bench) -> dict[str, Any]:
    """The longest row that trains: by the plan, on two layers, and a step of the whole model at the shorter of the two."""
    step, most = (32, 128) if bench.args.tiny else (1024, bench.args.longest)
    names = {card: f"{card:g} GB" for card in bench.args.cards}
    found: dict[str, Any] = {}
    memory = {"keep": "input", "offload": True, "stream": True, "micro_tokens": step}
    tile = {"layers": bench.layers, "tile": 16 if bench.args.tiny else 2048, "step": step, "most": most}
    trials = []
    for card, name in names.items():
        found[f"{name}: by the plan"] = plan_context(
            bench.values("sft"), card, bench.capability, bench.dtype, host=bench.args.host, step=step, most=most
        )
        values = bench.values("sft", memory, model_name_or_path=str(bench.shallow))
        trials.append(Case(f"{name}: on two layers", measure_context, "sft", values, bench.card(card), tile))
    found |= bench.play(trials, at_once=bench.at_once)
    whole, lengths = [], {}
    for card, name in names.items():
        tokens = min(found[f"{name}: {how}"].get("tokens", 0) for how in ("by the plan", "on two layers"))
        if tokens:
            path = bench.folder / f"long-{card:g}.jsonl"
            rows.write_row(path, bench.template, tokens)
            more = {"dataset": [{"path": str(path)}], "max_length": tokens, "batch_size": 1}
            values = bench.values("sft", {"host": f"{bench.args.host}GiB"}, **more)
            case = Case(
                f"{name}: a step of the whole model", measure_peak, "sft", values, bench.card(card), {"steps": 1}
            )
            whole.append(case)
            lengths[case.name] = tokens
    several = max(1, min(bench.at_once, int(main_memory() / GIB / bench.args.host / 1.2)))
    for name, result in bench.play(whole, at_once=several).items():
        found[name] = result | {"tokens": lengths[name]}
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "goals": goals,
    "start": start,
    "cards": cards,
    "speed": speed,
    "context": context,
}


# -- what is wanted ----------------------------------------------------------------------------------------------------


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the issue wants, beside what was reached: a number, or None where it could not be measured."""
    found: list[dict[str, Any]] = []
    parts = results["parts"]

    def add(what: str, wanted: float, reached: float | None, *, at_most: bool) -> None:
        reached = reached if results["on_a_card"] else None  # of a tiny model on a CPU there is nothing to want
        met = None if reached is None else bool(reached <= wanted if at_most else reached >= wanted)
        found.append({"what": what, "wanted": wanted, "at_most": at_most, "reached": reached, "met": met})

    for name, wanted in (("sft, inputs offloaded", OFFLOADED_GIB), ("sft, streamed", STREAMED_GIB), ("dpo", DPO_GIB)):
        if "goals" in parts:
            add(f"{name}: GiB reserved, managed ones too", wanted, taken(parts["goals"][name]), at_most=True)
    if "goals" in parts:
        reference = parts["goals"]["reference"]
        bound = 2 * reference["a_hidden_state"] / GIB if "modes" in reference else 0.0
        for mode in ("together", "own"):
            cost = reference["modes"][mode]["cost"] / GIB if "modes" in reference else None
            add(f"live reference, {mode}: GiB more at the peak (wanted: two hidden states)", bound, cost, at_most=True)
    for name, case in parts.get("cards", {}).items():
        add(f"{name}: predicted and reserved differ by", RIGHT_TO, error_of(case), at_most=True)
    if "speed" in parts:
        both = [parts["speed"][name].get("tokens_per_second", {}) for name in ("streamed", "resident")]
        at = next((n for n in both[0] if n == AT_TOKENS), None)
        share = both[0][at] / both[1][at] if at is not None and both[0].get(at) and both[1].get(at) else None
        add(f"streamed over resident tokens/s at {AT_TOKENS} tokens", STREAMED_SHARE, share, at_most=False)
    for card, wanted in LONGEST.items():
        if f"{card:g} GB: by the plan" in parts.get("context", {}):
            case = parts["context"].get(f"{card:g} GB: a step of the whole model", {})
            reached = case["tokens"] if "measured" in case else None
            add(f"{card:g} GB: tokens of a row that trains", wanted, reached, at_most=False)
    if "start" in parts:
        add("seconds to the first step's end", 60, parts["start"]["start"].get("seconds"), at_most=True)
    return found


def taken(case: dict[str, Any]) -> float | None:
    """GiB of a case's peak."""
    measured = case.get("measured")
    return None if measured is None else ((measured["reserved"] or 0) + measured["managed"]) / GIB


def error_of(case: dict[str, Any]) -> float | None:
    """How far what was reserved is from what was predicted; None where nothing was reserved by an allocator."""
    if "measured" not in case or case["measured"]["allocated"] is None:
        return None
    return abs(case["measured"]["reserved"] / case["predicted"]["reserved"] - 1)


def table(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['card']['name']}, {results['dtype']}; sizes in GiB, without the CUDA context"]
    if not results["on_a_card"]:
        lines.append("A CPU: peaks are the resident set of the whole process, and say nothing of a plan.")
    for part, cases in results["parts"].items():
        lines += ["", f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}"]
        peaks = [case for case in cases.values() if "measured" in case]
        if peaks:
            lines.append(f"  {'':34}{'predicted':>10}{'reserved':>10}{'allocated':>10}{'managed':>9}{'host':>7}  plan")
        for name, case in cases.items():
            lines.append(f"  {name:34}" + _row(case))
    lines += ["", "wanted and reached:"]
    for target in results["targets"]:
        reached = "not measured" if target["reached"] is None else f"{target['reached']:.4g}"
        word = "at most" if target["at_most"] else "at least"
        verdict = {True: "", False: "  MISSED", None: ""}[target["met"]]
        lines.append(f"  {target['what']}: {word} {target['wanted']:.4g}, {reached}{verdict}")
    return lines


def _row(case: dict[str, Any]) -> str:
    if "error" in case:
        return f"NO RESULT ({case['kind']}): {' '.join(case['error'].split())[-300:]}"
    if "measured" in case:
        told, found = case["predicted"], case["measured"]
        sizes = (told["reserved"], found["reserved"], found["allocated"])
        shown = "".join(f"{size / GIB:10.2f}" if size is not None else f"{'-':>10}" for size in sizes)
        words = _plan(case["plan"]) + ("; DID NOT FIT, and adapted" if case["adapted"] else "")
        words = f"{case['tokens']:,} tokens a row; {words}" if "tokens" in case else words
        return f"{shown}{found['managed'] / GIB:9.2f}{told['host'] / GIB:7.1f}  {words}"
    if "modes" in case:
        costs = ", ".join(f"{mode} {found['cost'] / GIB:.3f}" for mode, found in case["modes"].items())
        beside = (
            f"a pass keeps {case['kept_by_a_pass'] / GIB:.2f}, a hidden state is {case['a_hidden_state'] / GIB:.3f}"
        )
        return f"{costs} more at the peak of {case['tokens']:,} tokens ({beside})"
    if "tokens_per_second" in case:
        speeds = case["tokens_per_second"].items()
        return "  ".join(f"{n:,}: {speed:,.0f} tokens/s" if speed else f"{n:,}: did not fit" for n, speed in speeds)
    if "opening" in case:
        cold = (
            "files dropped from the system's cache first" if case["files_dropped_from_cache"] else "files maybe cached"
        )
        return (
            f"{case['seconds']:.1f} s: {case['imports']:.1f} to start and import, {case['opening']:.1f} for rows, base and "
            f"plan, {case['first_step']:.1f} for the step ({case['base_bytes'] / 1e9:.2f} GB read; {cold})"
        )
    host = sum(case["host"].values()) / GIB if "host" in case else None
    return f"{case['tokens']:,} tokens" + (f", {host:.1f} GiB of main memory at full depth" if host is not None else "")


def _plan(plan: dict[str, Any]) -> str:
    keep = plan["keep"]
    kept = ", ".join(f"{keep.count(word)} {word}" for word in dict.fromkeys(keep))
    words = [f"{plan['micro_tokens']:,} at once", f"keeps {kept}"]
    words += [f"{plan['offload']} offloaded"] if plan["offload"] else []
    words += ["streamed"] if plan["stream"] else []
    words += [f"tile {plan['tile']:,}"] if plan["tile"] else []
    return "; ".join([*words, f"scratch {plan['scratch']}", f"reference {plan['reference']}"])


# -- the whole ---------------------------------------------------------------------------------------------------------


def prepare(base: Path | None, shape: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Build the models that are not there; in a process of its own, which gives the card's memory back."""
    device = compute_device()
    dtype = compute_dtype("auto", device)
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    for name, given, sizes in (
        ("base", base, shape),
        ("shallow", folder, shape | {"num_hidden_layers": 2}),
    ):
        begun = time.monotonic()
        path, built = mistral.ensure_base(given or mistral.default_folder(sizes, dtype), sizes, device, dtype)
        seconds = round(time.monotonic() - begun, 1)
        found[name] = {"folder": str(path.resolve()), "built_now": built, "seconds": seconds, "shape": sizes}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found | {"card": describe_card(device), "on_a_card": device.type == "cuda"}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole bench; see ``memory.arguments``.

    Raises:
        UserError: there is no card, or ``--base`` holds something else.
    """
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("bench.memory measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU.")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if args.tiny:
            shape = mistral.TINY | {"num_hidden_layers": 3}
            found = prepare(args.base or folder / "base", shape, folder / "shallow")
        else:
            found = alone(prepare, args.base, mistral.MISTRAL_7B | {"num_hidden_layers": args.layers}, None)
        results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions("accelerate"),
            "settings": vars(args) | {"out": None, "base": None},
            "context_bytes": CONTEXT_BYTES,
            **found,
            "parts": {},
        }
        bench = Bench(args, found, folder, begun + 60 * args.minutes)
        for part in args.parts:
            results["parts"][part] = PARTS[part](bench)
            save(args.out, results)  # what was measured is not lost if what follows takes too long
    results["targets"] = targets(results)
    results["minutes"] = round((time.monotonic() - begun) / 60, 2)
    save(args.out, results)
    return results
