"""A run whose models and data may not be here yet: its base, rows, adapters and disk.

Sizes of models and data sets are those of the hub's pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import MistralConfig

from ..config.load import Loaded, Method, RunConfig
from ..data.load import load_rows
from ..data.sources import local_path
from ..io.run_dir import StageDir
from ..model.base_folder import read_model_config
from ..model.families import Shape
from ..model.files import fetch_base, named_folder
from ..model.peft_io import read_adapter
from .estimate import base_bytes, optimizer_bytes
from .workload import AdapterSpec, Workload, longest_of, make_workload

GB = 1e9
MISTRAL = "mistralai/Mistral-7B-v0.1"
MISTRAL_BYTES = 14_483_000_000  # its safetensors files
MISTRAL_SHAPE = MistralConfig()  # its defaults


class KnownData(NamedTuple):
    """A data set: of the recipe, or on the disk."""

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
# Of a row's JSON, in a token: about 4 of English text, fewer of others, and role tags take more.
CHARACTERS = 3
# The rank of stage 1's adapter, on every projection, where it is not known.
RANK_BELOW = 16


def decimal(size: int) -> str:
    """Bytes in decimal units, as disks and downloads are given."""
    return f"{size / GB:.1f} GB" if size >= GB / 10 else f"{size / 1e6:.1f} MB"


def counted_rows(method: Method, config: RunConfig) -> list[KnownData | None]:
    """Of each training set the number of rows and their mean tokens: known, or of rows on the disk with ``CHARACTERS`` a token;
    None: neither."""
    found = []
    for spec in config.dataset:
        known = KNOWN_DATA.get(spec.path)
        if known is None and local_path(spec) is not None:
            whole = spec.model_copy(update={"limit": None, "weight": 1.0})
            rows = load_rows([whole], config.row_kind(method), seed=config.seed).dataset["row"]
            known = KnownData(0, 0, len(rows), math.ceil(sum(map(len, rows)) / len(rows) / CHARACTERS))
        found.append(known)
    return found


def expected_rows(method: Method, config: RunConfig, data: Sequence[KnownData | None]) -> dict[str, Any]:
    """The fields of ``Workload`` that describe the rows, before these are read: each as long as it may be."""
    longest, size, pairs = longest_of(config, method), config.batch_size, config.row_kind(method) == "dpo"
    parts = [(spec, known) for spec, known in zip(config.dataset, data, strict=True) if known is not None]
    means = [min(known.tokens, longest) for _, known in parts]
    mean = sum(means) / len(means) if means else config.max_length
    step_tokens = size * (config.max_length if method == "sft" else mean)
    rows: dict[str, Any] = {
        "longest": longest,
        "segment": int(mean / 2 if pairs else mean),
        "step_most": size * longest,
    }
    if pairs:
        rows["keys"] = 1 + min(config.max_prompt_length, config.max_length // 2) / longest
    if len(parts) == len(data):
        counts = [min(spec.limit or known.rows, known.rows) * spec.weight for spec, known in parts]
        epoch = sum(count * tokens for count, tokens in zip(counts, means))
        step_tokens = min(step_tokens, epoch)  # a step takes no row twice
        tokens = epoch * config.num_train_epochs if config.max_steps is None else config.max_steps * step_tokens
        steps = config.max_steps or max(1, round(tokens / step_tokens))
        rows |= {"run_tokens": int(tokens), "steps": steps, "epochs": tokens / epoch}
    elif config.max_steps is not None:
        rows |= {"run_tokens": int(config.max_steps * step_tokens), "steps": config.max_steps}
    else:
        rows["epochs"] = config.num_train_epochs
    return {**rows, "step_tokens": int(step_tokens)}


def expected_job(
    method: Method,
    config: RunConfig,
    base_config: Any,
    dtype: torch.dtype,
    *,
    below: Sequence[AdapterSpec] | None = None,
    rows: dict[str, Any] | None = None,
) -> Workload:
    """The workload of a configuration.

    Args:
        below: the frozen adapters; None: they are not here, and their rank is assumed.
        rows: fields of ``Workload`` that describe the rows; None: ``expected_rows`` of the published data sets.
    """
    if rows is None:
        rows = expected_rows(method, config, [KNOWN_DATA.get(spec.path) for spec in config.dataset])
    job = make_workload(config, method, base_config, dtype, **rows)
    if below is None:
        stacked = config.adapters != "none" and (method == "dpo" or bool(config.adapters))
        below = [assumed_adapter(job.shape, config)] * ((len(config.adapters) or 1) if stacked else 0)
    return replace(job, adapters=(*below, *job.adapters))


def assumed_adapter(shape: Shape, config: RunConfig) -> AdapterSpec:
    """An adapter below that is not here."""
    return AdapterSpec.fresh(shape, RANK_BELOW, config.lora_target_modules, trained=False)


def adapters_below(method: Method, loaded: Loaded, shape: Shape) -> tuple[list[AdapterSpec], list[str]]:
    """(the adapters below, from folders and from the finished SFT stage of a run that was named, or assumed where they are not
    here; notes)."""
    config = loaded.config
    if config.adapters == "none" or (method == "sft" and not config.adapters):
        return [], []
    if not config.adapters and "output_dir" in loaded.given and StageDir(Path(config.output_dir) / "sft").complete():
        from ..model.chain import chain_of_run

        adapters = chain_of_run(config.output_dir, stage="sft").adapters
        return [AdapterSpec.read(shape, a.modules) for a in adapters], [
            f"on {', '.join(str(a.path) for a in adapters)}"
        ]
    assumed = assumed_adapter(shape, config)
    folders = [named_folder("adapter", name) for name in config.adapters] or [None]
    notes = [f"assuming rank {RANK_BELOW} for an adapter below, which is not here"] * (None in folders)
    return [AdapterSpec.read(shape, read_adapter(f).modules) if f else assumed for f in folders], notes


def disk_bytes(job: Workload, config: RunConfig) -> dict[str, int]:
    """Bytes that are written: the quantized base in the user's cache (first, where there is one), checkpoints, adapters."""
    found = {"for the quantized base in the cache": sum(base_bytes(job).values())} if config.load_in_4bit else {}
    weights = 4 * job.parameters
    checkpoint = weights + sum(optimizer_bytes(job.optim, job.trained_tensors))
    every = min(config.save_steps or 10**10, config.eval_steps or 10**10)
    count = min(config.save_total_limit, (job.steps or 10**9) // every) + 1
    found["for checkpoints (save_total_limit and one more)"] = count * checkpoint
    stack = sum(4 * sum(adapter.tensors(job.shape)) for adapter in job.adapters)
    found["for the adapter"] = stack + weights * (len(job.adapters) > 1)
    return found


def base_shape(name: str, revision: str = "main", *, any_family: bool = False) -> Any:
    """The base's configuration, from its folder, the hub's cache or the hub; Mistral's is known. Reads no weight.

    Args:
        any_family: one that the fused engine does not know, too.
    """
    if name == MISTRAL and named_folder("model", name) is None:
        return MISTRAL_SHAPE
    return read_model_config(fetch_base(name, revision, weights=False), any_family=any_family)
