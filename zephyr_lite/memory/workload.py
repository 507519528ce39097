"""The sizes of a run that its memory and time depend on, known before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ..config.load import Method, RunConfig
from ..model.base import quantization_of
from ..model.families import ATTENTION, MLP, PROJECTIONS, SITES, Shape

Storage = Literal["nf4", "nf4 nested", "dense"]
PARENT = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of the stack."""

    ranks: tuple[dict[str, int], ...]  # projection → rank, layer by layer
    trained: bool = False  # whether it is the one under training

    @classmethod
    def fresh(
        cls, shape: Shape, r: int, targets: Sequence[str] | str = "all-linear", *, trained: bool = True
    ) -> AdapterSpec:
        """An adapter as ``AdapterStack.add_trainable`` makes it."""
        layers: list[dict[str, int]] = []
        for index in range(shape.layers):
            full = {name: f".model.layers.{index}.{PARENT[name]}.{name}" for name in PROJECTIONS}
            suffixes = tuple(f".{target}" for target in (PROJECTIONS if isinstance(targets, str) else targets))
            layers.append({name: r for name, path in full.items() if path.endswith(suffixes)})
        return cls(tuple(layers), trained)

    @classmethod
    def read(cls, shape: Shape, modules: Mapping[str, Any]) -> AdapterSpec:
        """A frozen adapter from its file: ``modules`` maps a module's name to weights with ``a`` [r, in]."""
        layers: list[dict[str, int]] = [{} for _ in range(shape.layers)]
        for module, weights in modules.items():
            place = re.search(r"\.layers\.(\d+)\..*?(\w+)$", module)
            if place and int(place[1]) < shape.layers and place[2] in PROJECTIONS:
                layers[int(place[1])][place[2]] = weights.a.shape[0]
        return cls(tuple(layers))

    def tensors(self, shape: Shape) -> list[int]:
        """Numbers in each A and B, layer by layer."""
        sizes = [(r, shape.matrices[name]) for layer in self.ranks for name, r in layer.items()]
        return [n for r, (out, width) in sizes for n in (r * width, out * r)]


@dataclass(frozen=True)
class Workload:
    """What a stage computes."""

    shape: Shape  # of the base
    dtype: torch.dtype  # of the computation
    storage: Storage  # of the base's projections; ``dense``: in the computation's dtype
    adapters: tuple[AdapterSpec, ...]  # from the bottom up; the last one is trained
    optim: str  # the optimizer's name in the configuration
    dropout: bool  # whether the trained adapter has dropout
    method: Method  # sft or dpo
    longest: int  # tokens of the longest example (a pair: prompt and both responses); it runs at once
    targets: float = 1.0  # the largest share of a micro-batch's tokens that are supervised
    keys: float = 1.0  # keys that attention gathers per token (a pair's prompt is gathered twice)
    segment: int | None = None  # tokens of one sequence on average, for the time that attention takes
    step_tokens: int | None = None  # of one optimizer step, on average; None: unknown
    step_most: int | None = None  # of the largest step; None: unknown
    run_tokens: int | None = None  # of all steps; None: unknown
    steps: int | None = None  # of the run; None: unknown
    live_reference: bool = False  # a DPO reference runs beside the policy
    engine: str = "fused"  # fused, trl or unsloth

    @cached_property
    def trained_tensors(self) -> tuple[int, ...]:
        """Numbers in each trained tensor."""
        return tuple(n for adapter in self.adapters if adapter.trained for n in adapter.tensors(self.shape))

    @cached_property
    def parameters(self) -> int:
        """Numbers under training."""
        return sum(self.trained_tensors)

    @cached_property
    def ranks(self) -> list[int]:
        """All adapters' ranks on all projections of each layer, summed."""
        return [sum(sum(a.ranks[i].values()) for a in self.adapters) for i in range(self.shape.layers)]

    @cached_property
    def site_ranks(self) -> list[tuple[int, int]]:
        """(rank of all adapters, rank of the trained one) on each site, of the layer that has most."""
        found = []
        for site in SITES:
            of_layers = [
                [sum(a.ranks[i].get(n, 0) for n in site) for a in self.adapters] for i in range(self.shape.layers)
            ]
            trained = [sum(r for r, a in zip(ranks, self.adapters) if a.trained) for ranks in of_layers]
            found.append((max(map(sum, of_layers)), max(trained)))
        return found

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """Values that were computed for this workload: the planner asks for the same ones thousands of times."""
        return {}


def make_workload(
    config: RunConfig,
    method: Method,
    base_config: Any,
    dtype: torch.dtype,
    *,
    frozen: Sequence[Mapping[str, Any]] = (),
    storage: Storage | None = None,
    **rows: Any,
) -> Workload:
    """The workload of a configuration.

    Args:
        base_config: the base's Hugging Face configuration.
        dtype: of the computation.
        frozen: the modules of each frozen adapter below (see ``AdapterSpec.read``).
        storage: of the base; None: as configured.
        rows: fields of ``Workload`` that describe the rows: ``longest``, ``targets``, ``step_tokens`` ...
    """
    shape = Shape.of(base_config)
    if storage is None:
        nested = config.bnb_4bit_use_double_quant
        storage = ("nf4 nested" if nested else "nf4") if config.load_in_4bit else "dense"
    adapters = [AdapterSpec.read(shape, modules) for modules in frozen]
    adapters.append(AdapterSpec.fresh(shape, config.lora_r, config.lora_target_modules))
    rows.setdefault("longest", longest_of(config, method))
    if method == "dpo":
        rows.setdefault("keys", 4 / 3)  # a prompt as long as each response
    return Workload(
        shape=shape,
        dtype=dtype,
        storage=storage,
        adapters=tuple(adapters),
        optim=config.optim,
        dropout=config.lora_dropout > 0,
        method=method,
        live_reference=method == "dpo" and not config.precompute_ref_log_probs,
        engine=config.engine,
        **rows,
    )


def storage_of(config: RunConfig, base_config: Any, folder: Path, dtype: torch.dtype) -> Storage:
    """How the base's projections are stored.

    Raises:
        UserError: the base is stored quantized in another way than NF4.
    """
    stored = getattr(base_config, "quantization_config", None)
    _, four_bit, nested = quantization_of(config, stored, folder, dtype)
    return "dense" if not four_bit else "nf4 nested" if nested else "nf4"


def longest_of(config: RunConfig, method: Method) -> int:
    """Tokens of the longest example that the configuration lets through: an SFT row; a pair's prompt with both
    responses, where the prompt is at least one token."""
    return config.max_length if method == "sft" else 2 * config.max_length - 1
