"""Several adapters as one, concatenated along the rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..errors import UserError
from .peft_io import AdapterFile, LoraWeights


class _Composed(Mapping[str, LoraWeights]):
    """The chain as one adapter; a module is concatenated when it is read."""

    def __init__(self, parts: dict[str, list[Mapping[str, LoraWeights]]]) -> None:
        self._parts = parts

    def __getitem__(self, module: str) -> LoraWeights:
        weights = [part[module] for part in self._parts[module]]
        a = torch.cat([w.a for w in weights], dim=0)
        b = torch.cat([w.b * w.scale for w in weights], dim=1)
        return LoraWeights(a, b, 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def compose(adapters: Sequence[AdapterFile]) -> Mapping[str, LoraWeights]:
    """One adapter that equals the sum of all: Σ sᵢ BᵢAᵢ = [s₁B₁ s₂B₂ …] @ [A₁; A₂; …].

    Returns:
        module name → LoraWeights with scale 1, float32; built at each access, so that memory holds one module at a time.

    Raises:
        UserError: two adapters change the same module with different shapes.
    """
    parts: dict[str, list[Mapping[str, LoraWeights]]] = defaultdict(list)
    shapes: dict[str, tuple[tuple[int, int], Path]] = {}
    for adapter in adapters:
        for module, weights in adapter.modules.items():
            shape, first = shapes.setdefault(module, (weights.shape, adapter.path))
            if shape != weights.shape:
                raise UserError(
                    f"{adapter.path}: {module} is {list(weights.shape)}, in {first} it is {list(shape)}.",
                    "The adapters were trained on different bases and cannot be stacked.",
                )
            parts[module].append(adapter.modules)
    return _Composed({module: parts[module] for module in sorted(parts)})
