"""config.json of a base, checked before transformers builds anything from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.strict_json import is_whole, read_object, shown
from .shards import again

NAME = "config.json"
# The largest that any published model has is a tenth of these, and what is built of a size takes memory and time.
_LARGEST = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 4096,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}
# transformers makes a name for each label of a classifier.
_LABELS = 100_000
_ROPE = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Each of these makes transformers read weights, or run code, from elsewhere.
_ELSEWHERE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config_file(folder: Path) -> dict[str, Any]:
    """Refuse a config.json that is broken or absurd, and a broken generation_config.json, before anything trips over them.

    Returns:
        its content.

    Raises:
        UserError: it is not there, is no JSON object, has a size that cannot be one, or leads to code or weights that lie
            elsewhere; names the file and the key.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder}: holds no {NAME}, so it is not a model.", "Give a model's folder or hub id.")
    hint = again(path)
    found = read_object(path, strict=False, hint=hint)
    if not isinstance(found.get("model_type"), str):
        raise UserError(f"{path}: has no model_type, so it is no model's configuration.", hint)
    _check_elsewhere(found, path)
    for key, largest in _LARGEST.items():
        value = found.get(key)
        if value is None:
            continue
        if not is_whole(value) or value < 1:
            raise UserError(f"{path}: {key} is {shown(repr(value))}; it is a whole number above zero.", hint)
        if value > largest:
            raise UserError(f"{path}: {key} is {shown(value)}; no model has more than {largest:,}.", hint)
    labels = found.get("num_labels")
    if labels is not None and not (is_whole(labels) and 0 <= labels <= _LABELS):
        raise UserError(f"{path}: num_labels is {shown(repr(labels))}, and a language model has none.", hint)
    heads, groups, width = (found.get(k) for k in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    if heads and width and not found.get("head_dim") and width % heads:
        raise UserError(f"{path}: hidden_size {width} is not a multiple of num_attention_heads {heads}.", hint)
    if heads and groups and heads % groups:
        raise UserError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {groups}.", hint)
    _check_numbers(found, path, hint)
    generation = folder / "generation_config.json"
    if generation.is_symlink() or generation.exists():  # transformers reads it with the weights
        read_object(generation, strict=False, hint=again(generation))
    return found


def _check_elsewhere(found: dict[str, Any], path: Path) -> None:
    if (path.parent / "adapter_config.json").is_file():
        raise UserError(
            f"{path.parent}: holds adapter_config.json beside {NAME}; transformers would put that adapter onto the model "
            "unasked.",
            "Move adapter_config.json and its weights into a folder of their own, and name that one under adapters.",
        )
    for key in _ELSEWHERE:
        told = found.get(key)
        names = list(told.values()) if isinstance(told, dict) else [told]
        if any(isinstance(name, str) and "/" in name for name in names):
            raise UserError(
                f"{path}: {key} is {shown(told)}, a kernel that would be fetched from the hub and run.",
                f"No code of a model's is ever run; remove {key} from the file.",
            )
    if "transformers_weights" in found:
        raise UserError(
            f"{path}: transformers_weights is {shown(found['transformers_weights'])}; only model.safetensors and its index "
            "are read.",
            "Rename the weights to model.safetensors, and remove the key.",
        )


def _check_numbers(found: dict[str, Any], path: Path, hint: str) -> None:
    places: list[tuple[str, Any]] = [("rms_norm_eps", found)] if "rms_norm_eps" in found else []
    places += [("rope_theta", found)] if "rope_theta" in found else []
    for name in ("rope_parameters", "rope_scaling"):
        told = found.get(name)
        if told is not None and not isinstance(told, dict):
            raise UserError(f"{path}: {name} is {shown(repr(told))}; it is an object with keys.", hint)
        places += [(key, told) for key in _ROPE if told and key in told]
    for key, where in places:
        value = where[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= 1e18 or not math.isfinite(value):
            raise UserError(f"{path}: {key} is {shown(repr(value))}; it is a number above zero.", hint)
    settings = found.get("quantization_config")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{path}: quantization_config is {shown(repr(settings))}; it is an object with keys.", hint)
