"""The weights and settings of a decoder layer, read from the Hugging Face module (the families of ``families``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..ops.attention import SegmentTable
from ..ops.lora import LinearGroup
from .activation_offload import ActivationOffload
from .weight_streaming import WeightStreamer

Keep = Literal["input", "attention", "all"]
QKV, OUT, GATE_UP, DOWN = range(4)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's weight [D], frozen, and its epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights.

    Attributes:
        sites: linear layers that read the same input: q, k, v; o; gate, up; down.
        norms: before the attention, before the MLP.
        heads, kv_heads, head_dim: of the attention.
        scale: factor of the attention scores.
        index: of the layer.
    """

    sites: tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]
    norms: tuple[Norm, Norm]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    index: int = 0

    @property
    def trained(self) -> list[Tensor]:
        return [tensor for site in self.sites for tensor in site.trained]


@dataclass(frozen=True)
class ForwardContext:
    """Inputs that the layers of one forward pass share.

    Attributes:
        table: which queries see which keys; one for each sliding window.
        cos, sin: [T, head_dim], in the compute dtype.
        mlp_chunk: tokens that the MLP takes at a time; None: all.
        offload: moves kept tensors to the host; None: they stay on the device.
        stream: copies the layers' weights to the device; None: they are there.
    """

    table: SegmentTable
    cos: Tensor
    sin: Tensor
    mlp_chunk: int | None = None
    offload: ActivationOffload | None = None
    stream: WeightStreamer | None = None


def layer_of(
    module: Any, stack_of: Any, dropout_of: Any, *, index: int = 0, stream: WeightStreamer | None = None
) -> Layer:
    """Read a Hugging Face decoder layer.

    Args:
        module: a MistralDecoderLayer, LlamaDecoderLayer or Qwen2DecoderLayer; linear layers plain, 4-bit, or wrapped by PEFT.
        stack_of: (linear layer, index of the projection within its site) → the LoraPairs that are on.
        dropout_of: index of the site → its DropoutKey, or None.
        index: of the layer.
        stream: holds its matrices, if they are streamed from the host.
    """
    attention, mlp = module.self_attn, module.mlp
    modules: Sequence[tuple[Any, ...]] = (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )
    sites = []
    for place, linears in enumerate(modules):
        inner = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in linears]
        sites.append(
            LinearGroup(
                tuple(m.weight if stream is None else stream.on_device(m.weight) for m in inner),
                tuple(m.bias for m in inner),
                tuple(m.out_features for m in inner),
                tuple(pair for index, m in enumerate(linears) for pair in stack_of(m, index)),
                dropout_of(place),
            )
        )
    norms = (module.input_layernorm, module.post_attention_layernorm)
    head_dim = attention.head_dim
    return Layer(
        (sites[0], sites[1], sites[2], sites[3]),
        (Norm(norms[0].weight, norms[0].variance_epsilon), Norm(norms[1].weight, norms[1].variance_epsilon)),
        sites[0].outs[0] // head_dim,
        sites[0].outs[1] // head_dim,
        head_dim,
        attention.scaling,
        index,
    )
