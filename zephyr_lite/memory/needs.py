"""Download, disk, memory and time of a run, printed before anything is fetched; and the workload that is expected of models and
data that are not here yet.

Sizes are those of the hub's pages.
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

from ..config.load import Method, RunConfig
from ..errors import UserError
from ..io.text import duration
from ..model.base import compute_device, compute_dtype, quantized_dir
from ..model.families import Shape
from ..model.files import check_config_file
from .estimate import base_bytes, optimizer_bytes
from .gpus import CARDS
from .machine import of_card, this_machine
from .plan import make_plan
from .workload import AdapterSpec, Workload, longest_of, make_workload, storage_of

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
# Cards whose hours are printed before a run without a GPU.
SHOWN = ("3060", "t4", "3090", "4090", "a100-40", "h100")
# The rank of stage 1's adapter, on every projection, where it is not known.
RANK_BELOW = 16
QUANTIZED = "for the quantized base in the cache"


class Written(NamedTuple):
    """Files that a run writes: where, what, how many bytes, and whether some of them may be there already."""

    place: Path
    what: str
    size: int
    begun: bool = False


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """What a run takes: download and disk, and without a GPU memory and time; unknown sizes are marked.

    Raises:
        UserError: the base is still to be fetched, and the run will not fit this card.
    """
    fetch, cached = _downloads(config)
    lines = ["what this will take:"]
    lines.append("  download: " + (", ".join(f"{name} {size}" for name, size in fetch.items()) or "nothing"))
    shape = _known_shape(config.model_name_or_path) if config.engine == "fused" else None
    device = compute_device()
    dtype = compute_dtype(config.dtype, device)
    job = None if shape is None else expected_job(method, config, shape, dtype)
    run = Path(config.output_dir)
    written = []
    if cached:
        from huggingface_hub.constants import HF_HUB_CACHE

        written.append(Written(Path(HF_HUB_CACHE), "in the hub's cache", cached))
    for what, size in {} if job is None else disk_bytes(job, config).items():
        if what == QUANTIZED:
            pattern = f"{glob.escape(Path(config.model_name_or_path).name)}-*"
            written.append(Written(quantized_dir(), what, size, any(quantized_dir().glob(pattern))))
        else:
            written.append(Written(run, what, size, (run / config.stage).is_dir()))
    lines += _disk(written)
    if job is None:
        return lines
    if device.type == "cpu":
        return [*lines, *_memory_and_time(job, config)]
    if config.model_name_or_path in fetch:
        # the plan is made and printed once the rows are there; but nothing is fetched for a run that does not fit
        make_plan(job, this_machine(device, dtype, config.memory, measure=False), config.memory)
    return lines


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


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _memory_and_time(job: Workload, config: RunConfig) -> list[str]:
    plan = make_plan(job, this_machine(compute_device(), job.dtype, config.memory), config.memory)
    lines = [f"  memory: about {plan.peak / GB:.1f} GB (no GPU here: it runs on the CPU, in main memory)"]
    if job.run_tokens and job.shape.layer_weights * job.shape.layers > 10**9:
        hours = []
        for name in SHOWN:
            try:
                there = make_plan(job.at(dtype=CARDS[name].dtype), of_card(CARDS[name]), config.memory)
                hours.append(f"{name} {duration(job.run_tokens / there.tokens_per_second)}")
            except UserError:
                hours.append(f"{name} does not fit")
        lines += [
            f"  time: {job.run_tokens / 1e6:.0f} M tokens; estimates from data sheets, not measured: {', '.join(hours)}",
            f"  on this CPU, from a short measurement, {duration(job.run_tokens / plan.tokens_per_second)}; `zephyr-lite demo` "
            "runs the recipe on a small model in minutes",
        ]
    return lines


def assumed_below(config: RunConfig, shape: Shape) -> AdapterSpec:
    """An adapter that is not here."""
    return AdapterSpec.fresh(shape, RANK_BELOW, config.lora_target_modules).frozen()


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
    tokens = _tokens(config)
    if config.max_steps is not None:
        rows["run_tokens"], rows["steps"] = int(config.max_steps * in_a_step), config.max_steps
    elif tokens is not None:
        rows["run_tokens"], rows["steps"] = tokens, max(1, round(tokens / in_a_step))
    if method == "dpo":
        rows["keys"] = 1 + min(config.max_prompt_length, config.max_length // 2) / longest
    storage = storage_of(config, base_config, Path(config.model_name_or_path), dtype)
    job = make_workload(config, method, base_config, dtype, storage=storage, **rows)
    if below is None:
        stacked = config.adapters != "none" and (method == "dpo" or bool(config.adapters))
        below = [assumed_below(config, job.shape)] * ((len(config.adapters) or 1) if stacked else 0)
    return job.at(adapters=(*below, *job.adapters))


def disk_bytes(job: Workload, config: RunConfig) -> dict[str, int]:
    """Bytes that are written: the quantized base in the user's cache, the checkpoints, the adapters."""
    found = {}
    if config.load_in_4bit:
        found[QUANTIZED] = sum(base_bytes(job).values())
    weights = 4 * job.parameters
    checkpoint = weights + sum(optimizer_bytes(job.optim, job.trained_tensors))
    every = [n for n in (config.save_steps, config.eval_steps) if n]
    count = min(config.save_total_limit, (job.steps or 10**9) // min(every)) + 1 if every else 1
    found["for checkpoints (one more than save_total_limit while one is written)"] = count * checkpoint
    stack = 4 * sum(sum(a.tensors(job.shape)) for a in job.adapters)
    found["for the adapter"] = stack + weights * (len(job.adapters) > 1)
    return found


def base_shape(name: str, revision: str = "main") -> tuple[Any, str | None]:
    """(the base's configuration, from its folder, the hub's cache or the hub; a note about it). Reads no weight.

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
    try:
        # Mistral's shape is known: the hub need not be asked
        here = name == MISTRAL
        return AutoConfig.from_pretrained(name, revision=revision, local_files_only=here, trust_remote_code=False), None
    except (OSError, ValueError, KeyError):
        if name == MISTRAL:
            return MISTRAL_SHAPE, "the base is not here yet: its published shape is taken"
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
        Shape.of(shape)
    except (UserError, ValueError, KeyError, OSError, AttributeError):
        return None  # reported when the base is read
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


def _downloads(config: RunConfig) -> tuple[dict[str, str], int]:
    """(name → size in words of what is still to be fetched, its bytes on the disk)."""
    import datasets

    fetch: dict[str, str] = {}
    keep = 0
    name = config.model_name_or_path
    if not Path(name).expanduser().is_dir() and not _cached(name):
        fetch[name] = f"{MISTRAL_BYTES / GB:.1f} GB" if name == MISTRAL else "(size not known)"
        keep += MISTRAL_BYTES if name == MISTRAL else 0
    for path in dict.fromkeys(spec.path for spec in (*config.dataset, *config.eval_dataset)):
        known = KNOWN_DATA.get(path)
        if Path(path).expanduser().exists() or path.startswith((".", "/", "~")):
            continue
        if known is None and path.count("/") == 1:
            fetch[path] = "(size not known)"
        elif known is not None and not (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir():
            fetch[path] = f"{known.download / GB:.1f} GB"
            keep += known.download + known.disk
    return fetch, keep


def _cached(name: str) -> bool:
    """Whether a model of the hub is in its cache (or the name is no hub id)."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [try_to_load_from_cache(name, f) for f in ("model.safetensors", "model.safetensors.index.json")]
    except ValueError:
        return True
    return any(isinstance(path, str) for path in found)
