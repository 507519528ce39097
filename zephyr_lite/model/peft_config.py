"""adapter_config.json: which PEFT adapters are plain LoRA, and the rank and alpha patterns of a module."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import is_whole, read_object, shown
from .shards import checked_place, pickles

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# each of these makes the adapter more than W + s·B·A
UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on LoRA's B",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "alora_invocation_tokens": "an activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# these initializations subtract the adapter's first value from the base, so the file belongs to that changed base
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)
_AGAIN = "Copy the adapter again, or write it again with PEFT's save_pretrained."


def weights_file(folder: Path) -> Path:
    """The adapter's weights.

    Raises:
        UserError: there are none in safetensors, or the file is a link out of the folder.
    """
    weights = folder / WEIGHTS_NAME
    if weights.is_symlink() or weights.is_file():
        return checked_place(weights)
    old = pickles(folder, "adapter_model*.bin", "adapter_model*.pt", "adapter_model*.pkl")
    found = f"only {old}, a pickle, which is never opened" if old else "nothing by that name"
    raise UserError(
        f"{folder}: an adapter's weights are read from {WEIGHTS_NAME}; found {found}.",
        "Load it with PEFT and save it again: model.save_pretrained(folder, safe_serialization=True).",
    )


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that is W + s·B·A and nothing more.

    The modules are read from the weights, so target_modules may be anything.

    Raises:
        UserError: there is none, it is broken, it is another kind of adapter, or its rank or alpha is no sensible number.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: no {CONFIG_NAME} there, so it is not a PEFT adapter.",
            "Give the folder that PEFT's save_pretrained wrote (a stage's adapter/, for a run of this program).",
        )
    config = read_object(checked_place(path), hint=_AGAIN)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {shown(config.get('peft_type'))}, and only LORA is supported.",
            "Give a LoRA adapter.",
        )
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{path}: the adapter uses {what}, which cannot be stacked here.", by_peft(folder))
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {shown(repr(config['bias']))}: the adapter carries biases too.", by_peft(folder)
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(RESIDUAL_INITS):
        raise UserError(
            f"{path}: init_lora_weights is {shown(repr(init))}: this adapter belongs on a base with changed weights.",
            "Convert it to a plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…).",
        )
    _check_numbers(config, path)
    return config


def by_peft(folder: Path) -> str:
    """Hint for an adapter that is more than W + s·B·A: merge it with PEFT, and use the result as the base."""
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = repr(str(folder)) if own else "m.peft_config['default'].base_model_name_or_path"
    return (
        "Merge it with PEFT, and name the result (MERGED) as the base: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"m = M.from_pretrained({str(folder)!r}, dtype='auto'); m.merge_and_unload().save_pretrained('MERGED'); "
        f"T.from_pretrained({tokenizer}).save_pretrained('MERGED')\""
    )


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name, from a dot on."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def other_base(config: Mapping[str, Any], name_or_path: str) -> str | None:
    """A note on an adapter whose configuration names another base than the one it is used on; None: the same name.

    Only a note, since a base that was moved has another name. Shapes that do not fit are refused when it is attached.
    """
    told = config.get("base_model_name_or_path")
    if not told or told == name_or_path or Path(told).name == Path(name_or_path).name:
        return None
    return (
        f"its configuration names {shown(told)} as the base, it is used on {name_or_path}: right only if both are the same "
        "weights"
    )


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    def check(key: str, value: Any, good: bool, kind: str) -> None:
        if not good:
            raise UserError(f"{path}: {key} is {shown(repr(value))}; it is {kind}.", _AGAIN)

    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key)
        check(key, pattern, pattern is None or isinstance(pattern, dict), "an object with names")
    ranks = {"r": config.get("r", 8), **(config.get("rank_pattern") or {})}
    for key, value in ranks.items():
        name = key if key == "r" else f"rank_pattern of {shown(key)}"
        check(name, value, is_whole(value) and value > 0, "a whole number above 0")
    alphas = {"lora_alpha": config.get("lora_alpha", 8), **(config.get("alpha_pattern") or {})}
    for key, value in alphas.items():
        name = key if key == "lora_alpha" else f"alpha_pattern of {shown(key)}"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(name, value, number and math.isfinite(value), "a number")
    base = config.get("base_model_name_or_path")
    check("base_model_name_or_path", base, base is None or isinstance(base, str), "a name")
