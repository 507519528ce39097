"""What a run takes, as text: ``zephyr-lite plan``, the start of a run, and the README's table of cards."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from ..config.load import Loaded, MemorySpec, Method, RunConfig, find_config, load_config
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.text import counted, duration
from ..model.adapters import check_targets
from ..model.base import compute_device, compute_dtype
from ..model.families import Shape
from .changes import longest_context
from .device import GIB, MIB, in_words
from .estimate import PAGED
from .expected import (
    KNOWN_DATA,
    MISTRAL,
    MISTRAL_SHAPE,
    adapters_below,
    base_shape,
    counted_rows,
    decimal,
    disk_bytes,
    expected_job,
)
from .gpus import find_gpu, gpu_of_size
from .machine import Machine, of_card, parse_size, this_machine
from .plan import Plan, fastest_change, make_plan, plan_run, run_seconds
from .workload import Workload

WIDTH = 78
# GB of the cards of ``--ladder``
LADDER = (6, 8, 12, 16, 24)
# Seconds of steps from which on a CPU is not the machine for a run.
LONGEST_ON_A_CPU = 30 * 86400
# How many times as fast a run must become for a change to be suggested.
WORTH_SAYING = 1.05


# -- a plan ------------------------------------------------------------------------------------------------------------


def forecast_lines(
    job: Workload,
    machine: Machine,
    plan: Plan,
    config: RunConfig,
    *,
    reference: str = "",
    price: float | None = None,
    change: str = "",
) -> list[str]:
    """A plan in short: whether it fits, how long it takes and what it costs; in at most 80 columns.

    Args:
        reference: why DPO's is live or cached.
        price: US dollars an hour; None: the card's usual one, where it has one.
        change: what would make it faster.
    """
    cuda, card, engine = machine.device.cuda, machine.card, config.engine
    roughly = "" if engine == "fused" else "roughly "
    unit, unit_name = _unit(plan)
    fits = "fits" if plan.peak <= machine.free else "does not fit"
    peak = f"{roughly}{plan.peak / unit:.2f} of {machine.free / unit:,.2f} {unit_name}{_free(machine)} at the peak"
    host = f", and {sum(plan.host.values()) / unit:.2f} of main memory" if cuda and plan.host else ""

    basis = "by a short measurement" if card.measured else "by data sheets"
    if plan.earlier_runs:
        basis = f"corrected by {counted(plan.earlier_runs, 'earlier run')} here: {plan.speed_ratio:.2f} of what was predicted"
    if plan.int8:
        basis += ", int8 by estimate"
    speed = plan.tokens_per_second
    told = f"{roughly}{speed:,.0f} tokens/s" if speed >= 10 else f"{roughly}{speed:.2g} tokens/s"
    time = f"about {duration(plan.seconds_per_step)} a step ({told} {basis}); the rows are not counted yet"
    if job.run_tokens:
        seconds = run_seconds(job, plan, machine)
        price = (card.price if price is None else price) or 0.0
        cost = round(seconds / 3600 * price, 2)
        money = f", ${cost:,.2f} at ${price:.2f}/h" if cost else ""
        time = f"about {duration(seconds)}{money} ({told} {basis})"
        if not cuda and seconds > LONGEST_ON_A_CPU:
            time = f"{Path(config.model_name_or_path).name} does not train on a CPU ({told})"
    where = machine.name + ("" if engine == "fused" else f" with engine {engine}")
    lines = [f"plan of {job.method} on {where}: {config.model_name_or_path}, rank {config.lora_r}"]
    lines += [f"  memory  {fits}: {peak}{host}", f"  time    {time}", *([f"  change  {change}"] if change else [])]
    lines += [f"  note    {reference}"] * bool(reference)
    return _wrapped(lines, indent=10)


def _detail_lines(job: Workload, machine: Machine, plan: Plan, config: RunConfig) -> list[str]:
    """The memory by name, the settings, and what is written to the disk."""
    cuda, example = machine.device.cuda, "row" if job.method == "sft" or job.mismatched else "pair"
    storage = {"dense": str(job.dtype).removeprefix("torch."), "nf4": "NF4", "nf4 nested": "NF4, scales in 8 bits"}
    unit, unit_name = _unit(plan)
    account = {name: size for name, size in plan.account.items() if name != "peak"}
    lines = ["", f"{'memory at the peak':<48}{unit_name:>9}"]
    lines += [f"  {name:<46}{size / unit:>9.2f}" for name, size in account.items()]
    lines += [
        f"{'  together':<48}{plan.peak / unit:>9.2f}  of {machine.free / unit:,.2f}{_free(machine)}",
        f"  the peak is in the {plan.at}",
        "",
        "what was chosen",
        f"  base in {storage[job.storage]}; {config.optim}",
        f"  longest {example} {job.longest:,} tokens" + (f", {job.step_tokens:,} a step" if job.step_tokens else ""),
        *(f"  {line}" for line in plan.lines()),
    ]
    if plan.micro_tokens < job.longest:
        lines.append(f"  a {example} runs whole, so up to {job.longest:,} tokens are computed at once")
    if plan.host:
        host = [f"{name} {in_words(n)}" + " (not locked)" * (cuda and name == PAGED) for name, n in plan.host.items()]
        lines.append(f"  {'main memory, locked' if cuda else 'also in the same memory'}: {', '.join(host)}")
    if plan.managed:
        lines.append(f"  optimizer states that move to main memory when the card is full: {in_words(plan.managed)}")
    if job.run_tokens:
        lines.append(f"  {job.run_tokens:,} tokens in all; evaluations are not in the time")
    lines += ["", "disk", *(f"  {decimal(size)} {what}" for what, size in disk_bytes(job, config).items())]
    return _wrapped(lines, indent=4)


def _unit(plan: Plan) -> tuple[int, str]:
    return (GIB, "GiB") if plan.peak >= GIB / 2 else (MIB, "MiB")


def _free(machine: Machine) -> str:
    """Of this machine, and not of a card by name, the memory that is free now is planned with."""
    return " free" if not machine.device.cuda or not machine.device.context else ""


def _wrapped(lines: list[str], indent: int) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent) or [""]]


def _change(job: Workload, machine: Machine, plan: Plan, config: RunConfig, memory: MemorySpec) -> str:
    """What makes a run faster: the overnight recipe, where the whole one takes more than a day; else the best single setting."""
    if not machine.device.cuda:
        return "--gpu 3060 plans for a card by name, --vram 12GiB for any other"
    if config.engine != "fused":
        return "engine=fused, which is planned exactly"
    name = f"zephyr-7b/overnight-{job.method}"
    night, known = load_config(job.method, name).config.dataset[0], KNOWN_DATA
    whole = [(spec.path, spec.limit) for spec in config.dataset] == [(night.path, None)] and config.max_steps is None
    if whole and night.limit and (job.run_tokens or 0) > 86400 * plan.tokens_per_second:
        tokens = night.limit * known[night.path].tokens
        seconds = run_seconds(replace(job, run_tokens=tokens, epochs=1.0), plan, machine)
        words = f"--config {name}" if config.model_name_or_path == MISTRAL else f"dataset.limit={night.limit}"
        return f"{words}: {night.limit:,} of {known[night.path].rows:,} rows, {duration(seconds)}"
    times, text = fastest_change(plan, job, machine, memory)
    if times > WORTH_SAYING:
        return f"{text} makes it {times - 1:.0%} faster"
    return f"nothing: no single setting makes it {WORTH_SAYING - 1:.0%} faster"


def planned_lines(
    method: Method, loaded: Loaded, *, gpu: str | None, vram: str | None, price: float | None, details: bool = False
) -> list[str]:
    """The plan of a configuration on this machine, on a card by name, or on one of the size ``vram``."""
    config = loaded.config
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: is not a price.", "Give US dollars an hour.")
    base = base_shape(config.model_name_or_path, config.model_revision, any_family=config.engine != "fused")
    if config.engine == "fused":
        check_targets(config.lora_target_modules, base)
    notes = [f"all rows are assumed to have max_length={config.max_length} tokens"]
    below, about_below = adapters_below(method, loaded, Shape.of(base))
    notes += about_below
    data = None
    try:
        data = counted_rows(method, config)
        for spec, rows in zip(config.dataset, data):
            if rows is not None and spec.path not in KNOWN_DATA:
                notes.append(
                    f"{spec.path}: {counted(rows.rows, 'row')} of about {rows.tokens:,} tokens, by their characters"
                )
        if "num_train_epochs" in loaded.automatic:
            notes.append("one epoch is planned; a run of few rows chooses more")
    except UserError as error:
        notes.append(f"the rows are not counted: {error.message}")
    here = compute_device()
    memory = config.memory
    if vram is not None:
        parse_size(vram, "--vram")
        memory = memory.model_copy(update={"vram": vram})
    if gpu is None and (vram is None or here.type == "cuda"):
        dtype = compute_dtype(config.dtype, here)
        machine = this_machine(here, dtype, memory)
    else:
        card = find_gpu(gpu) if gpu is not None else gpu_of_size(parse_size(vram or "", "--vram") / GIB)
        dtype = card.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        machine = of_card(card, dtype, memory)
        if gpu is None:
            notes.append(f"no card is named: one of that size, as fast as a {card.name}")
        elif machine.free > card.memory * GIB:
            notes.append(f"a {card.name} has {card.memory:g} GiB; it is planned with {machine.free / GIB:g}")
        if dtype == torch.bfloat16 and card.capability < (8, 0):
            notes.append(f"a {card.name} emulates bfloat16 products: it is slower than the plan says")
    job = expected_job(method, config, base, dtype, below=below, data=data)
    job, plan, reference = plan_run(job, machine, memory, config)
    change = _change(job, machine, plan, config, memory)
    lines = forecast_lines(job, machine, plan, config, reference=reference, price=price, change=change)
    lines += _wrapped([f"  note    {note}" for note in notes], indent=10)
    return [*lines, *(_detail_lines(job, machine, plan, config) if details else []), ""]


def stages_of(words: list[str], file: str | None = None) -> tuple[tuple[Method, ...], list[str]]:
    """(the stages named by the first word, or by the configuration file's name or keys; the other words)."""
    meant: dict[str, tuple[Method, ...]] = {"sft": ("sft",), "dpo": ("dpo",), "both": ("sft", "dpo")}
    if words and "=" not in words[0] and not words[0].startswith("-"):
        if words[0].lower() not in meant:
            raise UserError(f"{words[0]}: there is no such stage.", "Name sft, dpo or both (or key=value).")
        return meant[words[0].lower()], words[1:]
    if file is not None:
        given = read_yaml(find_config(file))
        named = [method for method in get_args(Method) if method in Path(file).stem.lower()]
        if given.get("stage") in ("sft", "dpo"):
            named = [given["stage"]]
        if len(named) == 1:
            return (named[0],), words
        if given.keys() & {"beta", "loss_type", "precompute_ref_log_probs", "max_prompt_length"}:
            return ("dpo",), words
    return ("sft", "dpo"), words


def ladder_lines(words: list[str], others: Mapping[str, object] | None = None) -> list[str]:
    """The table of cards, of Mistral-7B with 8-bit AdamW, in Markdown.

    Args:
        words: key=value.
        others: other options of the command, by name; those that are not None are refused.
    """
    fixed = [name for name, value in (others or {}).items() if value is not None]
    keys = (word.lstrip("-").split("=")[0].split(".")[0].replace("-", "_") for word in words)
    fixed += [key for key in keys if key in ("model_name_or_path", "engine")]
    if fixed:
        raise UserError(
            f"plan --ladder: {', '.join(fixed)} cannot be set.",
            "The table is of Mistral-7B under the fused engine, with its own cards and stages.",
        )
    lines = [
        "| card | stage | tokens at once | layers keep | base | peak GiB | host GiB | longest row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in LADDER:
        for method in get_args(Method):
            card = gpu_of_size(size)
            config = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit", *words]).config
            memory = config.memory.model_copy(update={"vram": f"{size}GiB"})
            machine = of_card(card, card.dtype, memory)
            job = expected_job(method, config, MISTRAL_SHAPE, card.dtype)
            try:
                plan = make_plan(job, machine, memory)
            except UserError:
                lines.append(f"| {size} GB | {method} | does not fit | | | | | |")
                continue
            longest = f"{longest_context(job, machine, memory) // 1024}k" if method == "sft" else ""
            kept = list(dict.fromkeys(plan.keep))
            keep = " / ".join(f"{word} ×{plan.keep.count(word)}" for word in kept) if len(kept) > 1 else kept[0]
            if plan.offload:
                keep += f", {plan.offload} of {len(plan.keep)} on the host"
            host = sum(plan.host.values()) / GIB
            lines.append(
                f"| {size} GB | {method} | {plan.micro_tokens:,} | {keep} | {'streamed' if plan.stream else 'resident'} "
                f"| {plan.peak / GIB:.1f} | {host:.1f} | {longest} |"
            )
    return lines
