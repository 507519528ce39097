"""Several adapters as one, concatenated along the rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from ..errors import UserError
from .peft_io import AdapterFile, LoraWeights


def compose(adapters: Sequence[AdapterFile]) -> dict[str, LoraWeights]:
    """One adapter that equals the sum of all: Σ sᵢ BᵢAᵢ = [s₁B₁ s₂B₂ …] @ [A₁; A₂; …].

    Returns:
        module name → LoraWeights with scale 1, float32.

    Raises:
        UserError: two adapters change the same module with different shapes.
    """
    parts: dict[str, list[LoraWeights]] = defaultdict(list)
    for adapter in adapters:
        for module, weights in adapter.modules.items():
            parts[module].append(weights)
            if (shape := parts[module][0].shape) != weights.shape:
                raise UserError(
                    f"{adapter.path}: {module} is {list(weights.shape)}, in an adapter below it {list(shape)}.",
                    "The adapters were trained on different bases and cannot be stacked.",
                )
    return {
        module: LoraWeights(torch.cat([w.a for w in found]), torch.cat([w.b * w.scale for w in found], dim=1), 1.0)
        for module, found in sorted(parts.items())
    }
