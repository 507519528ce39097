"""``zephyr-lite plan``: a run planned from its configuration alone, and the README's table of cards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import get_args

import torch

from ..config.load import Loaded, MemorySpec, Method, RunConfig, find_config, load_config
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import StageDir
from ..model.adapters import check_targets
from ..model.base import check_family, compute_device, compute_dtype
from ..model.chain import chain_of_run
from ..model.families import Shape
from ..model.peft_io import read_adapter
from .estimate import GIB
from .forecast import forecast_lines
from .gpus import find_gpu, gpu_of_size
from .machine import Machine, of_card, parse_size, this_machine
from .needs import GB, MISTRAL_SHAPE, RANK_BELOW, assumed_below, base_shape, disk_bytes, expected_job
from .plan import Limits, Plan, longest_context, make_plan
from .workload import AdapterSpec

LADDER = (6, 8, 12, 16, 24)


def planned_lines(
    method: Method, loaded: Loaded, *, gpu: str | None, vram: str | None, price: float | None
) -> list[str]:
    """The plan of a configuration, on this machine, or on a card by name or size.

    Raises:
        UserError: an unknown card, a base whose configuration cannot be read; or nothing fits.
    """
    config = loaded.config
    if config.engine != "fused":
        raise UserError(f"engine {config.engine}: only the fused engine is planned.", "Add engine=fused.")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: is {'below zero' if price < 0 else 'no price'}.")
    check_targets(config.lora_target_modules)
    base, note = base_shape(config.model_name_or_path, config.model_revision)
    check_family(base, f"{config.model_name_or_path}/config.json")
    machine, dtype, memory = _machine(config, gpu, vram)
    below, from_where = _below(method, config, Shape.of(base))
    job = expected_job(method, config, base, dtype, below)
    plan = make_plan(job, machine, memory)
    notes = (
        *(n for n in loaded.notes if n.startswith("continuing")),
        note,
        f"rows are taken to be as long as max_length={config.max_length} lets them be",
        *from_where,
        *_of_card(machine, dtype, gpu, vram),
    )
    disk = disk_bytes(job, config)
    sizes = [f"{n / GB:.1f} GB {what}" if n >= GB / 10 else f"{n / 1e6:.1f} MB {what}" for what, n in disk.items()]
    return [
        *(f"note: {text}" for text in notes if text),
        *forecast_lines(job, machine, plan, config, price=price),
        "disk: " + sizes[0],
        *(f"  {size}" for size in sizes[1:]),
        "",
    ]


def _machine(config: RunConfig, gpu: str | None, vram: str | None) -> tuple[Machine, torch.dtype, MemorySpec]:
    """The card `gpu`, or one of the size `vram`; without both this machine, whatever memory.vram says."""
    here = compute_device()
    memory = config.memory if vram is None else config.memory.model_copy(update={"vram": vram})
    if gpu is None and (vram is None or here.type == "cuda"):
        dtype = compute_dtype(config.dtype, here)
        return this_machine(here, dtype, memory), dtype, memory
    size = None if memory.vram is None else parse_size(memory.vram, "memory.vram" if vram is None else "--vram")
    card = find_gpu(gpu) if gpu is not None else gpu_of_size((size or 0) / GIB)
    dtype = card.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    return of_card(card, memory.vram), dtype, memory


def _of_card(machine: Machine, dtype: torch.dtype, gpu: str | None, vram: str | None) -> list[str]:
    """Notes on the card."""
    card, said = machine.card, []
    if machine.kind == "cuda" and not card.measured:
        if gpu is None and vram is not None:
            said.append(f"no card is named: one of that size, as fast as a {card.name}")
        elif machine.free > card.memory * GIB:
            said.append(f"a {card.name} has {card.memory:g} GiB; it is planned with {machine.free / GIB:g}")
    if machine.kind == "cuda" and dtype == torch.bfloat16 and card.capability < (8, 0):
        said.append(f"a {card.name} emulates bfloat16 products: it is slower than the plan says")
    return said


def _below(method: Method, config: RunConfig, shape: Shape) -> tuple[list[AdapterSpec] | None, list[str]]:
    """(the adapters below, from folders and from the run's finished SFT stage, None: they are assumed; notes on them).

    Raises:
        UserError: an adapter's folder is not there, or holds no plain LoRA.
    """
    if config.adapters == "none" or (method == "sft" and not config.adapters):
        return [], []
    if config.adapters:
        found, notes = [], []
        for name in config.adapters:
            if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir():
                found.append(assumed_below(config, shape))
                notes.append(f"the adapter {name} is not here: it is taken to have rank {RANK_BELOW}")
            else:
                found.append(AdapterSpec.read(shape, read_adapter(Path(name).expanduser()).modules))
        return found, notes
    if not StageDir(Path(config.output_dir) / "sft").complete():
        return None, [f"the SFT adapter below is taken to have rank {RANK_BELOW}"]
    adapters = chain_of_run(config.output_dir, stage="sft").adapters
    return [AdapterSpec.read(shape, a.modules) for a in adapters], [f"on {', '.join(str(a.path) for a in adapters)}"]


def stages_of(words: list[str], file: str | None = None) -> tuple[tuple[Method, ...], list[str]]:
    """(the stages named by the first word, or by the configuration file's name or keys; the other words).

    Raises:
        UserError: the first word is none of sft, dpo and both.
    """
    if not words or "=" in words[0] or words[0].startswith("-"):
        if file is not None:
            given = read_yaml(find_config(file))
            named = [method for method in get_args(Method) if method in Path(file).stem.lower()]
            named = [given["stage"]] if given.get("stage") in ("sft", "dpo") else named
            if len(named) == 1:
                return (named[0],), words
            if given.keys() & {"beta", "loss_type", "precompute_ref_log_probs", "max_prompt_length"}:
                return ("dpo",), words
        return ("sft", "dpo"), words
    meant: dict[str, tuple[Method, ...]] = {"sft": ("sft",), "dpo": ("dpo",), "both": ("sft", "dpo")}
    if words[0].lower() not in meant:
        raise UserError(f"{words[0]}: there is no such stage.", "Name sft, dpo or both (or key=value).")
    return meant[words[0].lower()], words[1:]


def ladder_lines(words: list[str], others: Mapping[str, object] | None = None) -> list[str]:
    """The table of cards, of Mistral-7B with 8-bit AdamW, in Markdown.

    Args:
        words: key=value.
        others: other options of the command, by name; those that are not None are refused.

    Raises:
        UserError: an option or key that the table fixes.
    """
    idle = [name for name, value in (others or {}).items() if value is not None]
    if idle:
        raise UserError(f"plan --ladder: {', '.join(idle)} cannot be set.", "The table has its own cards and stages.")
    for word in words:
        key = word.lstrip("-").split("=")[0].split(".")[0].replace("-", "_")
        if key in ("model_name_or_path", "engine"):
            raise UserError(
                f"plan --ladder: {key} cannot be set.", "The table is of Mistral-7B under the fused engine."
            )
    lines = [
        "| card | stage | tokens at once | layers keep | base | peak GiB | host GiB | longest row |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods: tuple[Method, ...] = ("sft", "dpo")
    for size, method in product(LADDER, methods):
        card = gpu_of_size(size)
        machine = of_card(card, f"{size}GiB")
        config = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit", *words]).config
        job = expected_job(method, config, MISTRAL_SHAPE, card.dtype)
        try:
            plan = make_plan(job, machine, config.memory)
        except UserError:
            lines.append(f"| {size} GB | {method} | does not fit | | | | | |")
            continue
        limits = Limits.of(job, machine, config.memory)
        longest = f"{longest_context(job, limits, config.memory) // 1024}k" if method == "sft" else ""
        host = sum(plan.host.values()) / GIB
        lines.append(
            f"| {size} GB | {method} | {plan.micro_tokens:,} | {_kept(plan)} | {'streamed' if plan.stream else 'resident'} "
            f"| {plan.peak / GIB:.1f} | {host:.1f} | {longest} |"
        )
    return lines


def _kept(plan: Plan) -> str:
    words = list(dict.fromkeys(plan.keep))
    text = " / ".join(f"{word} ×{plan.keep.count(word)}" for word in words) if len(words) > 1 else words[0]
    return text + (f", {plan.offload} of {len(plan.keep)} on the host" if plan.offload else "")
