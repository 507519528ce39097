"""Several adapters as one, concatenated along the rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from ..errors import UserError
from .peft_io import AdapterFile, LazyModules, LoraWeights


def compose(adapters: Sequence[AdapterFile]) -> Mapping[str, LoraWeights]:
    """One adapter that equals the sum of all: Σ sᵢ BᵢAᵢ = [s₁B₁ s₂B₂ …] @ [A₁; A₂; …].

    Returns:
        module name → LoraWeights with scale 1, float32; built at each access, so that memory holds one module at a time.

    Raises:
        UserError: two adapters change the same module with different shapes.
    """
    parts: dict[str, list[AdapterFile]] = defaultdict(list)
    for adapter in adapters:
        for module, weights in adapter.modules.items():
            for first in parts[module][:1]:
                if (shape := first.modules[module].shape) != weights.shape:
                    raise UserError(
                        f"{adapter.path}: {module} is {list(weights.shape)}, in {first.path} it is {list(shape)}.",
                        "The adapters were trained on different bases and cannot be stacked.",
                    )
            parts[module].append(adapter)
    return LazyModules({module: partial(_concatenate, module, parts[module]) for module in sorted(parts)})


def _concatenate(module: str, adapters: Sequence[AdapterFile]) -> LoraWeights:
    weights = [adapter.modules[module] for adapter in adapters]
    a = torch.cat([w.a for w in weights], dim=0)
    b = torch.cat([w.b * w.scale for w in weights], dim=1)
    return LoraWeights(a, b, 1.0)
