"""config.json of a base: refused where it would make transformers read or run something outside the folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import read_object, shown
from .shards import again

NAME = "config.json"
# each of these can name a kernel on the hub, which transformers would fetch and run
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def check_config_file(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: it is missing or no JSON object, has no model_type, or leads to code or weights outside the folder.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder}: holds no {NAME}, so it is not a model.", "Give a model's folder or hub id.")
    found = read_object(path, strict=False, hint=again(path))
    if not isinstance(found.get("model_type"), str):
        raise UserError(f"{path}: has no model_type, so it is no model's configuration.", again(path))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: holds adapter_config.json beside {NAME}; transformers would put that adapter onto the model "
            "unasked.",
            "Move adapter_config.json and its weights into a folder of their own, and name that one under adapters.",
        )
    for key in _KERNELS:
        value = found.get(key)
        names = value.values() if isinstance(value, dict) else [value]
        if any(isinstance(name, str) and "/" in name for name in names):
            raise UserError(
                f"{path}: {key} is {shown(value)}, a kernel that would be fetched from the hub and run.",
                f"No code of a model's is ever run; remove {key} from the file.",
            )
    if "transformers_weights" in found:
        raise UserError(
            f"{path}: transformers_weights is {shown(found['transformers_weights'])}; only model.safetensors and its index "
            "are read.",
            "Rename the weights to model.safetensors, and remove the key.",
        )
    return found
