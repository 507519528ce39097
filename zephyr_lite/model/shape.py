"""A decoder's sizes, read from its Hugging Face configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..ops.dispatch import Widths
from .families import family_of, head_width

# the decoder layer's inputs, and the projections that read each (``layer``: q, k, v; o; gate, up; down)
SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
PROJECTIONS = tuple(name for site in SITES for name in site)


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; other families' get what they lack by convention.

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
        """The widths that kernels are compiled for."""
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
