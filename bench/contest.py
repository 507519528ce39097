"""What ``bench.gpu`` plays and tells: the card and its base, the rows, one match after the other, targets and table."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from bench import mistral, rows
from bench.card import Clock, commit, describe_card, matmul_ceiling, versions
from bench.match import WARM_UP, Match, Player, following, settings
from bench.turns import CONTEXT_BYTES, frozen_adapter, machine
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.model.base import compute_device, compute_dtype

TOKENS_AT_ONCE = 4096
# under a cap of 24 GiB: quotients over Unsloth, and the share of the matmul ceiling at 4096 tokens
TARGETS = {"sft": 1.5, "dpo": 3.5, "ceiling": 0.6}
BASELINES = ("trl", "unsloth")


def prepare_card(base: Path | None, shape: dict[str, Any], square: int, tokens: int) -> dict[str, Any]:
    """Build the base where it is not there, and measure what products can reach; in a process of its own, because what a
    process takes of the card it gives back only when it ends."""
    device = compute_device()
    dtype = compute_dtype("auto", device)
    begun = time.monotonic()
    folder, built = mistral.ensure_base(base or mistral.default_folder(shape, dtype), shape, device, dtype)
    seconds = time.monotonic() - begun
    found = {
        "base": {"folder": str(folder.resolve()), "built_now": built, "seconds": round(seconds, 1), "shape": shape},
        "ceiling": matmul_ceiling(Clock(device, 10, 3), shape, tokens, square, dtype),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        torch.cuda.empty_cache()
    found["card"] = describe_card(device)
    return found


def alone(run: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *arguments).result()


def configurations(args: argparse.Namespace, base: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """What all engines share, of each method; rows are written to ``folder``."""
    from zephyr_lite.model.base import load_tokenizer

    template = resolve_template("auto", load_tokenizer(base))
    scale = 0.1 if args.tiny else 1.0
    steps = WARM_UP + args.rounds
    common: dict[str, Any] = {
        "model_name_or_path": str(base),
        "load_in_4bit": True,
        "lora_r": args.rank,
        "lora_alpha": args.rank,
        "chat_template": "auto",
        "eval_dataset": None,
        "eval_steps": None,
        "save_steps": None,
        "max_steps": steps + 1,  # the last step would write what a run leaves behind
        "learning_rate": 1e-4,
    }
    length = int(2048 * scale)
    rows.write_conversations(folder / "sft.jsonl", template, (steps + 1) * args.sft_rows * length, scale=scale)
    sft = {
        **common,
        "stage": "sft",
        "dataset": [{"path": str(folder / "sft.jsonl")}],
        "max_length": length,
        "batch_size": args.sft_rows,
    }
    pairs = steps * args.dpo_pairs
    rows.write_pairs(folder / "dpo.jsonl", template, pairs, scale=scale)
    dpo = {
        **common,
        "stage": "dpo",
        "dataset": [{"path": str(folder / "dpo.jsonl")}],
        "max_length": int(1024 * scale),
        "max_prompt_length": int(512 * scale),
        "batch_size": args.dpo_pairs,
        "beta": 0.01,
        "adapters": [str(frozen_adapter(common, folder))],
        "seed": rows.seed_with_longest_first(rows.pair_sizes(pairs, 1024, 512), args.dpo_pairs),
    }
    return {"sft": sft, "dpo": dpo}


def lineup(method: str, engines: Sequence[str], per_device: Sequence[int], tokens: int) -> list[Player]:
    """Who is tried, the fused engine first and then the baselines in turn, so that each has been tried once soon."""
    players = []
    if "fused" in engines:
        players.append(Player(method, "fused"))
        extra = (
            Player(method, "fused", micro_tokens=tokens) if method == "sft" else Player(method, "fused", cached=True)
        )
        players.append(extra)
    liger = importlib.util.find_spec("liger_kernel") is not None
    tries = [settings(method, engine, per_device, liger=liger) for engine in BASELINES if engine in engines]
    return players + [player for group in zip_longest(*tries) for player in group if player is not None]


def matches(args: argparse.Namespace) -> list[tuple[float | None, str, float, int]]:
    """(cap, method, dropout, share of the time), in order; the second dropout of SFT takes over the first's settings."""
    found: list[tuple[float | None, str, float, int]] = []
    for cap in [None] if args.tiny else args.cap:
        if "sft" in args.methods:
            found += [(cap, "sft", p, 1 if place else 2) for place, p in enumerate(args.dropout)]
        if "dpo" in args.methods:
            found.append((cap, "dpo", 0.0, 2))
    return found


def play_all(args: argparse.Namespace, found: dict[str, Any], folder: Path, deadline: float) -> None:
    """Every match, into ``found["matches"]`` and, as they end, into the file."""
    base = Path(found["base"]["folder"])
    values = configurations(args, base, folder)
    room = found["card"].get("free_bytes", 0)
    idle = sum(p.stat().st_size for p in base.glob("*.safetensors")) + 2 * 2**30
    engines = args.engines.split(",")
    found["matches"] = []
    todo = matches(args)
    first: Match | None = None
    for place, (cap, method, dropout, share) in enumerate(todo):
        now = time.monotonic()
        until = now + (deadline - now) * share / sum(m[3] for m in todo[place:])
        if cap is not None:
            cap = min(cap, (room + CONTEXT_BYTES) / 2**30)  # a card that is smaller is its own cap
        arguments = (method, values[method], args.rounds, until, folder, cap, room, idle, args.tiny)
        match = Match(*arguments)
        peers = [engine for engine in (*BASELINES, "unsloth default") if engine.split()[0] in engines]
        if method == "sft" and dropout != args.dropout[0]:
            assert first is not None
            before = first
            again = [following(before, engine, dropout=dropout) for engine in peers]
            if "fused" in engines:
                again.insert(0, [Player("sft", "fused", dropout=dropout)])
            result = match.play([], lambda match, again=again: again, len(again))
            missing = {
                engine: "nothing fitted without dropout either" for engine in peers if not before.fitting(engine)
            }
            result["not_run"] |= missing
        else:
            players = [replace(p, dropout=dropout) for p in lineup(method, engines, args.per_device, TOKENS_AT_ONCE)]
            cached = method == "dpo" and "trl" in engines
            result = match.play(players, trl_cached if cached else nothing, len({p.side for p in players}) + cached)
            first = match if method == "sft" else first
        found["matches"].append({**result, "dropout": dropout})
        save(args.out, found)  # what was measured is not lost if what follows takes too long


def save(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def nothing(match: Match) -> list[list[Player]]:
    return []


def trl_cached(match: Match) -> list[list[Player]]:
    """TRL with the reference computed before the first step, at its fastest setting with a live one."""
    return [following(match, "trl live", cached=True)]


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the issue wants, beside what was reached: a number, or None where it could not be measured."""
    flops = results["flop_per_token"]
    found = []
    for played in results["matches"]:
        where = f"{played['method']}, dropout {played['dropout']}"
        where += f", {played['cap_gib']:g} GiB" if played["cap_gib"] else ""
        quotient = "fused over unsloth" if played["method"] == "sft" else "fused live over unsloth live"
        reached = played["ratios"].get(quotient)
        found.append({"what": f"{where}: {quotient}", "wanted": TARGETS[played["method"]], "reached": reached})
        at_once = played["variants"].get(f"fused {TOKENS_AT_ONCE} tokens at once")
        if at_once is not None:
            speed = at_once["tokens_per_second"] * flops
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
        order = "taking turns" if played["side_by_side"] else "one engine after the other"
        lines += ["", f"{played['method']}, dropout {played['dropout']}{cap}: {rounds}, {order}"]
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


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole bench; see ``gpu.arguments``.

    Raises:
        UserError: there is no card, or ``--base`` holds something else.
    """
    begun = time.monotonic()
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("bench.gpu measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if args.tiny:
            found = prepare_card(args.base or folder / "base", mistral.TINY, 64, 32)
        else:
            shape = mistral.MISTRAL_7B | {"num_hidden_layers": args.layers}
            found = alone(prepare_card, args.base, shape, 8192, TOKENS_AT_ONCE)
        results: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions("accelerate", "unsloth", "unsloth_zoo", "liger_kernel", "xformers", "flash_attn"),
            "settings": vars(args) | {"out": None, "base": None},
            **found,
            # forward and the gradient to the inputs: two products of two FLOP each; recomputing is not work done
            "flop_per_token": 4 * mistral.decoder_parameters(found["base"]["shape"]),
        }
        play_all(args, results, folder, begun + 60 * args.minutes)
    results["targets"] = targets(results)
    results["minutes"] = round((time.monotonic() - begun) / 60, 2)
    save(args.out, results)
    return results
