"""How the decoder computes a step, and the weights of one layer, read from the Hugging Face module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..ops.dropout import DropoutKey
from ..ops.lora import LinearGroup, LoraPair, cast_adapters
from ..ops.rms_norm import Norm
from ..ops.segments import SegmentTable
from .dequant_buffer import ScratchMode
from .families import PARENTS, family_of, layer_windows

if TYPE_CHECKING:
    from .activation_offload import ActivationOffload
    from .weight_streaming import WeightStreamer

Keep = Literal["input", "attention", "all"]
Reference = Literal["together", "own"]
QKV, OUT, GATE_UP, DOWN = range(4)


@dataclass(frozen=True)
class ExecutionConfig:
    """Settings that change memory and speed of a step, and its result only by rounding, but for ``int8``.

    Attributes:
        micro_tokens: tokens of a micro-batch at most (one example at least).
        keep: what each layer keeps for its backward pass, from the first layer to the last (see ``layer``).
        offload: the first so many layers keep it on the host (see ``activation_offload``).
        stream: the decoder layers' weights are on the host and are copied one layer ahead (see ``weight_streaming``).
        tile: tokens that the MLP takes at a time; None: all of a micro-batch.
        scratch: size of the buffer for dequantized weights (see ``dequant_buffer``).
        reference: a live DPO reference runs in the policy's pass (``together``) or in its own before it.
        threads: CPU threads, which decide the order of sums there.
        int8: products with the frozen matrices are in int8 (see ``int8``), not in the compute dtype.
    """

    micro_tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    reference: Reference = "together"
    threads: int = 1
    int8: bool = False


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights.

    Attributes:
        sites: linear layers that read the same input: q, k, v; o; gate, up; down.
        norms: before the attention, and before the MLP.
        post_norms: of the attention's projected output, and of the MLP's, before each is added to the residual; (): none.
        head_norms: of the heads of q, and of k, before the rotation; (): none.
        heads, kv_heads, head_dim: of the attention.
        scale: factor of the attention scores.
        activation: of the MLP's gate (see ``ops.swiglu``).
        index: of the layer.
    """

    sites: tuple[LinearGroup, ...]
    norms: tuple[Norm, ...]
    post_norms: tuple[Norm, ...]
    head_norms: tuple[Norm, ...]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    activation: str
    index: int = 0

    def cast(self, dtype: torch.dtype) -> Layer:
        """With copies of the adapters in the compute dtype, for one pass."""
        return replace(self, sites=cast_adapters(self.sites, dtype))


@dataclass(frozen=True)
class ForwardContext:
    """Inputs that layers of one forward pass share.

    Attributes:
        table: which queries see which keys.
        cos, sin: [T, rotated channels of a head], in the compute dtype; None: q and k are not rotated.
        q_scale: [T, 1, 1], factor of the rotated q; None: 1.
        mlp_chunk: tokens that the MLP takes at a time; None: all.
        offload: moves kept tensors to the host; None: they stay on the device.
        stream: copies the layers' weights to the device; None: they are there.
    """

    table: SegmentTable
    cos: Tensor | None
    sin: Tensor | None
    q_scale: Tensor | None = None
    mlp_chunk: int | None = None
    offload: ActivationOffload | None = None
    stream: WeightStreamer | None = None


def layer_contexts(
    model: Any, x: Tensor, positions: Tensor, segments: Sequence[Any], starts: Tensor, **shared: Any
) -> list[ForwardContext]:
    """The context of each layer; layers with the same window and rotation have the same one.

    Args:
        model: the Hugging Face decoder, embeddings to final norm.
        x: [T, D], its dtype and device.
        positions: [T].
        segments, starts: of the batch (``data.batch``).
        shared: other fields of ``ForwardContext``.
    """
    family, windows = family_of(model.config), layer_windows(model.config)
    rotations = family.rotations(model.config)
    if family.q_scale is not None:
        shared["q_scale"] = family.q_scale(model.config, positions).to(x.dtype)[:, None, None]
    angles: dict[Any, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}
    for rotation in set(rotations):
        if rotation is not None:
            cos, sin = model.rotary_emb(x, positions[None], *rotation)
            angles[rotation] = cos[0].to(x.dtype), sin[0].to(x.dtype)
    tables = {window: SegmentTable.build(segments, window, starts) for window in set(windows)}
    contexts = {(w, r): ForwardContext(tables[w], *angles[r], **shared) for w, r in set(zip(windows, rotations))}
    return [contexts[kind] for kind in zip(windows, rotations, strict=True)]


def norm_of(module: Any, config: Any) -> Norm:
    """A Hugging Face RMSNorm of a model with this configuration."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return Norm(module.weight, eps, family_of(config).norm_offset)


def layer_of(
    module: Any,
    pairs_of: Callable[[Any, int], list[LoraPair]],
    key: DropoutKey | None,
    *,
    index: int,
    stream: WeightStreamer | None = None,
    of_sites: Sequence[Mapping[str, Any]] = ({},) * 4,
) -> Layer:
    """Read a Hugging Face decoder layer.

    Args:
        module: the decoder layer of one of ``families``; linear layers plain, 4-bit, or wrapped by PEFT.
        pairs_of: (linear layer, index of the projection within its site) → the adapters that are on.
        key: of LoRA dropout, or None.
        index: of the layer.
        stream: holds its matrices, if they are streamed from the host.
        of_sites: other fields of each site.
    """
    attention = module.self_attn
    family = family_of(attention.config)
    sites = []
    for place, names in enumerate(family.sites):
        weights, biases, outs, pairs = [], [], [], []
        for projection, name in enumerate(names):
            linear = getattr(getattr(module, PARENTS[place]), name)
            inner = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
            weights.append(inner.weight if stream is None else stream.on_device(inner.weight))
            biases.append(inner.bias)
            outs.append(inner.out_features)
            pairs += pairs_of(linear, projection)
        dropout = None if key is None else key.at(index, place)
        fields = tuple(weights), tuple(biases), tuple(outs), tuple(pairs), dropout
        sites.append(LinearGroup(*fields, **of_sites[place]))

    def norms(parent: Any, names: tuple[str, ...]) -> tuple[Norm, ...]:
        return tuple(norm_of(getattr(parent, name), attention.config) for name in names)

    return Layer(
        sites=tuple(sites),
        norms=norms(module, family.norms),
        post_norms=norms(module, family.post_norms),
        head_norms=norms(attention, family.head_norms),
        heads=attention.config.num_attention_heads,
        kv_heads=attention.config.num_key_value_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        activation=family.activation,
        index=index,
    )
