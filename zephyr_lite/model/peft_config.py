"""adapter_config.json: which PEFT adapters are plain LoRA, and what its rank and alpha patterns say of a module."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

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


def weights_file(folder: Path) -> Path:
    """The adapter's weights.

    Raises:
        UserError: there are none in safetensors.
    """
    weights = folder / WEIGHTS_NAME
    if not weights.is_file():
        old = sorted(folder.glob("adapter_model*.bin")) + sorted(folder.glob("adapter_model*.pt"))
        found = f"only {old[0].name}, a pickle, which is never opened" if old else "nothing by that name"
        raise UserError(
            f"{folder}: an adapter's weights are read from {WEIGHTS_NAME}; found {found}.",
            "Load it with PEFT and save it again: model.save_pretrained(folder, safe_serialization=True).",
        )
    return weights


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, of an adapter that is W + s·B·A and nothing more.

    Raises:
        UserError: there is none, it is broken, or it asks for more than that.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: no {CONFIG_NAME} there, so it is not a PEFT adapter.",
            "Give the folder that PEFT's save_pretrained wrote (a stage's adapter/, for a run of this program).",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).", "Write the adapter again.") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f"{path}: peft_type is {kind}, and only LORA is supported.", "Give a LoRA adapter.")
    for key, what in UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{path}: the adapter uses {what}, which cannot be stacked here.", "Give a plain LoRA.")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{path}: bias is {config['bias']!r}: the adapter carries biases too.", "Give one with bias: none."
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(RESIDUAL_INITS):
        raise UserError(
            f"{path}: init_lora_weights is {init!r}: this adapter belongs on a base with changed weights.",
            "Convert it to a plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…).",
        )
    return config


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module's name, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
