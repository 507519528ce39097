"""What TRL's trainers train on: the base, the adapters below it, and the weights that a run starts from.

What TRL can do exactly with frozen adapters below: on a 16- or 32-bit base they are merged into it, and a fresh adapter
is trained. A 4-bit base cannot take a merge without rounding, and TRL copies only one adapter into its reference: there
the adapters below (composed into one, where there are several) are trained on at their own rank, against a frozen copy.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from ..config.load import RunConfig
from ..model.adapters import AdapterStack
from ..model.compose import compose
from ..model.peft_io import write_adapter
from ..train.stage import Say, Stage

ADAPTER = "default"  # the name that TRL looks for
REFERENCE = "ref"  # what it calls its frozen copy of it


def attach(stage: Stage, say: Say) -> tuple[Any, LoraConfig | None]:
    """The model to hand to TRL, and the adapter that TRL is to put on it, or None where the model brings its own."""
    config = stage.config
    if stage.frozen and stage.base.load_in_4bit:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "adapter"
            write_adapter(whole, compose(stage.frozen), base_model_name=str(stage.base.path))
            model = PeftModel.from_pretrained(stage.base.model, whole, is_trainable=True)
        goes_on_below(stage, model.peft_config[ADAPTER].r, say)
        return model, None
    fresh = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    return merged_below(stage, say), fresh


def merged_below(stage: Stage, say: Say) -> Any:
    """The base with the adapters below merged into it (16 or 32 bits), or as it is where there are none."""
    model: Any = stage.base.model
    if stage.frozen:
        names = ", ".join(str(a.path) for a in stage.frozen)
        say(
            f"TRL's reference is a plain model: {names} merged into the {stage.base.dtype} base, a fresh adapter on top"
        )
        for adapter in stage.frozen:
            model = PeftModel.from_pretrained(model, adapter.path).merge_and_unload()
        model.requires_grad_(False)
    return model


def goes_on_below(stage: Stage, rank: int, say: Say) -> None:
    """Say that the adapters below are trained on, and make the stage the owner of the whole chain."""
    say(
        f"TRL cannot leave a frozen adapter on under another in 4 bits: it trains "
        f"{', '.join(str(a.path) for a in stage.frozen)} on, at rank {rank} instead of lora_r {stage.config.lora_r}"
        + (", against a frozen copy" if stage.method == "dpo" else "")
    )
    stage.info["trl"].setdefault("continues", stage.info["adapters"])
    stage.info["adapters"] = []  # what is trained here is the whole chain
    stage.frozen = []


class Start:
    """An adapter's float32 weights, before TRL rounds them to bfloat16."""

    def __init__(self, model: Any) -> None:
        self.weights = AdapterStack(model).weights(ADAPTER)

    def put_back(self, model: Any, *, dropout: float) -> None:
        """Into the adapter and, where there is one, into TRL's reference copy of it."""
        for module, layer in AdapterStack(model).lora_layers():
            for name in layer.lora_A:
                layer.lora_A[name].float()
                layer.lora_B[name].float()
                with torch.no_grad():
                    layer.lora_A[name].weight.copy_(self.weights[module].a)
                    layer.lora_B[name].weight.copy_(self.weights[module].b)
            layer.lora_dropout[ADAPTER] = nn.Dropout(dropout) if dropout else nn.Identity()


def start_as_fused(model: Any, config: RunConfig, dtype: torch.dtype) -> None:
    """The fused engine's initial adapter (``AdapterStack.add_trainable``), in float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(config.seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        for side in (module.lora_A, module.lora_B):
            side[ADAPTER].to(wide)
        weight = module.lora_A[ADAPTER].weight
        fresh = torch.empty(weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            weight.copy_(fresh)
            module.lora_B[ADAPTER].weight.zero_()
