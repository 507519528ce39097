"""The decoder families that the fused engine knows, their differences, and the sizes of a decoder.

All are one layer (``layer``): RMSNorm, q, k and v, rotary embeddings, grouped queries, a gated MLP. The decoder, the planner
and the GGUF export read the differences here. docs/extending.md shows how to add a family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from ..ops.dispatch import Widths

# further arguments of the Hugging Face rotary embedding for a layer, beside the positions; None: q and k are not rotated
Rotation = tuple[str, ...] | None
# the decoder layer's inputs: the module of the matrices that read each, and the matrices' names in most families
PARENTS = ("self_attn", "self_attn", "mlp", "mlp")
SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
ATTENTION, MLP = (*SITES[0], *SITES[1]), (*SITES[2], *SITES[3])


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        windows: configuration → sliding window of each layer, in keys; None: all keys. Raises ValueError for a kind of layer
            that the decoder does not know.
        biases: configuration → the projections that have a bias.
        rotations: configuration → ``Rotation`` of each layer.
        activation: of the MLP's gate, by transformers' name.
        norms: the modules before the attention and before the MLP.
        post_norms: those of their outputs, before each is added to the residual.
        head_norms: those of q's and k's heads, before the rotation.
        norm_offset: norms multiply by 1 + weight, and round once.
        sites: the matrices that read each of the layer's inputs: q, k, v; o; gate, up; down. One matrix may be several.
        q_scale: (configuration, positions) → factor of each position's queries, after the rotation.
        gguf: llama.cpp's name of the architecture.
        neighbours: llama.cpp rotates channel i of a head with i + 1, transformers with i + head_dim / 2: the export permutes
            the rows of q and k.
        rope_factors: llama.cpp reads factors for the rotary frequencies from a file of this architecture.
    """

    windows: Callable[[Any], tuple[int | None, ...]]
    biases: Callable[[Any], tuple[str, ...]] = lambda config: ()
    rotations: Callable[[Any], tuple[Rotation, ...]] = lambda config: ((),) * config.num_hidden_layers
    activation: str = "silu"
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    post_norms: tuple[str, ...] = ()
    head_norms: tuple[str, ...] = ()
    norm_offset: bool = False
    sites: tuple[tuple[str, ...], ...] = SITES
    q_scale: Callable[[Any, Tensor], Tensor] | None = None
    gguf: str = "llama"
    neighbours: bool = True
    rope_factors: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        """The names of a layer's matrices."""
        return tuple(name for site in self.sites for name in site)


def _one_window(config: Any) -> tuple[int | None, ...]:
    return (config.sliding_window,) * config.num_hidden_layers


def _by_layer_type(config: Any) -> tuple[int | None, ...]:
    """From ``layer_types``, which transformers derives from use_sliding_window and max_window_layers."""
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    if others := set(config.layer_types) - set(known):
        raise ValueError(f"layer_types has {', '.join(sorted(others))}; known are {' and '.join(known)}")
    if config.sliding_window is None and "sliding_attention" in config.layer_types:
        raise ValueError(
            "layer_types has sliding_attention, and there is no sliding_window (or use_sliding_window is false)"
        )
    return tuple(known[kind] for kind in config.layer_types)


def _by_keys(config: Any) -> tuple[str, ...]:
    attention = ATTENTION if getattr(config, "attention_bias", False) else ()
    return (*attention, *(MLP if getattr(config, "mlp_bias", False) else ()))


def _by_position(config: Any, positions: Tensor) -> Tensor:
    """Llama 4's scaling of the attention: 1 up to the length of the pretraining."""
    rope = config.rope_parameters
    past = (positions / rope["original_max_position_embeddings"]).floor()
    return 1 + rope["llama_4_scaling_beta"] * (1 + past).log()


FAMILIES = {
    "mistral": Family(windows=_one_window),
    "llama": Family(
        windows=lambda config: (None,) * config.num_hidden_layers,  # whatever its sliding_window says
        biases=_by_keys,
    ),
    "qwen2": Family(
        windows=_by_layer_type,
        biases=lambda config: ATTENTION[:3],  # whatever its attention_bias says
        gguf="qwen2",
        neighbours=False,
        rope_factors=False,
    ),
    "qwen3": Family(
        windows=_by_layer_type,
        biases=_by_keys,
        head_norms=("q_norm", "k_norm"),
        gguf="qwen3",
        neighbours=False,
        rope_factors=False,
    ),
    "ministral3": Family(windows=_one_window, q_scale=_by_position, gguf="mistral3"),
    "phi3": Family(
        windows=_one_window,
        sites=(("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
        gguf="phi3",
        neighbours=False,
        rope_factors=False,
    ),
    "smollm3": Family(
        windows=_by_layer_type,
        biases=_by_keys,
        rotations=lambda config: tuple(() if on else None for on in config.no_rope_layers[: config.num_hidden_layers]),
        gguf="smollm3",
        rope_factors=False,
    ),
    "gemma3_text": Family(
        windows=_by_layer_type,
        biases=_by_keys,
        rotations=lambda config: tuple((kind,) for kind in config.layer_types),
        activation="gelu_pytorch_tanh",
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
        head_norms=("q_norm", "k_norm"),
        norm_offset=True,
        gguf="gemma3",
        neighbours=False,
        rope_factors=False,
    ),
}
NAMES = " and ".join((", ".join([*FAMILIES][:-1]), [*FAMILIES][-1]))


def family_of(config: Any) -> Family:
    """The family of a configuration; a default for models that the decoder does not know (engine ``trl`` takes any)."""
    return FAMILIES.get(getattr(config, "model_type", ""), FAMILIES["llama"])


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Sliding window of each layer, in keys; None: all of the segment."""
    return family_of(config).windows(config)


def head_width(config: Any) -> int:
    """Channels of a head; some configurations have no ``head_dim``."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; other families' get what they lack by convention.

    Attributes:
        windows: how many keys back a query of each layer sees, None: all; (): all in every layer.
        biases: the projections that have one.
        family: what else the layer computes.
        rotary: channels of a head that are rotated; 0: all.
        tables: of rotary angles, which all layers share.
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
    family: Family = FAMILIES["llama"]
    rotary: int = 0
    tables: int = 1

    @classmethod
    def of(cls, config: Any) -> Shape:
        # engine trl takes families whose configurations lack some of these names
        heads, rope = config.num_attention_heads, getattr(config, "rope_parameters", None) or {}
        return cls(
            hidden=config.hidden_size,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_width(config),
            vocabulary=getattr(config, "vocab_size", 0),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=layer_windows(config),
            biases=family_of(config).biases(config),
            family=family_of(config),
            rotary=int(head_width(config) * rope.get("partial_rotary_factor", 1.0)),
            tables=len(set(family_of(config).rotations(config)) - {None}),
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
        rotated, family = self.heads + self.kv_heads, self.family
        sizes = (self.hidden, self.inner, self.queries, rotated, self.head_dim, self.vocabulary)
        return Widths(*sizes, family.activation, family.norm_offset, bool(family.head_norms), self.rotary)

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's projections: name → (out, in)."""
        d, q, k, i = self.hidden, self.queries, self.keys, self.inner
        sizes = dict(zip((*ATTENTION, *MLP), ((q, d), (k, d), (k, d), (d, q), (i, d), (i, d), (d, i))))
        sizes |= {"qkv_proj": (q + 2 * k, d), "gate_up_proj": (2 * i, d)}
        return {name: sizes[name] for name in self.family.projections}

    @property
    def layer_weights(self) -> int:
        """Numbers in a layer's projections."""
        return 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.inner

    @property
    def head_weights(self) -> int:
        """Numbers in the output head, and as many in the embedding."""
        return self.vocabulary * self.hidden
