"""What a run takes, as text: ``zephyr-lite plan``, the start of a run, and the README's table of cards.

Sizes of models and data sets are those of the hub's pages.
"""

from __future__ import annotations

import glob
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import torch

from ..config.load import Loaded, Method, RunConfig, find_config, load_config
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import StageDir
from ..io.text import duration
from ..model.adapters import check_targets
from ..model.base import check_family, compute_device, compute_dtype, quantized_dir, read_model_config
from ..model.chain import chain_of_run
from ..model.execution import Keep
from ..model.families import Shape
from ..model.files import local_folder
from ..model.peft_io import read_adapter
from .estimate import GIB, MIB, PAGED, base_bytes, in_words, optimizer_bytes
from .gpus import find_gpu, gpu_of_size
from .machine import Machine, of_card, parse_size, this_machine
from .plan import Limits, Plan, longest_context, make_plan
from .speed import step_time
from .workload import AdapterSpec, Workload, longest_of, make_workload, storage_of

GB = 1e9
WIDTH = 78
MISTRAL = "mistralai/Mistral-7B-v0.1"
MISTRAL_BYTES = 14_483_000_000  # its safetensors files
MISTRAL_SHAPE: Any = SimpleNamespace(
    model_type="mistral",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=32000,
    sliding_window=4096,
    tie_word_embeddings=False,
    rope_parameters=None,
    hidden_act="silu",
)


@dataclass(frozen=True)
class KnownData:
    """A data set of the recipe."""

    download: int  # bytes fetched (every split comes along), and in the cache once converted
    disk: int
    rows: int  # of the training split
    # of one row, on average: UltraChat's 286 M tokens are the published recipe's 139,520 packed rows of 2048; a
    # pair's 700 an assumption (prompt, chosen and rejected, cut as in the recipe)
    tokens: int


KNOWN_DATA = {
    "HuggingFaceH4/ultrachat_200k": KnownData(1_624_000_000, 3_047_000_000, 207_865, 1375),
    "HuggingFaceH4/ultrafeedback_binarized": KnownData(650_000_000, 1_162_000_000, 61_135, 700),
}
# GB of the cards of ``--ladder``
LADDER = (6, 8, 12, 16, 24)
# The rank of stage 1's adapter, on every projection, where it is not known.
RANK_BELOW = 16
_LABELS = {
    "decoder layers": "base: decoder layers",
    "two layers' buffers": "base: two layers at a time",
    "embedding": "base: embedding",
    "output head": "base: output head",
    "norms": "base: norms",
    "dequantized weights": "one layer's weights, dequantized",
    "adapters": "adapters (float32)",
    "CUDA context": "CUDA context (estimate)",
    "process": "this process: Python, libraries, rows",
    "gradients": "gradients (float32)",
    "kept activations": "activations kept for the backward pass",
    "inputs": "inputs of a micro-batch",
    "the head at work": "the output head at work",
    "allocator's slack": "allocator's slack (estimate)",
}


# -- a plan ------------------------------------------------------------------------------------------------------------


def forecast_lines(
    job: Workload, machine: Machine, plan: Plan, config: RunConfig, *, price: float | None = None
) -> list[str]:
    """The plan of a workload on a machine: memory by name, the settings, time and money, in at most 80 columns.

    Args:
        price: US dollars an hour; None: the card's usual one, where it has one.
    """
    cpu, card, time = machine.kind == "cpu", machine.card, step_time(job, plan, machine.card)
    storage = {"dense": str(job.dtype).removeprefix("torch."), "nf4": "NF4", "nf4 nested": "NF4, scales in 8 bits"}
    here = cpu or not machine.context
    free = machine.free - (machine.context if here else 0)
    unit, unit_name = (GIB, "GiB") if plan.peak >= GIB / 2 else (MIB, "MiB")
    example = "row" if job.method == "sft" else "pair"
    memory = [(f"  {_LABELS.get(name, name)}", n) for name, n in plan.account.items() if name != "peak"]
    lines = [
        f"plan of {job.method} on {machine.name}, {free / GIB:.1f} GiB" + (" free" if here else ""),
        f"  {config.model_name_or_path} ({storage[job.storage]}), rank {config.lora_r}, {config.optim}",
        f"  longest {example} {job.longest:,} tokens" + (f", {job.step_tokens:,} a step" if job.step_tokens else ""),
        "",
        f"{'memory at the peak':<48}{unit_name:>9}",
        *(f"{name:<48}{n / unit:>9.2f}" for name, n in memory),
        f"{'  together':<48}{plan.peak / unit:>9.2f}  of {machine.free / unit:,.2f}",
        f"  the peak is in the {plan.at}",
        "",
        "what was chosen",
    ]
    chosen = plan.lines()
    if plan.micro_tokens < job.longest:
        chosen.append(f"a {example} runs whole, so up to {job.longest:,} tokens are computed at once")
    least: Keep = "input"
    slower = step_time(job, replace(plan, keep=(least,) * len(plan.keep), offload=0), card).step / time.step
    if slower > 1.005:
        chosen.append(f"full recomputation would take {slower:.2f} times as long")
    if not cpu and (plan.offload or plan.stream):
        waits = time.waiting / time.step
        cost = f"takes {waits:.0%} of a step" if waits >= 0.005 else "is hidden by computing"
        chosen.append(f"waiting for copies between main memory and the card {cost}")
    for line in chosen:
        lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")
    lines.append("")
    paged = 0 if cpu else plan.host.get(PAGED, 0)
    host = ", ".join(f"{name} {in_words(n)}" for name, n in plan.host.items() if not (paged and name == PAGED))
    if host or not cpu:
        lines.append(f"{'also in the same memory' if cpu else 'main memory, locked'}: {host or 'nothing'}")
    if paged:
        lines.append(f"main memory, not locked: {PAGED} {in_words(paged)}")
    if plan.managed:
        lines.append(f"optimizer states that move to main memory when the card is full: {in_words(plan.managed)}")
    basis = f"from a short measurement of this {'CPU' if cpu else 'card'}" if card.measured else "from data sheets"
    lines.append(f"speed: about {plan.tokens_per_second:,.0f} tokens/s ({basis})")
    if job.run_tokens:
        seconds = job.run_tokens / max(plan.tokens_per_second, 1e-9)
        price = card.price if price is None else price
        money = f", ${seconds / 3600 * price:,.2f} at ${price:.2f} an hour" if price is not None else ""
        many = f"{job.run_tokens / 1e6:,.1f} M" if job.run_tokens >= 1e6 else f"{job.run_tokens:,}"
        lines.append(f"this recipe: {many} tokens, about {duration(seconds)} of steps, evaluations aside{money}")
    if cpu:
        lines.append("no GPU here; `zephyr-lite plan --gpu 3060` plans for a card")
    return [part for line in lines for part in textwrap.wrap(line, WIDTH, subsequent_indent="    ") or [""]]


def planned_lines(
    method: Method, loaded: Loaded, *, gpu: str | None, vram: str | None, price: float | None
) -> list[str]:
    """The plan of a configuration on this machine, on a card by name, or on one of the size ``vram``.

    Raises:
        UserError: an unknown card, a base whose configuration cannot be read; or nothing fits.
    """
    config = loaded.config
    if config.engine != "fused":
        raise UserError(f"engine {config.engine}: only the fused engine is planned.", "Add engine=fused.")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price {price}: is not a price.", "Give US dollars an hour.")
    check_targets(config.lora_target_modules)
    base = base_shape(config.model_name_or_path, config.model_revision)
    notes = [n for n in loaded.notes if n.startswith("continuing")]
    notes.append(f"assuming that all rows have max_length={config.max_length} tokens")
    below, from_where = _below(method, config, Shape.of(base))
    notes += from_where
    here = compute_device()
    memory = config.memory if vram is None else config.memory.model_copy(update={"vram": vram})
    if gpu is None and (vram is None or here.type == "cuda"):  # whatever memory.vram says
        dtype = compute_dtype(config.dtype, here)
        machine = this_machine(here, dtype, memory)
    else:
        size = None if memory.vram is None else parse_size(memory.vram, "memory.vram" if vram is None else "--vram")
        card = find_gpu(gpu) if gpu is not None else gpu_of_size((size or 0) / GIB)
        dtype = card.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        machine = of_card(card, memory.vram)
        if gpu is None:
            notes.append(f"no card is named: one of that size, as fast as a {card.name}")
        elif machine.free > card.memory * GIB:
            notes.append(f"a {card.name} has {card.memory:g} GiB; it is planned with {machine.free / GIB:g}")
        if dtype == torch.bfloat16 and card.capability < (8, 0):
            notes.append(f"a {card.name} emulates bfloat16 products: it is slower than the plan says")
    job = expected_job(method, config, base, dtype, below)
    plan = make_plan(job, machine, memory)
    disk = [f"disk: {_decimal(n)} {what}" for what, n in disk_bytes(job, config).items()]
    return [
        *(f"note: {text}" for text in notes),
        *forecast_lines(job, machine, plan, config, price=price),
        *disk,
        "",
    ]


def _below(method: Method, config: RunConfig, shape: Shape) -> tuple[list[AdapterSpec] | None, list[str]]:
    """(the adapters below, from folders and from the run's finished SFT stage, None: they are assumed; notes on them).

    Raises:
        UserError: an adapter's folder is missing, or holds no plain LoRA.
    """
    if config.adapters == "none" or (method == "sft" and not config.adapters):
        return [], []
    if config.adapters:
        found, notes = [], []
        for name in config.adapters:
            if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).is_dir():
                found.append(_assumed_below(config, shape))
                notes.append(f"adapter {name} is not downloaded: assuming rank {RANK_BELOW}")
            else:
                found.append(AdapterSpec.read(shape, read_adapter(Path(name).expanduser()).modules))
        return found, notes
    if not StageDir(Path(config.output_dir) / "sft").complete():
        return None, [f"assuming rank {RANK_BELOW} for the SFT adapter below"]
    adapters = chain_of_run(config.output_dir, stage="sft").adapters
    return [AdapterSpec.read(shape, a.modules) for a in adapters], [f"on {', '.join(str(a.path) for a in adapters)}"]


def stages_of(words: list[str], file: str | None = None) -> tuple[tuple[Method, ...], list[str]]:
    """(the stages named by the first word, or by the configuration file's name or keys; the other words).

    Raises:
        UserError: the first word is none of sft, dpo and both.
    """
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

    Raises:
        UserError: an option or key that the table fixes.
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
        longest = longest_context(job, Limits.of(job, machine, config.memory), config.memory) // 1024
        kept = list(dict.fromkeys(plan.keep))
        keep = " / ".join(f"{word} ×{plan.keep.count(word)}" for word in kept) if len(kept) > 1 else kept[0]
        if plan.offload:
            keep += f", {plan.offload} of {len(plan.keep)} on the host"
        lines.append(
            f"| {size} GB | {method} | {plan.micro_tokens:,} | {keep} | {'streamed' if plan.stream else 'resident'} "
            f"| {plan.peak / GIB:.1f} | {sum(plan.host.values()) / GIB:.1f} | {f'{longest}k' if method == 'sft' else ''} |"
        )
    return lines


# -- a run whose models and data may not be here yet -------------------------------------------------------------------


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """What a run takes, before anything is downloaded: download and disk, and without a GPU memory and time.

    Raises:
        UserError: the base is still to be downloaded, and the run will not fit this card.
    """
    fetch, cached = _downloads(config)
    lines = ["what this will take:"]
    lines.append("  download: " + (", ".join(f"{name} {size}" for name, size in fetch.items()) or "nothing"))
    job, run = None, Path(config.output_dir)
    device = compute_device()
    dtype = compute_dtype(config.dtype, device)
    name = config.model_name_or_path
    if config.engine == "fused" and (name == MISTRAL or (Path(name).expanduser() / "config.json").is_file()):
        with suppress(UserError, ValueError, KeyError, AttributeError):  # reported when the base is read
            job = expected_job(method, config, base_shape(name), dtype)
    written = []
    if cached:
        from huggingface_hub.constants import HF_HUB_CACHE

        written.append((Path(HF_HUB_CACHE), "in the hub's cache", cached))
    if job is not None:
        quantized = any(quantized_dir().glob(f"{glob.escape(Path(config.model_name_or_path).name)}-*"))
        for what, size in disk_bytes(job, config).items():
            place, there = (quantized_dir(), quantized) if "quantized" in what else (run, (run / config.stage).is_dir())
            if not there:
                written.append((place, what, size))
    disks: dict[int, list[tuple[Path, str, int]]] = {}
    for part in written:
        disks.setdefault(_existing(part[0]).stat().st_dev, []).append(part)
    for parts in disks.values():
        free = shutil.disk_usage(_existing(parts[0][0])).free
        short = " — NOT ENOUGH" if free < sum(size for *_, size in parts) else ""
        sizes = ", ".join(f"{_decimal(size)} {what}" for _, what, size in parts)
        places = ", ".join(dict.fromkeys(str(place) for place, *_ in parts))
        lines.append(f"  disk: {sizes}; {free / GB:.0f} GB are free for {places}{short}")
    if job is not None and name in fetch:
        # the plan is printed once the rows are there; but nothing is downloaded for a run that does not fit
        cpu = device.type == "cpu"
        plan = make_plan(job, this_machine(device, dtype, config.memory, measure=cpu), config.memory)
        if cpu:
            lines.append(f"  memory: about {plan.peak / GB:.1f} GB (no GPU here: it runs on the CPU, in main memory)")
            if job.run_tokens:
                lines.append(f"  time: about {duration(job.run_tokens / plan.tokens_per_second)} on this CPU")
            lines.append("  `zephyr-lite plan --gpu 3060` estimates it for a card; `zephyr-lite demo` is a small run")
    return lines


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _decimal(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def _assumed_below(config: RunConfig, shape: Shape) -> AdapterSpec:
    """An adapter that is not here."""
    return AdapterSpec.fresh(shape, RANK_BELOW, config.lora_target_modules, trained=False)


def expected_job(
    method: Method,
    config: RunConfig,
    base_config: Any,
    dtype: torch.dtype,
    below: Sequence[AdapterSpec] | None = None,
) -> Workload:
    """The workload of a configuration before its rows are read: each as long as it may be, as many as are published.

    Args:
        below: the frozen adapters; None: they are not here, and their rank is assumed.
    """
    longest = longest_of(config, method)
    means = [known.tokens for spec in config.dataset if (known := KNOWN_DATA.get(spec.path))]
    mean = sum(means) / len(means) if means else config.max_length
    in_a_step = config.batch_size * (config.max_length if method == "sft" else min(mean, longest))
    rows: dict[str, Any] = {
        "longest": longest,
        "segment": int(min(mean, config.max_length) if method == "sft" else mean / 2),
        "step_tokens": int(in_a_step),
        "step_most": config.batch_size * longest,
    }
    known_rows = [None if Path(spec.path).is_dir() else KNOWN_DATA.get(spec.path) for spec in config.dataset]
    if config.max_steps is not None:
        rows["run_tokens"], rows["steps"] = int(config.max_steps * in_a_step), config.max_steps
    elif all(known_rows):
        pairs = [(spec, known) for spec, known in zip(config.dataset, known_rows) if known is not None]
        tokens = sum(min(spec.limit or known.rows, known.rows) * spec.weight * known.tokens for spec, known in pairs)
        rows["run_tokens"] = int(tokens * config.num_train_epochs)
        rows["steps"] = max(1, round(rows["run_tokens"] / in_a_step))
    if method == "dpo":
        rows["keys"] = 1 + min(config.max_prompt_length, config.max_length // 2) / longest
    storage = storage_of(config, base_config, Path(config.model_name_or_path), dtype)
    job = make_workload(config, method, base_config, dtype, storage=storage, **rows)
    if below is None:
        stacked = config.adapters != "none" and (method == "dpo" or bool(config.adapters))
        below = [_assumed_below(config, job.shape)] * ((len(config.adapters) or 1) if stacked else 0)
    return replace(job, adapters=(*below, *job.adapters))


def disk_bytes(job: Workload, config: RunConfig) -> dict[str, int]:
    """Bytes that are written: the quantized base in the user's cache (first, where there is one), checkpoints, adapters."""
    found = {"for the quantized base in the cache": sum(base_bytes(job).values())} if config.load_in_4bit else {}
    weights = 4 * job.parameters
    checkpoint = weights + sum(optimizer_bytes(job.optim, job.trained_tensors))
    every = [n for n in (config.save_steps, config.eval_steps) if n]
    count = min(config.save_total_limit, (job.steps or 10**9) // min(every)) + 1 if every else 1
    found["for checkpoints (save_total_limit and one more)"] = count * checkpoint
    stack = 4 * sum(sum(a.tensors(job.shape)) for a in job.adapters)
    found["for the adapter"] = stack + weights * (len(job.adapters) > 1)
    return found


def base_shape(name: str, revision: str = "main") -> Any:
    """The base's configuration, from its folder, the hub's cache or the hub; Mistral's is known. Reads no weight.

    Raises:
        UserError: there is none, the hub cannot be reached, or the fused engine does not know its family.
    """
    if (folder := local_folder(name)) is not None:
        return read_model_config(folder)
    if name == MISTRAL:
        return MISTRAL_SHAPE
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"model {name}: its config.json is neither in a folder of that name nor in the hub's cache, and the hub does "
            "not have it or could not be reached.",
            "Check the name and the connection, or give a local folder.",
        ) from None
    check_family(config, f"{name}/config.json")
    return config


def _downloads(config: RunConfig) -> tuple[dict[str, str], int]:
    """(name → size in words of what is still to be fetched, its bytes on the disk)."""
    import datasets
    from huggingface_hub import try_to_load_from_cache

    fetch: dict[str, str] = {}
    keep, name = 0, config.model_name_or_path
    if not Path(name).expanduser().is_dir() and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        weights = [try_to_load_from_cache(name, f"model.safetensors{end}") for end in ("", ".index.json")]
        if not any(isinstance(path, str) for path in weights):
            fetch[name] = _decimal(MISTRAL_BYTES) if name == MISTRAL else "(size not known)"
            keep += MISTRAL_BYTES if name == MISTRAL else 0
    for path in dict.fromkeys(spec.path for spec in (*config.dataset, *config.eval_dataset)):
        known = KNOWN_DATA.get(path)
        if Path(path).expanduser().exists() or path.startswith((".", "/", "~")):
            continue
        if known is None and path.count("/") == 1:
            fetch[path] = "(size not known)"
        elif known is not None and not (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir():
            fetch[path] = _decimal(known.download)
            keep += known.download + known.disk
    return fetch, keep
