"""A base's weights compared with its config.json, by names and shapes, before transformers loads any."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ..errors import UserError
from ..io.text import shown
from .families import FAMILIES
from .files import again, open_shards

_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_OTHER_MODEL = "The files belong to different models; fetch the model again."
NF4_STATE = ".quant_state.bitsandbytes__nf4"


def check_weights(folder: Path, config: Any) -> None:
    """Check every file of the weights; for the fused engine's families, compare tensor names and shapes with the model.

    Tensors that the files lack are reported by transformers on loading (``base.load_base``).

    Raises:
        UserError: a file is broken; the model has no place for a tensor, or one of another shape.
    """
    holds = {name: file for file in open_shards(folder).values() for name in file.entries}
    if config.model_type not in FAMILIES:
        return
    layers = 1 + max((int(match[1]) for name in holds if (match := _LAYER.match(name))), default=-1)
    if layers not in (0, config.num_hidden_layers):
        raise UserError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have {layers}.", _OTHER_MODEL
        )
    if getattr(config, "quantization_config", None) is not None:
        stored_settings(config.quantization_config, folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(folder, config).state_dict().items()}
    packed = {name.removesuffix(NF4_STATE) for name in holds if name.endswith(NF4_STATE)}
    for name, file in holds.items():
        if name in packed or name.rpartition(".weight.")[0] + ".weight" in packed:
            continue  # bitsandbytes' parts of an NF4 weight
        # transformers adds the prefix itself, and computes inv_freq, which old checkpoints hold
        if name not in shapes and f"model.{name}" not in shapes and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(
                f"{file.path}: holds tensor {shown(name)}, for which the model of config.json has no place.",
                _OTHER_MODEL,
            )
        shape = file.entries[name].shape
        if shapes.get(name, shape) != shape:
            raise UserError(
                f"{file.path}: tensor {shown(name)} is {list(shape)}; by config.json it is {list(shapes[name])}.",
                _OTHER_MODEL,
            )


def empty_model(folder: Path, config: Any) -> Any:
    """The model of a configuration, on the meta device.

    Raises:
        UserError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}/config.json: not a model that transformers builds: {shown(error, 300)}.",
            again(folder / "config.json"),
        ) from error


def stored_settings(stored: Any, folder: Path) -> BitsAndBytesConfig:
    """The quantization settings of a base that is stored quantized.

    Raises:
        UserError: it is stored in another format than bitsandbytes' NF4.
    """
    told = stored if isinstance(stored, dict) else stored.to_dict()
    if not told.get("load_in_4bit") or told.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{folder}/config.json: the base is stored quantized as {shown(told.get('quant_method'))}"
            f"/{shown(told.get('bnb_4bit_quant_type', 'other'))}; only bitsandbytes' NF4 can be trained on.",
            "Use the 16-bit base, or one quantized to NF4.",
        )
    return BitsAndBytesConfig.from_dict(told)
