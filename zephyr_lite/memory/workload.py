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
from ..model.families import PARENTS, Shape
from ..model.peft_io import AdapterFile

Storage = Literal["nf4", "nf4 nested", "dense"]


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
        suffixes = tuple(f".{target}" for target in (shape.matrices if isinstance(targets, str) else targets))
        places = [(f"{parent}.{name}", name) for parent, site in zip(PARENTS, shape.family.sites) for name in site]
        names = [f".model.layers.{index}." for index in range(shape.layers)]
        layers = ({name: r for place, name in places if f"{at}{place}".endswith(suffixes)} for at in names)
        return cls(tuple(layers), trained)

    @classmethod
    def read(cls, shape: Shape, modules: Mapping[str, Any]) -> AdapterSpec:
        """A frozen adapter from its file: ``modules`` maps a module's name to weights with ``a`` [r, in]."""
        layers: list[dict[str, int]] = [{} for _ in range(shape.layers)]
        for module, weights in modules.items():
            place = re.search(r"\.layers\.(\d+)\..*?(\w+)$", module)
            if place and int(place[1]) < shape.layers and place[2] in shape.matrices:
                layers[int(place[1])][place[2]] = weights.a.shape[0]
        return cls(tuple(layers))

    def tensors(self, shape: Shape) -> list[int]:
        """Numbers in each A and B, layer by layer."""
        sizes = ((r, shape.matrices[name]) for layer in self.ranks for name, r in layer.items())
        return [n for r, (out, width) in sizes for n in (r * width, out * r)]


@dataclass(frozen=True, eq=False)  # hashed by identity: the planner's caches have it as a key
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
    epochs: float | None = None  # how often the run trains on each example, on average; None: unknown
    live_reference: bool = False  # a DPO reference runs beside the policy
    cached_reference: bool = False  # a DPO reference is computed before the first step
    mismatched: bool = False  # before a step policy and reference run on as many tokens, without gradients (kto)
    engine: str = "fused"  # fused, trl or unsloth
    int8: bool = False  # products with the base are in int8

    @cached_property
    def trained_tensors(self) -> tuple[int, ...]:
        """Numbers in each trained tensor."""
        return tuple(size for adapter in self.adapters if adapter.trained for size in adapter.tensors(self.shape))

    @property
    def parameters(self) -> int:
        """Numbers under training."""
        return sum(self.trained_tensors)

    @cached_property
    def ranks(self) -> list[int]:
        """All adapters' ranks on all projections of each layer, summed."""
        return [
            sum(sum(adapter.ranks[index].values()) for adapter in self.adapters) for index in range(self.shape.layers)
        ]

    @cached_property
    def site_ranks(self) -> list[tuple[int, int]]:
        """(rank of all adapters, rank of the trained one) on each site, of the layer that has most."""
        found = []
        for site in self.shape.family.sites:
            layers = range(self.shape.layers)
            all_ranks, trained = (
                [sum(a.ranks[i].get(name, 0) for a in adapters for name in site) for i in layers]
                for adapters in (self.adapters, [a for a in self.adapters if a.trained])
            )
            found.append((max(all_ranks), max(trained)))
        return found


def make_workload(
    config: RunConfig,
    method: Method,
    base_config: Any,
    dtype: torch.dtype,
    *,
    frozen: Sequence[AdapterFile] = (),
    **fields: Any,
) -> Workload:
    """The workload of a configuration.

    Args:
        base_config: the base's Hugging Face configuration.
        dtype: of the computation.
        frozen: the adapters below.
        fields: others of ``Workload``, most of all those that describe the rows: ``longest``, ``targets``, ``step_tokens`` ...
    """
    shape = Shape.of(base_config)
    stored = getattr(base_config, "quantization_config", None)
    _, four_bit, nested = quantization_of(config, stored, Path(config.model_name_or_path), dtype)
    below = (AdapterSpec.read(shape, adapter.modules) for adapter in frozen)
    reference = method == "dpo" and config.needs_reference
    cached = reference and config.precompute_ref_log_probs is True
    return Workload(
        shape=shape,
        dtype=dtype,
        storage="dense" if not four_bit else "nf4 nested" if nested else "nf4",
        adapters=(*below, AdapterSpec.fresh(shape, config.lora_r, config.lora_target_modules)),
        optim=config.optim,
        dropout=config.lora_dropout > 0,
        method=method,
        live_reference=reference and not cached,
        cached_reference=cached,
        mismatched=config.row_kind(method) == "kto",
        engine=config.engine,
        int8=config.memory.int8,
        **fields,
    )


def longest_of(config: RunConfig, method: Method) -> int:
    """Tokens of the longest example that the configuration lets through: an SFT row; an answer with a label, and its prompt; a
    pair's prompt with both responses, where the prompt is at least one token."""
    return 2 * config.max_length - 1 if config.row_kind(method) == "dpo" else config.max_length
