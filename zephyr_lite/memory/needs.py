"""What a run will take, said before anything is downloaded: download and disk; and what the planner needs to know of the
recipe's own models and data where they are not here yet.

Sizes are facts of their hub pages. Memory and time are the planner's (``model.plan``, ``model.cost``).
"""

from __future__ import annotations

import glob
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..config.load import DatasetSpec, Method, RunConfig
from ..errors import UserError
from ..io.text import duration
from ..model.base import compute_device, compute_dtype, quantization_of
from ..model.config_file import check_config_file
from ..model.quantized import quantized_dir
from .account import base_bytes, optimizer_bytes
from .gpus import CARDS
from .machine import of_card
from .plan import make_plan, this_machine
from .workload import AdapterSpec, Shape, Storage, Workload, longest_of, make_workload

GB = 1e9
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
    """A data set of the recipe.

    Attributes:
        download, disk: bytes fetched (every split comes along), and in the cache once converted.
        rows: of the training split.
        tokens: of one row, on average: UltraChat's 286 M tokens are the published recipe's 139,520 packed rows of
            2048; a pair's 700 an assumption (prompt, chosen and rejected, cut as in the recipe).
    """

    download: int
    disk: int
    rows: int
    tokens: int


KNOWN_DATA = {
    "HuggingFaceH4/ultrachat_200k": KnownData(1_624_000_000, 3_047_000_000, 207_865, 1375),
    "HuggingFaceH4/ultrafeedback_binarized": KnownData(650_000_000, 1_162_000_000, 61_135, 700),
}
# Of the cards whose hours are said before a run.
SAID = ("3060", "t4", "3090", "4090", "a100-40", "h100")
# Stage 2 stands on stage 1's adapter: rank 16 on every projection, unless there is a run that says otherwise.
RANK_BELOW = 16
QUANTIZED = "for the quantized base in the cache"


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """One fact a line; what is not known is said to be unknown.

    Raises:
        UserError: the base is still to be fetched, and the run will not fit this card.
    """
    lines = ["what this will take:"]
    fetch, keep = _downloads(config)
    if fetch:
        lines.append("  download: " + ", ".join(f"{name} {size}" for name, size in fetch))
    else:
        lines.append("  download: nothing")
    shape = _known_shape(config.model_name_or_path)
    job = None if shape is None or config.engine != "fused" else expected_job(method, config, shape, _dtype(config))
    run = Path(config.output_dir)
    written = [Written(_hub_cache(), "in the hub's cache", keep)] if keep else []
    for what, size in disk_bytes(job, config).items() if job is not None else ():
        if what == QUANTIZED:
            name = Path(config.model_name_or_path).name
            written.append(Written(quantized_dir(), what, size, any(quantized_dir().glob(f"{glob.escape(name)}-*"))))
        else:
            written.append(Written(run, what, size, (run / config.stage).is_dir()))
    lines += _disk(written)
    if job is None:
        return lines
    fetched = not any(name == config.model_name_or_path for name, _ in fetch)
    lines += _memory_and_time(job, config, fetched)
    return lines


class Written(NamedTuple):
    """What a run writes: where, what, how many bytes, and whether some of it may be there already."""

    place: Path
    what: str
    size: int
    begun: bool = False


def _disk(written: list[Written]) -> list[str]:
    """A line for each disk that is written to: what, how much, and how much is free there."""
    disks: dict[int, list[Written]] = {}
    for part in written:
        disks.setdefault(_existing(part.place).stat().st_dev, []).append(part)
    lines = []
    for parts in disks.values():
        free = shutil.disk_usage(_existing(parts[0].place)).free
        short = " — NOT ENOUGH" if free < sum(part.size for part in parts if not part.begun) else ""
        sizes = ", ".join(f"{part.size / GB:.1f} GB {part.what}" for part in parts)
        places = ", ".join(dict.fromkeys(str(part.place) for part in parts))
        lines.append(f"  disk: {sizes}; {free / GB:.0f} GB are free for {places}{short}")
    return lines


def _memory_and_time(job: Workload, config: RunConfig, fetched: bool) -> list[str]:
    device = compute_device()
    if device.type == "cuda":
        # the plan is made, and said, once the rows are there; but nothing is fetched for a run that cannot be
        if not fetched:
            make_plan(job, this_machine(device, job.dtype, config.memory, measure=False), config.memory)
        return []
    plan = make_plan(job, this_machine(device, job.dtype, config.memory), config.memory)
    lines = [f"  memory: about {plan.peak / GB:.1f} GB (no GPU here: it runs on the CPU, in main memory)"]
    if job.run_tokens and job.shape.layer_weights * job.shape.layers > 10**9:
        hours = []
        for name in SAID:
            there = job.at(dtype=CARDS[name].dtype)
            try:
                speed = make_plan(there, of_card(CARDS[name]), config.memory).tokens_per_second
                hours.append(f"{name} {duration(job.run_tokens / speed)}")
            except UserError:
                hours.append(f"{name} does not fit")
        lines += [
            f"  time: {job.run_tokens / 1e6:.0f} M tokens; estimates from data sheets, not measured: {', '.join(hours)}",
            f"  on this CPU, from a short measurement, {duration(job.run_tokens / plan.tokens_per_second)}; `zephyr-lite demo` "
            "runs the recipe on a small model in minutes",
        ]
    return lines


def _dtype(config: RunConfig) -> torch.dtype:
    return compute_dtype(config.dtype, compute_device())


def assumed_below(config: RunConfig, shape: Shape) -> AdapterSpec:
    """An adapter that is not here."""
    return AdapterSpec.fresh(shape, RANK_BELOW, RANK_BELOW, config.lora_target_modules).frozen()


def expected_job(
    method: Method,
    config: RunConfig,
    base_config: Any,
    dtype: torch.dtype,
    below: Sequence[AdapterSpec] | None = None,
) -> Workload:
    """The job of a configuration whose rows are not at hand: as long as they may be, as many as are published.

    Args:
        below: the frozen adapters; None: what the configuration names is not here, and its rank is assumed.
    """
    rows: dict[str, Any] = {"longest": longest_of(config, method)}
    known = [KNOWN_DATA.get(spec.path) for spec in config.dataset]
    a_row = [k.tokens for k in known if k is not None]
    mean = sum(a_row) / len(a_row) if a_row else config.max_length
    rows["segment"] = int(min(mean, config.max_length) if method == "sft" else mean / 2)
    in_a_step = config.batch_size * (config.max_length if method == "sft" else min(mean, rows["longest"]))
    rows["step_tokens"] = int(in_a_step)
    rows["step_most"] = config.batch_size * rows["longest"]
    tokens = _tokens(config)
    if config.max_steps is not None:
        rows["run_tokens"], rows["steps"] = int(config.max_steps * in_a_step), config.max_steps
    elif tokens is not None:
        rows["run_tokens"], rows["steps"] = tokens, max(1, round(tokens / in_a_step))
    if method == "dpo":
        rows["keys"] = 1 + min(config.max_prompt_length, config.max_length // 2) / rows["longest"]
    job = make_workload(config, method, base_config, dtype, storage=_storage(config, base_config, dtype), **rows)
    if below is None:
        standing = config.adapters != "none" and (method == "dpo" or bool(config.adapters))
        count = (len(config.adapters) or 1) if standing else 0
        below = [assumed_below(config, job.shape)] * count
    return job.at(adapters=(*below, *job.adapters))


def _storage(config: RunConfig, base_config: Any, dtype: torch.dtype) -> Storage:
    stored = getattr(base_config, "quantization_config", None)
    _, four_bit, nested = quantization_of(config, stored, Path(config.model_name_or_path), dtype)
    return "dense" if not four_bit else "nf4 nested" if nested else "nf4"


def disk_bytes(job: Workload, config: RunConfig) -> dict[str, int]:
    """What is written: the quantized base in the user's cache, the checkpoints, the adapters."""
    found = {}
    if config.load_in_4bit:
        found[QUANTIZED] = sum(base_bytes(job).values())
    weights = 4 * job.parameters
    checkpoint = weights + sum(optimizer_bytes(job.optim, job.trained_tensors))
    every = [n for n in (config.save_steps, config.eval_steps) if n]
    count = min(config.save_total_limit, (job.steps or 10**9) // min(every)) + 1 if every else 1
    found["for checkpoints (one more than save_total_limit while one is written)"] = count * checkpoint
    found["for the adapter"] = 4 * sum(sum(a.tensors(job.shape)) for a in job.adapters) + weights * (
        len(job.adapters) > 1
    )
    return found


def base_shape(name: str, revision: str = "main") -> tuple[Any, str | None]:
    """The base's configuration, from its folder, the hub's cache or the hub, and no weight of it; and what to say of it.

    Raises:
        UserError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if folder.is_dir():
        check_config_file(folder)
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False), None
        except Exception as error:  # transformers' own checks raise whatever they like
            raise UserError(f"{folder}/config.json: not a configuration that transformers reads: {error}") from None
    if name == MISTRAL:  # known, so that nobody has to be asked
        try:
            return AutoConfig.from_pretrained(
                name, revision=revision, local_files_only=True, trust_remote_code=False
            ), None
        except (OSError, ValueError, KeyError):
            return MISTRAL_SHAPE, "the base is not here yet: its published shape is taken"
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False), None
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"model {name}: its config.json is neither in a folder of that name nor in the hub's cache, and the hub does "
            "not have it or could not be reached.",
            "Check the name and the connection, or give a local folder.",
        ) from None


def _known_shape(name: str) -> Any | None:
    """The configuration of a base that is here, or Mistral's; None where neither is."""
    if name == MISTRAL:
        return MISTRAL_SHAPE
    if not (Path(name).expanduser() / "config.json").is_file():
        return None
    check_config_file(Path(name).expanduser())
    try:
        shape, _ = base_shape(name)
        make_workload(RunConfig(), "sft", shape, torch.float16)
    except (UserError, ValueError, KeyError, OSError, AttributeError):
        return None  # said properly when the base is read
    return shape


def _tokens(config: RunConfig) -> int | None:
    """Of all training rows and epochs, where every data set is a known one."""
    total = 0.0
    for spec in config.dataset:
        known = KNOWN_DATA.get(spec.path)
        if known is None or Path(spec.path).is_dir():
            return None
        total += min(spec.limit or known.rows, known.rows) * spec.weight * known.tokens
    return int(total * config.num_train_epochs)


def _downloads(config: RunConfig) -> tuple[list[tuple[str, str]], int]:
    """What is still to be fetched, with its size as text, and the bytes of it on the disk."""
    fetch, keep = [], 0
    name = config.model_name_or_path
    if not Path(name).expanduser().is_dir() and not _cached(name):
        fetch.append((name, f"{MISTRAL_BYTES / GB:.1f} GB" if name == MISTRAL else "(size not known)"))
        keep += MISTRAL_BYTES if name == MISTRAL else 0
    specs: list[DatasetSpec] = [*config.dataset, *config.eval_dataset]
    for path in dict.fromkeys(spec.path for spec in specs):
        if Path(path).expanduser().exists() or path.startswith((".", "/", "~")):
            continue
        known = KNOWN_DATA.get(path)
        if known is None:
            if path.count("/") == 1:
                fetch.append((path, "(size not known)"))
        elif not _data_cached(path):
            fetch.append((path, f"{known.download / GB:.1f} GB"))
            keep += known.download + known.disk
    return fetch, keep


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(name, f) for f in ("model.safetensors", "model.safetensors.index.json")]
    except ValueError:  # no hub id
        return True
    return any(isinstance(path, str) for path in found)


def _data_cached(path: str) -> bool:
    import datasets

    return (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
