"""What a run takes, as text: ``zephyr-lite plan``, the lines before a run, and the README's table of cards."""

from __future__ import annotations

import glob
import shutil
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch

from ..config.load import Loaded, MemorySpec, Method, RunConfig, find_config, load_config
from ..config.strict_yaml import read_yaml
from ..data.sources import local_path
from ..errors import UserError
from ..io.run_dir import cache_dir
from ..io.text import counted, duration
from ..model.adapters import check_targets
from ..model.base import compute_device, compute_dtype, quantized_dir
from ..model.families import Shape
from ..model.files import named_folder
from .estimate import PAGED
from .expected import (
    GB,
    KNOWN_DATA,
    MISTRAL,
    MISTRAL_BYTES,
    MISTRAL_SHAPE,
    KnownData,
    adapters_below,
    base_shape,
    counted_rows,
    decimal,
    disk_bytes,
    expected_job,
    expected_rows,
)
from .fitting import longest_context
from .gpus import GIB, find_gpu, gpu_of_size, in_words
from .machine import Machine, of_card, parse_size, this_machine
from .plan import Plan, fastest_change, make_plan, plan_run, run_seconds
from .workload import Workload

WIDTH = 78
# GB of the cards of ``--ladder``
LADDER = (6, 8, 12, 16, 24)
# How many times as fast a run must become for a change to be suggested.
WORTH_SAYING = 1.05


def forecast_lines(
    job: Workload,
    machine: Machine,
    plan: Plan,
    config: RunConfig,
    *,
    change: str = "",
    notes: Iterable[str] = (),
    price: float | None = None,
) -> list[str]:
    """A plan in short: whether it fits, how long it takes and what it costs; in at most 80 columns.

    Args:
        change: what would make it faster.
        price: US dollars an hour; None: the card's usual one, where it has one.
    """
    cuda, card = machine.device.cuda, machine.card
    fits = "fits" if plan.peak <= machine.free else "does not fit"
    peak = f"{in_words(plan.peak)} of {in_words(machine.free)}{_free(machine)} at the peak"
    host = f", and {in_words(sum(plan.host.values()))} of RAM" if cuda and plan.host else ""
    basis = "by a short measurement" if card.measured else "by data sheets"
    if plan.earlier_runs:
        basis = f"corrected by {counted(plan.earlier_runs, 'earlier run')} here: {plan.speed_ratio:.2f} of what was predicted"
    speed = plan.tokens_per_second
    rate = f"{speed:,.0f} tokens/s" if speed >= 10 else f"{speed:.2g} tokens/s"
    basis = f"({rate} {basis}{', int8 by estimate' * plan.int8})"
    time = f"about {duration(plan.seconds_per_step)} a step {basis}; the rows are not counted yet"
    if job.run_tokens:
        seconds = run_seconds(job, plan, machine)
        price = (card.price if price is None else price) or 0.0
        cost = round(seconds / 3600 * price, 2)
        time = f"about {duration(seconds)}{f', ${cost:,.2f} at ${price:.2f}/h' if cost else ''} {basis}"
    where = machine.name + ("" if config.engine == "fused" else f" with engine {config.engine}, roughly")
    lines = [f"plan of {job.method} on {where}: {config.model_name_or_path}, rank {config.lora_r}"]
    lines += [f"  memory  {fits}: {peak}{host}", f"  time    {time}", *([f"  change  {change}"] if change else [])]
    return _wrapped([*lines, *(f"  note    {note}" for note in notes)], indent=10)


def _detail_lines(job: Workload, machine: Machine, plan: Plan, config: RunConfig) -> list[str]:
    """The memory by name, the settings, and what is written to the disk."""
    cuda, example = machine.device.cuda, "row" if job.method == "sft" or job.mismatched else "pair"
    storage = {"dense": str(job.dtype).removeprefix("torch."), "nf4": "NF4", "nf4 nested": "NF4, scales in 8 bits"}
    lines = ["", "memory at the peak"]
    lines += [f"  {name:<46}{in_words(size):>10}" for name, size in plan.account.items() if name != "peak"]
    lines += [
        f"{'  together':<48}{in_words(plan.peak):>10} of {in_words(machine.free)}{_free(machine)}",
        f"  the peak is in the {plan.at}",
        "",
        "what was chosen",
        f"  base in {storage[job.storage]}; {config.optim}",
        f"  longest {example} {job.longest:,} tokens" + (f", {job.step_tokens:,} a step" if job.step_tokens else ""),
        *(f"  {line}" for line in plan.lines()),
    ]
    if plan.host:
        host = [f"{name} {in_words(n)}" + " (not locked)" * (cuda and name == PAGED) for name, n in plan.host.items()]
        lines.append(f"  {'main memory, locked' if cuda else 'also in the same memory'}: {', '.join(host)}")
    if plan.managed:
        lines.append(f"  optimizer states that move to main memory when the card is full: {in_words(plan.managed)}")
    if job.run_tokens:
        lines.append(f"  {job.run_tokens:,} tokens in all; evaluations are not in the time")
    lines += ["", "disk", *(f"  {decimal(size)} {what}" for what, size in disk_bytes(job, config).items())]
    return _wrapped(lines, indent=4)


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
    night = load_config(job.method, name).config.dataset[0]
    whole = [(spec.path, spec.limit) for spec in config.dataset] == [(night.path, None)] and config.max_steps is None
    if whole and night.limit and (job.run_tokens or 0) > 86400 * plan.tokens_per_second:
        known = KNOWN_DATA[night.path]
        seconds = run_seconds(replace(job, run_tokens=night.limit * known.tokens, epochs=1.0), plan, machine)
        words = f"--config {name}" if config.model_name_or_path == MISTRAL else f"dataset.limit={night.limit}"
        return f"{words}: {night.limit:,} of {known.rows:,} rows, {duration(seconds)}"
    times, text = fastest_change(plan, job, machine, memory)
    faster = f"{text} makes it {times - 1:.0%} faster"
    return faster if times > WORTH_SAYING else f"nothing: no single setting makes it {WORTH_SAYING - 1:.0%} faster"


def planned_lines(
    method: Method,
    loaded: Loaded,
    *,
    rows: dict[str, Any] | None = None,
    gpu: str | None = None,
    vram: str | None = None,
    price: float | None = None,
    details: bool = False,
) -> list[str]:
    """The plan of a configuration on this machine, on a card by name, or on one of the size ``vram``.

    Args:
        rows: the fields of ``Workload`` that describe the rows; None: these were not tokenized.
    """
    config = loaded.config
    base = base_shape(config.model_name_or_path, config.model_revision, any_family=config.engine != "fused")
    if config.engine == "fused":
        check_targets(config.lora_target_modules, base)
    below, notes = adapters_below(method, loaded, Shape.of(base))
    if rows is None:
        rows, about = _expected_rows(method, loaded)
        notes = [*about, *notes]
    here = compute_device()
    memory = config.memory if vram is None else config.memory.model_copy(update={"vram": vram})
    if gpu is None and (vram is None or here.type == "cuda"):
        dtype = compute_dtype(config.dtype, here)
        machine = this_machine(here, dtype, memory)
    else:
        card = find_gpu(gpu) if gpu is not None else gpu_of_size(parse_size(vram or "", "--vram") / GIB)
        dtype = card.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        machine = of_card(card, dtype, memory)
        if gpu is None:
            notes.append(f"no card is named: one of that size, as fast as a {card.name}")
        if dtype == torch.bfloat16 and card.capability < (8, 0):
            notes.append(f"a {card.name} emulates bfloat16 products: it is slower than the plan says")
    job = expected_job(method, config, base, dtype, below=below, rows=rows)
    job, plan, reference = plan_run(job, machine, memory, config)
    change = _change(job, machine, plan, config, memory)
    notes = [reference, *notes] if reference else notes
    lines = forecast_lines(job, machine, plan, config, change=change, notes=notes, price=price)
    return [*lines, *(_detail_lines(job, machine, plan, config) if details else []), ""]


def _expected_rows(method: Method, loaded: Loaded) -> tuple[dict[str, Any], list[str]]:
    """(``expected_rows``, notes)."""
    config, notes = loaded.config, [f"all rows are assumed to have max_length={loaded.config.max_length} tokens"]
    data: list[KnownData | None] = [None] * len(config.dataset)
    try:
        data = counted_rows(method, config)
        for spec, known in zip(config.dataset, data):
            if known is not None and spec.path not in KNOWN_DATA:
                size = f"{counted(known.rows, 'row')} of about {known.tokens:,} tokens"
                notes.append(f"{spec.path}: {size}, by their characters")
        if "num_train_epochs" in loaded.automatic:
            notes.append("one epoch is planned; a run of few rows chooses more")
    except UserError as error:
        notes.append(f"the rows are not counted: {error.message}")
    return expected_rows(method, config, data), notes


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """What a run takes, before anything is downloaded: download and disk, and without a GPU memory and time.

    Raises:
        UserError: the base is still to be downloaded, and the run will not fit this card.
    """
    import datasets
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    name, device, run = config.model_name_or_path, compute_device(), Path(config.output_dir)
    fetched: dict[str, int] = {}  # name → bytes; 0: not known
    written: list[tuple[Path, str, int]] = []  # folder, what is written there, bytes
    files = ("model.safetensors", "model.safetensors.index.json")
    here = named_folder("model", name) is not None
    if not here and not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        fetched[name] = MISTRAL_BYTES if name == MISTRAL else 0
        written.append((Path(HF_HUB_CACHE), f"for {name}", fetched[name]))
    converted = Path(datasets.config.HF_DATASETS_CACHE)
    for path in dict.fromkeys(s.path for s in (*config.dataset, *config.eval_dataset) if local_path(s) is None):
        if not (converted / path.replace("/", "___")).is_dir():
            known = KNOWN_DATA.get(path, KnownData(0, 0, 0, 0))
            fetched[path] = known.download
            written.append((converted, f"for {path}", known.download + known.disk))
    downloads = (f"{key} {decimal(size) if size else '(size not known)'}" for key, size in fetched.items())
    lines = ["what this will take:", f"  download: {', '.join(downloads) or 'nothing'}"]
    job = None
    if config.engine == "fused" and (here or name == MISTRAL):
        with suppress(UserError, ValueError, KeyError, AttributeError):  # reported when the base is read
            job = expected_job(method, config, base_shape(name), compute_dtype(config.dtype, device))
    if job is not None:
        in_cache = any(quantized_dir().glob(f"{glob.escape(Path(name).name)}-*"))
        for what, size in disk_bytes(job, config).items():
            place, there = (cache_dir(), in_cache) if "quantized" in what else (run, (run / config.stage).is_dir())
            written += [] if there else [(place, what, size)]
    left: dict[int, int] = {}  # device → bytes that are free once this is written
    for place, what, size in written:
        if size >= 1e6:
            folder = next(path for path in (place, *place.absolute().parents) if path.exists())
            disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
            left[disk] = left.get(disk, free) - size
            short = " — NOT ENOUGH" if left[disk] < 0 else ""
            lines.append(f"  disk: {decimal(size)} {what} in {place} ({free / GB:.0f} GB are free){short}")
    if job is not None and name in fetched:
        # the plan is printed once the rows are there; but nothing is downloaded for a run that does not fit
        cpu = device.type == "cpu"
        machine = this_machine(device, job.dtype, config.memory, measure=cpu)
        job, plan, _ = plan_run(job, machine, config.memory, config)
        if cpu:
            change = "`zephyr-lite plan --gpu 3060` plans for a card; `zephyr-lite demo` is a small run"
            lines += forecast_lines(job, machine, plan, config, change=change)
    return lines


def stages_of(words: list[str], file: str | None = None) -> tuple[tuple[Method, ...], list[str]]:
    """(the stages named by the first word, or by the configuration file's name or keys; the other words)."""
    meant: dict[str, tuple[Method, ...]] = {"sft": ("sft",), "dpo": ("dpo",), "both": ("sft", "dpo")}
    if words and "=" not in words[0] and not words[0].startswith("-"):
        if words[0].lower() not in meant:
            raise UserError(f"{words[0]}: there is no such stage.", "Name sft, dpo or both (or key=value).")
        return meant[words[0].lower()], words[1:]
    if file is not None:
        given = read_yaml(find_config(file))
        named = [method for method in meant if method in Path(file).stem.lower()]
        if given.get("stage") in ("sft", "dpo"):
            named = [given["stage"]]
        if len(named) != 1 and given.keys() & {"beta", "loss_type", "precompute_ref_log_probs", "max_prompt_length"}:
            named = ["dpo"]
        if len(named) == 1:
            return meant[named[0]], words
    return meant["both"], words


def ladder_lines(words: list[str]) -> list[str]:
    """The table of cards, of Mistral-7B with 8-bit AdamW, in Markdown.

    Args:
        words: key=value.
    """
    lines = [
        "| card | stage | tokens at once | layers keep | base | peak GiB | host GiB | longest row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in LADDER:
        for method in get_args(Method):
            card = gpu_of_size(size)
            config = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit", *words]).config
            if config.model_name_or_path != MISTRAL or config.engine != "fused":
                raise UserError(
                    "plan --ladder: the table is of Mistral-7B under the fused engine.", "Leave these keys out."
                )
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
