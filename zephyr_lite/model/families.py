"""The families of decoders that the fused engine knows, and in what they differ.

All of them are one layer (``layer``): RMSNorm, q, k and v, rotary embeddings, grouped queries, a gated MLP with SiLU.
What a family says by keys of its own stands here, and is read by the decoder, the planner and the GGUF export.
docs/extending.md goes through it step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of transformers.

    Attributes:
        windows: configuration → how many keys back a query of each layer sees; None: all. Raises ValueError, in words,
            where a layer is of a kind that the decoder does not know.
        biases: configuration → the projections that have a bias.
        gguf: llama.cpp's name of the architecture.
        neighbours: llama.cpp turns channel i of a head together with i + 1, transformers with i + head_dim / 2: the rows
            of q and k are put in that order.
        rope_factors: llama.cpp reads factors for the rotary frequencies from a file of this architecture.
    """

    windows: Callable[[Any], tuple[int | None, ...]]
    biases: Callable[[Any], tuple[str, ...]]
    gguf: str = "llama"
    neighbours: bool = True
    rope_factors: bool = True


def _everything(config: Any) -> tuple[int | None, ...]:
    """A Llama ignores ``sliding_window``, wherever its configuration has it from."""
    return (None,) * config.num_hidden_layers


def _one_window(config: Any) -> tuple[int | None, ...]:
    return (config.sliding_window,) * config.num_hidden_layers


def _by_layer_type(config: Any) -> tuple[int | None, ...]:
    """``layer_types`` names each layer's; transformers fills it in from use_sliding_window and max_window_layers."""
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


FAMILIES = {
    "mistral": Family(windows=_one_window, biases=lambda config: ()),
    "llama": Family(windows=_everything, biases=_by_keys),
    "qwen2": Family(
        windows=_by_layer_type,
        biases=lambda config: ATTENTION[:3],  # whatever its attention_bias says
        gguf="qwen2",
        neighbours=False,
        rope_factors=False,
    ),
}
NAMES = " and ".join((", ".join([*FAMILIES][:-1]), [*FAMILIES][-1]))


def family_of(config: Any) -> Family:
    """The family of a configuration; of a model that the decoder does not know, what most have (engine ``trl`` takes any)."""
    return FAMILIES.get(getattr(config, "model_type", ""), Family(windows=_everything, biases=_by_keys))


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """How many keys back a query sees, layer by layer; None: all of its segment."""
    return family_of(config).windows(config)


def head_width(config: Any) -> int:
    """Channels of a head: ``head_dim``, which some families' configurations do not have."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
