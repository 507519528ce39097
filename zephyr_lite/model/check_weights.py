"""A base's weights against its config.json: every tensor's name and shape, before transformers loads any."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from ..errors import UserError
from ..io.strict_json import shown
from .families import FAMILIES
from .shards import again, check_layers, check_shapes, open_shards


def check_weights(folder: Path, config: Any) -> None:
    """Every file of the weights, checked before transformers sees them: index, headers, and shapes where they are known.

    Raises:
        UserError: a file is broken or another model's; names the file and the tensor.
    """
    files = list(open_shards(folder).values())
    if config.model_type not in FAMILIES:
        return
    check_layers(folder, files, config.num_hidden_layers)
    model = empty_model(folder, config)
    shapes = dict(model.state_dict())
    stored = getattr(config, "quantization_config", None)
    packed: set[str] = set()
    if stored is not None:
        settings = stored_settings(stored, folder)
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=None)
        packed = {name for name in shapes if quantizer.param_needs_quantization(model, name)}
    check_shapes(files, shapes, packed)


def empty_model(folder: Path, config: Any) -> Any:
    """The model of a configuration, on the meta device.

    Raises:
        UserError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:  # a model's own code on a stranger's numbers
        what = shown(" ".join(str(error).split()) or type(error).__name__, 300)
        raise UserError(
            f"{folder}/config.json: not a model that transformers builds: {what}.", again(folder / "config.json")
        ) from error


def stored_settings(stored: Any, folder: Path) -> BitsAndBytesConfig:
    """How a base is stored quantized, by its config.json.

    Raises:
        UserError: otherwise than in bitsandbytes' NF4.
    """
    told = stored if isinstance(stored, dict) else stored.to_dict()
    if not told.get("load_in_4bit") or told.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{folder}/config.json: the base is stored quantized as {shown(told.get('quant_method'))}"
            f"/{shown(told.get('bnb_4bit_quant_type', 'other'))}; only bitsandbytes' NF4 can be trained on.",
            "Use the 16-bit base, or one quantized to NF4.",
        )
    try:
        settings = BitsAndBytesConfig.from_dict(told)
        if settings.quantization_method() != "nf4":
            raise ValueError("it is no NF4")
        if not all(isinstance(name, str) for name in settings.llm_int8_skip_modules or ()):
            raise ValueError("llm_int8_skip_modules are no names")
        return settings
    except Exception as error:  # of its own checks, and of numbers where it looks for names
        raise UserError(
            f"{folder}/config.json: its quantization_config is none of bitsandbytes': {shown(error, 200)}.",
            again(folder / "config.json"),
        ) from error
