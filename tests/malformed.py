"""An adapter for one module of the tiny base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.self_attn.q_proj"


def make_adapter(folder: Path, *, shape: tuple[int, int] = (64, 64), value: float = 0.01, **config: Any) -> Path:
    """A PEFT adapter of rank 2."""
    folder.mkdir()
    tensors = {"A": torch.full((2, shape[1]), value), "B": torch.full((shape[0], 2), value)}
    names = {f"base_model.model.{MODULE}.lora_{side}.weight": tensor for side, tensor in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps({**told, **config}))
    return folder
