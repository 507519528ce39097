"""Unsloth under TRL's trainers: its loader, its kernels, its gradient checkpointing.

Its fused kernels know one active adapter. So the adapters below are treated as engine trl treats them: merged into a
16- or 32-bit base under a fresh adapter, and on a 4-bit base trained on (composed into one, at their own rank) against
the frozen copy that TRL's DPO makes of them. A fresh adapter gets such a copy too; its B is zero, so it is the base.

Checkpointing is in Unsloth's mode where the plan (or ``memory.keep``) says to recompute.

What Unsloth would change silently is refused: another dtype than asked for, 16 bits where 4 were asked for, scales of
the weights that are not quantized (it always quantizes them), rotary embeddings stretched beyond the model's own
length, a vocabulary that it extends.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config.load import RunConfig
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.base import (
    Base,
    compute_device,
    compute_dtype,
    fetch_base,
    frozen_base,
    quantization_of,
    read_model_config,
)
from ..model.compose import compose
from ..model.peft_io import LoraWeights
from ..train.stage import Say, Stage
from .early import start_unsloth
from .trl import ADAPTER, goes_on_below, merged_below, start_as_fused


def load_unsloth(config: RunConfig) -> Base:
    """The base through ``FastLanguageModel.from_pretrained``, frozen, from the folder that the other engines read.

    Raises:
        UserError: Unsloth cannot load it, or loads something else than what the configuration says.
    """
    start_unsloth()
    from unsloth import FastLanguageModel

    folder = fetch_base(config.model_name_or_path, config.model_revision)
    model_config = read_model_config(folder, any_family=True)
    device = compute_device()
    dtype = compute_dtype(config.dtype, device)
    stored = getattr(model_config, "quantization_config", None)
    _, four_bit, double = quantization_of(config, stored, folder, dtype)
    if dtype == torch.float64 or (dtype == torch.float32 and device.type == "cuda"):
        limit = (
            "its trainers autocast to 16 bits on a GPU" if device.type == "cuda" else "it computes in at most 32 bits"
        )
        raise UserError(f"dtype {str(dtype).removeprefix('torch.')}: Unsloth cannot; {limit}.", "Set engine=fused.")
    if four_bit and stored is None and not double:
        raise UserError(
            "bnb_4bit_use_double_quant false: Unsloth always quantizes the scales of a base that it quantizes.",
            "Set bnb_4bit_use_double_quant=true, or engine=fused.",
        )
    own_length = getattr(model_config, "max_position_embeddings", None) or config.max_length
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # in a log file it is noise
    try:
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            max_seq_length=min(config.max_length, own_length),  # beyond its own it would stretch the positions
            dtype=dtype,
            load_in_4bit=four_bit,
            load_in_16bit=not four_bit,
            device_map={"": str(device)},
            use_exact_model_name=True,
            random_state=config.seed,
        )
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, ImportError, RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(
            f"{folder}: Unsloth {unsloth_version()} cannot load it: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}",
            "Set engine=trl, which takes any architecture, or engine=fused.",
        ) from error
    _check_loaded(model, model_config, folder, dtype, four_bit)
    return frozen_base(model, config, folder, dtype, device, four_bit=four_bit, double_quant=double)


def _check_loaded(model: Any, model_config: Any, folder: Any, dtype: torch.dtype, four_bit: bool) -> None:
    """Unsloth prints a line and goes on where a machine cannot do what was asked for; a run of ours does not."""
    found_four_bit = any(getattr(p, "quant_state", None) is not None for p in model.parameters())
    found = {
        "load_in_4bit": (found_four_bit, four_bit),
        "dtype": (model.get_input_embeddings().weight.dtype, dtype),
        "the vocabulary's size": (model.get_input_embeddings().weight.shape[0], model_config.vocab_size),
    }
    for name, (there, wanted) in found.items():
        if there != wanted:
            raise UserError(
                f"{folder}: Unsloth {unsloth_version()} loaded it with {name} {there}, wanted was {wanted}.",
                "Ask for what it does here, or set engine=trl.",
            )


def attach(stage: Stage, say: Say, *, checkpointing: bool) -> Any:
    """Unsloth's PeftModel with the weights that the run starts from.

    Args:
        checkpointing: recompute activations in the backward pass, in Unsloth's way.
    """
    config = stage.config
    longest = max(int(part.lengths.max()) for part in (stage.data, stage.eval_data) if part is not None)
    if stage.method == "dpo":  # a pair's lengths count the prompt and both responses
        longest = max(
            len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))
            for part in (stage.data, stage.eval_data)
            for p in (part.examples if part else ())
        )
    limit = stage.base.model.max_seq_length
    if longest > limit:
        raise UserError(
            f"a row has {longest} tokens, and the model {limit} positions; Unsloth would cut it or stretch the positions.",
            f"Set max_length={limit}, or engine=fused.",
        )
    if stage.frozen and stage.base.load_in_4bit:
        below = compose(stage.frozen)
        model = _peft_model(stage.base.model, stage, checkpointing, below)
        AdapterStack(model).load(ADAPTER, below)
        goes_on_below(stage, max(w.a.shape[0] for w in below.values()), say)
    else:
        model = _peft_model(merged_below(stage, say), stage, checkpointing, None)
        start_as_fused(model, config, stage.base.dtype)
    return model


def _peft_model(model: Any, stage: Stage, checkpointing: bool, below: Mapping[str, LoraWeights] | None) -> Any:
    """``FastLanguageModel.get_peft_model`` with a fresh adapter, or one of the shape of the adapters below."""
    from unsloth import FastLanguageModel

    config = stage.config
    shape: dict[str, Any] = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "target_modules": linear_names(model)
        if isinstance(config.lora_target_modules, str)
        else list(config.lora_target_modules),
    }
    if below is not None:
        ranks = {module: w.a.shape[0] for module, w in below.items()}
        rank = max(ranks.values())
        others = {module: r for module, r in ranks.items() if r != rank}
        shape = {
            "r": rank,
            "lora_alpha": rank,  # composed weights have their scale in B
            "rank_pattern": others,
            "alpha_pattern": others,
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
        }
    made = FastLanguageModel.get_peft_model(
        model,
        **shape,
        lora_dropout=config.lora_dropout if stage.method == "sft" else 0.0,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=config.seed,
    )
    if below is not None and {name for name, layer in AdapterStack(made).lora_layers()} != below.keys():
        raise UserError(
            "the adapters below reach some layers only, in a pattern that Unsloth's adapter cannot have.",
            "Set engine=fused.",
        )
    return made


def linear_names(model: nn.Module) -> list[str]:
    """What PEFT's ``all-linear`` means: the last part of the names of all linear layers but the head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    )


def unsloth_version() -> str:
    return version("unsloth")
