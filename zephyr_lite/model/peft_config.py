"""adapter_config.json: which PEFT adapters are plain LoRA, and what its rank and alpha patterns say of a module."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import regex

from ..errors import UserError
from ..io.strict_json import is_whole, read_object, shown
from .shards import checked_place, pickles

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Each of these makes the adapter more than W + s·B·A.
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
# These initialisations subtract the adapter's first value from the base, so the file is only right on that other base.
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MAX_RANK, MAX_ALPHA = 2**16, 1e6
_MATCH_SECONDS = 0.5
PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)
_AGAIN = "Copy the adapter again, or write it again with PEFT's save_pretrained."


def weights_file(folder: Path) -> Path:
    """The adapter's weights.

    Raises:
        UserError: there are none in safetensors, or what lies there is a link out of the folder.
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
    """adapter_config.json, of an adapter that is W + s·B·A and nothing more.

    Which modules it has is read from the weights, so target_modules may be anything.

    Raises:
        UserError: there is none, it is broken, it asks for more than that, or its rank or alpha is no sensible number.
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
    _check_names(config, path)
    return config


def by_peft(folder: Path) -> str:
    """How to have an adapter that is more than W + s·B·A: as a base that contains it."""
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = repr(str(folder)) if own else "m.peft_config['default'].base_model_name_or_path"
    return (
        "Merge it with PEFT, and name the result (MERGED) as the base: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"m = M.from_pretrained({str(folder)!r}, dtype='auto'); m.merge_and_unload().save_pretrained('MERGED'); "
        f"T.from_pretrained({tokenizer}).save_pretrained('MERGED')\""
    )


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the module's name, from a dot on.

    Raises:
        TimeoutError: a key takes too long to match (a downloaded pattern may backtrack for ever).
    """
    for key, value in (pattern or {}).items():
        if regex.match(rf"(.*\.)?({key})$", module, timeout=_MATCH_SECONDS):
            return value
    return default


def other_base(config: Mapping[str, Any], name_or_path: str) -> str | None:
    """What to say of an adapter whose configuration names another base than it is going to stand on; None: the same.

    Names alone decide nothing: a base that was moved or fetched under another name has another. Shapes that do not fit
    are refused where the adapter is attached or merged.
    """
    told = config.get("base_model_name_or_path")
    if not told or told == name_or_path or Path(told).name == Path(name_or_path).name:
        return None
    return (
        f"it says that it was trained on {shown(told)}; here it stands on {name_or_path}, which is right only if those are the "
        "same weights"
    )


def _check_numbers(config: dict[str, Any], path: Path) -> None:
    rank = config.get("r", 8)
    if not is_whole(rank) or not 0 < rank <= MAX_RANK:
        raise UserError(f"{path}: r is {shown(repr(rank))}; it is a whole number from 1 to {MAX_RANK:,}.", _AGAIN)
    _check_alpha("lora_alpha", config.get("lora_alpha", 8), path)
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise UserError(f"{path}: use_rslora is {shown(repr(config['use_rslora']))}; it is true or false.", _AGAIN)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is not None and not isinstance(pattern, dict):
            raise UserError(f"{path}: {name} is {shown(repr(pattern))}; it is an object with names.", _AGAIN)
        for key, value in (pattern or {}).items():
            try:
                regex.compile(rf"(.*\.)?({key})$")
            except regex.error as error:
                raise UserError(f"{path}: {name} has the key {shown(repr(key))}: {error}.", _AGAIN) from None
            if name == "alpha_pattern":
                _check_alpha(f"alpha_pattern of {shown(key)}", value, path)
            elif not is_whole(value) or not 0 < value <= MAX_RANK:
                raise UserError(
                    f"{path}: rank_pattern of {shown(key)} is {shown(repr(value))}; it is a whole number from 1 to "
                    f"{MAX_RANK:,}.",
                    _AGAIN,
                )


def _check_alpha(what: str, value: object, path: Path) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise UserError(f"{path}: {what} is {shown(repr(value))}; it is a number, at most {MAX_ALPHA:g}.", _AGAIN)


def _check_names(config: dict[str, Any], path: Path) -> None:
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, type(None))):
        raise UserError(f"{path}: base_model_name_or_path is {shown(repr(base))}; it is a name.", _AGAIN)
