"""``bench.gpu``: the rows, every engine's settings, the matches, and the table.

Every setting is a process of its own that loads, warms up, and does its rounds: optimizer steps on the same rows in the same
order for all. Running out of memory is a result, not a failure of the bench. The fastest setting of an engine that fits
counts; quotients are medians over rounds with the same rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from bench import mistral, rows
from bench.card import Clock, matmul_ceiling
from bench.command import header, save
from bench.turns import (
    CONTEXT_BYTES,
    Failed,
    Runner,
    Variant,
    common_values,
    describe,
    frozen_adapter,
    set_environment,
    times_faster,
)
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.model.base import compute_device, load_tokenizer

TOKENS_AT_ONCE = 4096
# under a cap of 24 GiB: quotients over Unsloth, and the share of the matmul ceiling at 4096 tokens
TARGETS = {"sft": 1.5, "dpo": 3.5, "ceiling": 0.6}
ENGINES, METHODS = ("fused", "trl", "unsloth"), ("sft", "dpo")
WARM_UP = 3  # steps before the rounds: the first is slow, a trial goes by the better of the others
SKIPS = (24, 16, 8)  # of Mistral's 32 layers, those that Unsloth does not recompute
MOST_AHEAD = 4  # processes that load while another is tried


def settings(method: Any, engine: str, sizes: Sequence[int]) -> list[Variant]:
    """An engine's settings, in the order in which they are tried: what surely fits first."""
    if engine == "fused":
        other = {"micro_tokens": TOKENS_AT_ONCE} if method == "sft" else {"cached": True}
        return [Variant(method, engine), Variant(method, engine, **other)]
    found = [Variant(method, engine, recompute=on, per_device=n) for n in sizes for on in (True, False)]
    if engine == "unsloth":
        found += [Variant(method, engine, recompute=True, per_device=n, skip_layers=k) for n in sizes for k in SKIPS]
        return found
    if importlib.util.find_spec("liger_kernel") is not None:
        found += [Variant(method, engine, recompute=True, per_device=n, liger=True) for n in sizes]
        found.append(Variant(method, engine, liger=True))
    if method == "sft":
        return [*found, Variant(method, engine, recompute=True, padded=True)]
    return found + [Variant(method, engine, recompute=on, cached=True) for on in (True, False)]


@dataclass
class Match:
    """One method under one cap.

    Args:
        values: the configuration that all engines share.
        rounds: measured steps of each.
        deadline: when the rounds shall end, on ``time.monotonic``; each engine does one round at least.
        folder: for the runs.
        cap: GiB that each process may take of the card; None on a CPU.
        ahead: processes that may load while another is tried.
        threads: engines are threads of this process (a test).
    """

    method: str
    values: dict[str, Any]
    rounds: int
    deadline: float
    folder: Path
    cap: float | None
    ahead: int
    threads: bool
    tried: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, tuple[float, Runner]] = field(default_factory=dict)

    def play(self, variants: Sequence[Variant]) -> dict[str, Any]:
        """Run all settings, in this order; of a side's the fastest counts."""
        loading: dict[Variant, Runner] = {}
        try:
            for place, variant in enumerate(variants):
                for later in variants[place : place + 1 + self.ahead]:
                    if later not in loading and self._pointless(later) is None:
                        loading[later] = self._start(later)
                why, runner = self._pointless(variant), loading.pop(variant, None)
                if runner is not None and why is None:
                    self._try(runner, loading.values())
                    continue
                self._note(variant, "not tried", why or "")
                if runner is not None:
                    runner.kill()
        finally:
            for runner in loading.values():
                runner.kill()
        return self._result()

    def _pointless(self, variant: Variant) -> str | None:
        own = [t for t in self.tried if t["side"] == variant.side]
        for t in own:
            other: Variant = t["variant"]
            if t["result"] == "refused":
                return f"the engine refused {other.name}"
            smaller = other.per_device < variant.per_device and replace(other, per_device=variant.per_device) == variant
            if t["result"] == "memory" and smaller:
                return f"{other.name} did not fit"
            less = not other.recompute or other.skip_layers > variant.skip_layers
            if variant.skip_layers and t["result"] == "ran" and other.per_device == variant.per_device and less:
                return f"{other.name} fitted, which recomputes less"
        if sum(t["result"] in ("error", "died", "late") for t in own) > 1 and variant.side not in self.best:
            return "the engine failed twice"
        if time.monotonic() > self.deadline and variant.side in self.best:
            return "out of time"
        return None

    def _start(self, variant: Variant) -> Runner:
        told = {**self.values, "output_dir": str(self.folder / f"{self.method} {variant.name}".replace(" ", "-"))}
        if variant.micro_tokens is not None:
            told["memory"] = {"micro_tokens": variant.micro_tokens}
        return Runner(variant, told, threads=self.threads, cap=self.cap)

    def _patience(self) -> float:
        """How long to wait for an answer."""
        return max(60.0, self.deadline - time.monotonic())

    def _try(self, runner: Runner, loading: Any) -> None:
        """Load and warm up; do the rounds if it is the side's fastest."""
        variant = runner.variant
        try:
            runner.load(self._patience())
            for other in loading:
                other.pipe.poll(self._patience())  # nothing loads while steps are measured
            steps = [runner.step(self._patience()) for _ in range(WARM_UP)]
            seconds = min(step["seconds"] for step in steps[1:])
            if variant.side not in self.best or seconds < self.best[variant.side][0]:
                for place in range(self.rounds):
                    if place == 0 or time.monotonic() < self.deadline:
                        runner.steps.append(runner.step(self._patience()))
                self.best[variant.side] = (seconds, runner)
        except Failed as error:
            self._note(variant, error.kind, error.text)
            runner.kill()
            return
        self._note(variant, "ran", "", seconds=seconds, peak_bytes=max(s["peak_bytes"] for s in steps))
        with suppress(Failed):  # it has measured
            runner.stop()

    def _note(self, variant: Variant, result: str, why: str, **found: Any) -> None:
        self.tried.append({"variant": variant, "side": variant.side, "result": result, "why": why, **found})
        words = why.strip().splitlines()[-1:] or [f"{found.get('seconds', 0):.2f} s"]
        print(f"{self.method} {variant.name}: {result}: {words[0]}", file=sys.stderr, flush=True)

    def _result(self) -> dict[str, Any]:
        unit = "tokens" if self.method == "sft" else "pairs"
        runners = {side: runner for side, (_, runner) in self.best.items()}
        ratios = {
            f"{ours} over {theirs}": times_faster(runners[ours], runners[theirs])
            for ours in runners
            for theirs in runners
            if ours in ("fused", "fused live", "fused cached") and not theirs.startswith("fused")
        }
        for name in [name for name in ratios if name.endswith(" default")]:  # Unsloth's fastest may be its default
            fastest = name.removesuffix(" default")
            ratios[fastest] = min(ratios[name], ratios.get(fastest, ratios[name]))
        # the last word on each side that has no result
        last = {t["side"]: t for t in self.tried if t["result"] not in ("ran", "not tried")}
        return {
            "method": self.method,
            "cap_gib": self.cap,
            "rounds": min((len(runner.steps) for runner in runners.values()), default=0),
            "rounds_wanted": self.rounds,
            "variants": {side: {"setting": r.variant.name, **describe(r, unit)} for side, r in runners.items()},
            "ratios": ratios,
            "not_run": {side: f"{t['result']}: {t['why']}" for side, t in last.items() if side not in runners},
            "tried": [{**t, **asdict(t["variant"]), "variant": t["variant"].name} for t in self.tried],
        }


def prepare_card(base: Path | None, shape: dict[str, Any], square: int, tokens: int) -> dict[str, Any]:
    """Build the base where it is not there, and measure what products can reach."""
    found = mistral.prepare(base, shape)
    dtype = getattr(torch, found["dtype"])
    return {**found, "ceiling": matmul_ceiling(Clock(compute_device(), 10, 3), shape, tokens, square, dtype)}


def configurations(args: argparse.Namespace, base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What all engines share, of each method; rows are written to ``folder``."""
    template = resolve_template("auto", load_tokenizer(base))
    scale = 0.1 if args.tiny else 1.0
    steps = WARM_UP + args.rounds
    common = common_values(base, rank=args.rank, steps=steps)
    length = int(2048 * scale)
    rows.write_conversations(folder / "sft.jsonl", template, (steps + 1) * args.sft_rows * length, scale)
    rows.write_pairs(folder / "dpo.jsonl", template, steps * args.dpo_pairs, scale)
    sft = {"lora_dropout": args.dropout, "max_length": length, "batch_size": args.sft_rows}
    dpo = {
        "lora_dropout": 0.0,
        "max_length": int(1024 * scale),
        "max_prompt_length": int(512 * scale),
        "batch_size": args.dpo_pairs,
        "beta": 0.01,
        "adapters": [str(frozen_adapter(common, folder))],
    }
    own = {"sft": sft, "dpo": dpo}
    return {m: {**common, "stage": m, "dataset": [{"path": str(folder / f"{m}.jsonl")}], **own[m]} for m in own}


def play_all(args: argparse.Namespace, found: dict[str, Any], folder: Path, deadline: float) -> None:
    """Every match, into ``found["matches"]`` and, as they end, into the file."""
    base = Path(found["base"]["folder"])
    values = configurations(args, base, folder)
    room = found["card"].get("free_bytes", 0)
    idle = sum(p.stat().st_size for p in base.glob("*.safetensors")) + 2 * 2**30  # of a process that has only loaded
    found["matches"] = []
    caps: list[float | None] = [None] if args.tiny else args.cap
    todo = [(cap, method) for cap in caps for method in METHODS if method in args.methods.split(",")]
    for place, (cap, method) in enumerate(todo):
        now = time.monotonic()
        until = now + (deadline - now) / len(todo[place:])
        ahead = 0
        if cap is not None:
            cap = min(cap, (room + CONTEXT_BYTES) / 2**30)  # a card that is smaller is its own cap
            ahead = max(0, min(MOST_AHEAD, int((room - cap * 2**30) // idle)))
        match = Match(method, values[method], args.rounds, until, folder, cap, ahead, args.tiny)
        # the fused engine first and then the baselines in turn, so that each has been tried once soon
        tries = {engine: settings(method, engine, sorted(args.per_device)) for engine in args.engines.split(",")}
        others = [variants for engine, variants in tries.items() if engine != "fused"]
        variants = tries.get("fused", []) + [v for group in zip_longest(*others) for v in group if v is not None]
        found["matches"].append({**match.play(variants), "dropout": values[method]["lora_dropout"]})
        save(args.out, found)  # an interrupt keeps the results so far


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Goals, and what was reached: a number, or None where it could not be measured."""
    found = []
    for played in results["matches"]:
        where = f"{played['method']}, dropout {played['dropout']}"
        where += f", {played['cap_gib']:g} GiB" if played["cap_gib"] else ""
        quotient = "fused over unsloth" if played["method"] == "sft" else "fused live over unsloth live"
        reached = played["ratios"].get(quotient)
        found.append({"what": f"{where}: {quotient}", "wanted": TARGETS[played["method"]], "reached": reached})
        if at_once := played["variants"].get(f"fused {TOKENS_AT_ONCE} tokens at once"):
            speed = at_once["tokens_per_second"] * results["flop_per_token"]
            for name in ("square", "layer"):
                share = speed / results["ceiling"][f"{name}_flop_per_second"]
                what = f"{where}: share of the matmul ceiling ({name}) at {TOKENS_AT_ONCE} tokens"
                found.append({"what": what, "wanted": TARGETS["ceiling"], "reached": share})
    return found


def table(results: dict[str, Any]) -> list[str]:
    ceiling = results["ceiling"]
    lines = [
        f"{results['card']['name']}, {results['dtype']}; matmul ceiling {ceiling['square_flop_per_second'] / 1e12:,.1f} "
        f"TFLOP/s (square), {ceiling['layer_flop_per_second'] / 1e12:,.1f} (the layer's own at {ceiling['tokens']} tokens)"
    ]
    for played in results["matches"]:
        unit = "tokens/s" if played["method"] == "sft" else "pairs/s"
        cap = f", {played['cap_gib']:g} GiB" if played["cap_gib"] else ""
        rounds = f"{played['rounds']} of {played['rounds_wanted']} rounds"
        lines += ["", f"{played['method']}, dropout {played['dropout']}{cap}: {rounds}"]
        lines.append(f"  {'':30}{unit:>12}{'peak GiB':>10}{'allocated':>11}  setting")
        for side, found in played["variants"].items():
            speed = found[unit.replace("/s", "_per_second")]
            peak, used = found["peak_bytes"] / 2**30, found.get("peak_allocated_bytes", 0) / 2**30
            lines.append(f"  {side:30}{speed:12,.2f}{peak:10.2f}{used:11.2f}  {found['setting']}")
            lines += [f"    {note}" for note in found["kernels_replaced"]]
        for side, why in played["not_run"].items():
            lines.append(f"  {side:30}NO RESULT: {' '.join(why.split())[:300]}")
        lines += [f"  {name}: {ratio:.2f}×" for name, ratio in played["ratios"].items()]
    lines += ["", "wanted and reached:"]
    for target in results["targets"]:
        reached = "not measured" if target["reached"] is None else f"{target['reached']:.2f}"
        lines.append(f"  {target['what']}: {target['wanted']} wanted, {reached}")
    return lines


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    from bench import gpu

    parser = argparse.ArgumentParser(description=(gpu.__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cap", type=float, nargs="+", default=[24.0], help="GiB of the card imitated; several in turn"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything; rounds are dropped to keep it")
    parser.add_argument("--engines", default="fused,trl,unsloth")
    parser.add_argument("--methods", default="sft,dpo")
    parser.add_argument("--dropout", type=float, default=0.0, help="of SFT; DPO has none, as the recipe")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of every engine, where time allows")
    parser.add_argument("--per-device", type=int, nargs="+", default=[1, 2, 4], help="micro-batches that baselines try")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sft-rows", type=int, default=4, help="packed rows of 2048 tokens in a step")
    parser.add_argument("--dpo-pairs", type=int, default=8, help="pairs in a step")
    mistral.add_options(parser)
    args = parser.parse_args(words)
    for name, given, known in (("engines", args.engines, ENGINES), ("methods", args.methods, METHODS)):
        if not set(given.split(",")) <= set(known):
            raise UserError(f"--{name} {given}: known are {', '.join(known)}.")
    if any(args.sft_rows % n or args.dpo_pairs % n for n in args.per_device):
        raise UserError(f"--per-device {args.per_device}: must divide --sft-rows and --dpo-pairs.")
    return args


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    args, begun = arguments(words), time.monotonic()
    set_environment()
    with tempfile.TemporaryDirectory() as name:
        found = mistral.on_card(prepare_card, args, *((64, 32) if args.tiny else (8192, TOKENS_AT_ONCE)))
        results: dict[str, Any] = {
            **header("accelerate", "unsloth", "unsloth_zoo", "liger_kernel", "xformers", "flash_attn"),
            "settings": vars(args) | {"out": None, "base": None},
            **found,
            # forward and the gradient to the inputs: two products of two FLOP each; recomputing is not work done
            "flop_per_token": 4 * mistral.decoder_parameters(found["base"]["shape"]),
        }
        play_all(args, results, Path(name).resolve(), begun + 60 * args.minutes)
    results["targets"] = targets(results)
    results["minutes"] = round((time.monotonic() - begun) / 60, 2)
    save(args.out, results)
    print("\n".join(table(results)))
    return results
