"""What a run will take, said before anything is downloaded: download, disk, memory of the card, hours.

Sizes of the recipe's own models and data are facts of their hub pages. Memory follows from the model's shape and the
adapter's rank. Hours are arithmetic on cards' data sheets, an estimate and called one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .config import DatasetSpec, Method, RunConfig
from .console import duration
from .model.plan import kept_bytes

GB = 1e9
MISTRAL = "mistralai/Mistral-7B-v0.1"
MISTRAL_BYTES = 14_483_000_000  # its safetensors files
MISTRAL_SHAPE: Any = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32000,
)  # fmt: skip


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
# Dense 16-bit products with 32-bit sums, operations a second, from the data sheets; and the share of it that such a
# run is taken to reach.
CARDS = {"RTX 3060": 25.5e12, "T4": 65e12, "RTX 3090": 71e12, "RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
REACHED = {"T4": 0.15}  # it cannot hold its clock
REACHED_ELSE = 0.4


def needs_lines(method: Method, config: RunConfig) -> list[str]:
    """One fact a line. Never fails: what is not known is said to be unknown."""
    lines = ["what this will take:"]
    fetch, keep = _downloads(config)
    if fetch:
        lines.append("  download: " + ", ".join(f"{name} {size}" for name, size in fetch))
    else:
        lines.append("  download: nothing")
    free = shutil.disk_usage(_existing(_hub_cache())).free
    if keep:
        short = " — NOT ENOUGH" if free < keep else ""
        lines.append(f"  disk: about {keep / GB:.0f} GB in the hub's cache, {free / GB:.0f} GB are free there{short}")
    shape = _shape(config.model_name_or_path)
    if shape is None:
        return lines
    memory = memory_bytes(method, config, shape)
    device = "no GPU here: it runs on the CPU, in main memory"
    short = ""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        device = f"{properties.name} has {properties.total_memory / GB:.0f} GB"
        short = " — MORE THAN THE CARD HAS" if memory > properties.total_memory else ""
    lines.append(f"  memory: about {memory / GB:.1f} GB ({device}){short}")
    tokens = _tokens(config)
    if tokens and shape is MISTRAL_SHAPE:
        hours = {card: _seconds(method, tokens, shape, card) for card in CARDS}
        lines.append(
            f"  time: {tokens / 1e6:.0f} M tokens; estimates from data sheets, not measured: "
            + ", ".join(f"{card} {duration(seconds)}" for card, seconds in hours.items())
        )
        if not torch.cuda.is_available():
            lines.append("  on a CPU this takes months; `zephyr-lite demo` runs the recipe on a small model in minutes")
    return lines


def memory_bytes(method: Method, config: RunConfig, shape: Any) -> int:
    """Base, adapter with gradient and optimizer, what one example (a pair: two) of ``max_length`` keeps, and slack."""
    linear, other = _weights(shape)
    base = int(linear * (0.516 if config.load_in_4bit and config.bnb_4bit_use_double_quant else 0.5625))
    if not config.load_in_4bit:
        base = 2 * linear
    # weight, gradient, and two moments unless these may move to the host
    per_parameter = {"adamw_torch": 16, "adamw_8bit": 10}.get(config.optim, 8)
    adapter = config.lora_r * _lora_width(shape) * per_parameter
    tokens = config.max_length * (2 if method == "dpo" else 1)
    half = torch.float16
    kept = tokens * (kept_bytes(shape, half, "input") + kept_bytes(shape, half, "all") // shape.num_hidden_layers)
    return base + 2 * other + adapter + kept + int(1.0 * GB)


def _weights(shape: Any) -> tuple[int, int]:
    """Parameters of the linear layers, and of embeddings and head."""
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    queries, keys = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    layer = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)
    tied = 1 if getattr(shape, "tie_word_embeddings", False) else 2
    return layer * shape.num_hidden_layers, tied * shape.vocab_size * shape.hidden_size


def _lora_width(shape: Any) -> int:
    """Parameters of an adapter of rank 1 on every linear layer."""
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    queries, keys = shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim
    attention = 2 * (shape.hidden_size + queries) + 2 * (shape.hidden_size + keys)
    return shape.num_hidden_layers * (attention + 3 * (shape.hidden_size + shape.intermediate_size))


def _seconds(method: Method, tokens: int, shape: Any, card: str) -> float:
    """Two operations a weight and token for each of: forward, forward again, backward; and the reference's forward."""
    linear, other = _weights(shape)
    passes = 3 if method == "sft" else 4
    return 2 * passes * (linear + other // 2) * tokens / (CARDS[card] * REACHED.get(card, REACHED_ELSE))


def _tokens(config: RunConfig) -> int | None:
    """Of all training rows and epochs, where every data set is a known one."""
    total = 0.0
    for spec in config.dataset:
        known = KNOWN_DATA.get(spec.path)
        if known is None or Path(spec.path).is_dir():
            return None
        total += min(spec.limit or known.rows, known.rows) * spec.weight * known.tokens
    if config.max_steps is not None:
        return None
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


def _shape(name: str) -> Any | None:
    """The configuration of a base that is here, or Mistral's; None where neither is."""
    if name == MISTRAL:
        return MISTRAL_SHAPE
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        return None
    from transformers import AutoConfig

    try:
        shape = AutoConfig.from_pretrained(folder)
        _weights(shape)
    except (ValueError, KeyError, OSError, AttributeError):
        return None  # said properly when the base is read
    return shape
