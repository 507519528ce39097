"""What a run will compute, as far as memory and time depend on it: known before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from ..config.load import Method, RunConfig
from ..model.families import ATTENTION, MLP, family_of, head_width
from ..ops.dispatch import Widths

Storage = Literal["nf4", "nf4 nested", "dense"]
# the decoder layer's inputs, and the projections that read each (``layer``: q, k, v; o; gate, up; down)
SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PROJECTIONS = tuple(name for site in SITES for name in site)
PARENT = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, read from its Hugging Face configuration; other families' get what they lack by convention.

    Attributes:
        windows: how many keys back a query of each layer sees, None: all; (): all in every layer.
        biases: the projections that have one.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    biases: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Shape:
        # engine trl takes families whose configurations lack some of these names
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_width(config),
            vocabulary=getattr(config, "vocab_size", 0),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=family_of(config).windows(config),
            biases=family_of(config).biases(config),
        )

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def widths(self) -> Widths:
        """What kernels are compiled for."""
        rotated = self.heads + self.kv_heads
        return Widths(self.hidden, self.inner, self.queries, rotated, self.head_dim, self.vocabulary)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's projections: name → (out, in)."""
        d, q, k, i = self.hidden, self.queries, self.keys, self.inner
        sizes = ((q, d), (k, d), (k, d), (d, q), (i, d), (i, d), (d, i))
        return dict(zip(PROJECTIONS, sizes))

    @property
    def layer_weights(self) -> int:
        """Numbers in a layer's projections."""
        return sum(out * width for out, width in self.matrices.values())

    @property
    def head_weights(self) -> int:
        """Numbers in the output head, and as many in the embedding."""
        return self.vocabulary * self.hidden


# a layer's ranks: projection → rank, as pairs, so that it can be hashed
Ranks = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of the stack.

    Attributes:
        ranks: of its projections, layer by layer.
        scale: alpha / r, of all its projections (of a file whose modules differ: of the first).
        trained: whether it is the one under training.
    """

    ranks: tuple[Ranks, ...]
    scale: float = 1.0
    trained: bool = False

    @classmethod
    def fresh(cls, shape: Shape, r: int, alpha: float, targets: Sequence[str] | str) -> AdapterSpec:
        """The adapter under training, as ``AdapterStack.add_trainable`` will make it."""
        wanted = PROJECTIONS if isinstance(targets, str) else tuple(targets)
        layers = []
        for index in range(shape.layers):
            names = {n: f"model.layers.{index}.{PARENT[n]}.{n}" for n in PROJECTIONS}
            reached = (n for n in PROJECTIONS if any(names[n] == t or names[n].endswith("." + t) for t in wanted))
            layers.append(tuple((n, r) for n in reached))
        return cls(tuple(layers), alpha / r, trained=True)

    @classmethod
    def read(cls, shape: Shape, modules: Mapping[str, Any]) -> AdapterSpec:
        """A frozen adapter from its file: ``modules`` maps a module's name to weights with ``a`` [r, in] and ``scale``."""
        layers: list[dict[str, int]] = [{} for _ in range(shape.layers)]
        scale = 1.0
        for module, weights in modules.items():
            place = re.search(r"\.layers\.(\d+)\..*?(\w+)$", module)
            if place and int(place[1]) < shape.layers and place[2] in PROJECTIONS:
                layers[int(place[1])][place[2]] = weights.a.shape[0]
                scale = weights.scale
        return cls(tuple(tuple(sorted(r.items(), key=lambda p: PROJECTIONS.index(p[0]))) for r in layers), scale)

    def frozen(self) -> AdapterSpec:
        """The same, as an adapter below."""
        return replace(self, trained=False)

    def tensors(self, shape: Shape) -> list[int]:
        """Numbers in each A and B, layer by layer."""
        found = []
        for ranks in self.ranks:
            for name, r in ranks:
                out, width = shape.matrices[name]
                found += [r * width, out * r]
        return found


@dataclass(frozen=True)
class Workload:
    """What is planned.

    Attributes:
        shape: of the base.
        dtype: of the computation.
        storage: of the base's projections; ``dense``: in the computation's dtype.
        adapters: from the bottom up; the last one is trained.
        optim: the configuration's word.
        dropout: whether the trained adapter has dropout.
        method: sft or dpo.
        longest: tokens of the longest example (a pair: prompt and both responses); it must run at once.
        targets: the share of tokens that are predicted under supervision, at most.
        keys: keys that attention gathers, a token (a pair's prompt stands there twice).
        segment: tokens of one sequence on average, for the time that attention takes.
        step_tokens: of one optimizer step, on average; None: not known.
        step_most: of the largest step; None: not known.
        run_tokens: of all steps; None: not known.
        steps: of the run; None: not known.
        live_reference: a DPO reference runs beside the policy.
        engine: whose layers run.
    """

    shape: Shape
    dtype: torch.dtype
    storage: Storage
    adapters: tuple[AdapterSpec, ...]
    optim: str
    dropout: bool
    method: Method
    longest: int
    targets: float = 1.0
    keys: float = 1.0
    segment: int | None = None
    step_tokens: int | None = None
    step_most: int | None = None
    run_tokens: int | None = None
    steps: int | None = None
    live_reference: bool = False
    engine: str = "fused"

    @cached_property
    def trained_tensors(self) -> list[int]:
        """Numbers in each trained tensor."""
        return [n for adapter in self.adapters if adapter.trained for n in adapter.tensors(self.shape)]

    @cached_property
    def parameters(self) -> int:
        """Numbers under training."""
        return sum(self.trained_tensors)

    @cached_property
    def ranks(self) -> list[int]:
        """Of each layer: all adapters' ranks on all projections, summed."""
        return [sum(r for a in self.adapters for _, r in a.ranks[i]) for i in range(self.shape.layers)]

    @cached_property
    def kind_of(self) -> list[int]:
        """Layers that carry the same adapters are of one kind: each layer's, by number."""
        found: dict[Any, int] = {}
        return [
            found.setdefault(tuple(a.ranks[i] for a in self.adapters), len(found)) for i in range(self.shape.layers)
        ]

    @cached_property
    def kinds(self) -> dict[int, int]:
        """The first layer of each kind."""
        return {kind: self.kind_of.index(kind) for kind in set(self.kind_of)}

    @cached_property
    def gradient_bytes(self) -> dict[int, int]:
        """Of the float32 gradients of a layer of each kind."""
        sizes = self.shape.matrices
        return {
            kind: 4 * sum(r * sum(sizes[name]) for a in self.adapters if a.trained for name, r in a.ranks[layer])
            for kind, layer in self.kinds.items()
        }

    @cached_property
    def memo(self) -> dict[Any, Any]:
        """What was counted already."""
        return {}

    def at(self, **changes: Any) -> Workload:
        return replace(self, **changes)


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
    """The job of a configuration.

    Args:
        base_config: the base's Hugging Face configuration.
        dtype: of the computation.
        frozen: the modules of each frozen adapter below (see ``AdapterSpec.read``).
        storage: of the base; None: what the configuration asks for.
        rows: what is known of the rows: ``longest``, ``targets`` and the like (see ``Job``).
    """
    shape = Shape.of(base_config)
    if storage is None:
        nested = config.bnb_4bit_use_double_quant
        storage = ("nf4 nested" if nested else "nf4") if config.load_in_4bit else "dense"
    targets = config.lora_target_modules
    adapters = [AdapterSpec.read(shape, modules) for modules in frozen]
    adapters.append(AdapterSpec.fresh(shape, config.lora_r, config.lora_alpha, targets))
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


def longest_of(config: RunConfig, method: Method) -> int:
    """Tokens of the longest example that the configuration lets through: an SFT row; a pair's prompt with both
    responses, where the prompt is at least one token."""
    return config.max_length if method == "sft" else 2 * config.max_length - 1
