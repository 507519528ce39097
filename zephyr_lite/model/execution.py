"""How the decoder computes a step, and the weights of one layer, read from the Hugging Face module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..ops.attention import SegmentTable
from ..ops.dropout import DropoutKey
from ..ops.lora import LinearGroup, LoraPair
from .dequant_buffer import ScratchMode

if TYPE_CHECKING:
    from .activation_offload import ActivationOffload
    from .weight_streaming import WeightStreamer

Keep = Literal["input", "attention", "all"]
Reference = Literal["together", "own"]
QKV, OUT, GATE_UP, DOWN = range(4)


@dataclass(frozen=True)
class ExecutionConfig:
    """Settings that change memory and speed of a step, and its result only by rounding.

    Attributes:
        micro_tokens: tokens of a micro-batch at most (one example at least).
        keep: what each layer keeps for its backward pass, from the first layer to the last (see ``layer``).
        offload: the first so many layers keep it on the host (see ``activation_offload``).
        stream: the decoder layers' weights are on the host and are copied one layer ahead (see ``weight_streaming``).
        tile: tokens that the MLP takes at a time; None: all of a micro-batch.
        scratch: size of the buffer for dequantized weights (see ``dequant_buffer``).
        reference: a live DPO reference runs in the policy's pass (``together``) or in its own before it.
        threads: CPU threads, which decide the order of sums there.
    """

    micro_tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    reference: Reference = "together"
    threads: int = 1


@dataclass(frozen=True)
class Layer:
    """A decoder layer's weights.

    Attributes:
        sites: linear layers that read the same input: q, k, v; o; gate, up; down.
        norms: frozen weight [D] and epsilon of the RMSNorm before the attention, and of the one before the MLP.
        heads, kv_heads, head_dim: of the attention.
        scale: factor of the attention scores.
        index: of the layer.
    """

    sites: tuple[LinearGroup, ...]
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    index: int = 0


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
    module: Any,
    pairs_of: Callable[[Any, int], list[LoraPair]],
    key: DropoutKey | None,
    *,
    index: int,
    stream: WeightStreamer | None = None,
) -> Layer:
    """Read a Hugging Face decoder layer.

    Args:
        module: a MistralDecoderLayer, LlamaDecoderLayer or Qwen2DecoderLayer; linear layers plain, 4-bit, or wrapped by PEFT.
        pairs_of: (linear layer, index of the projection within its site) → the adapters that are on.
        key: of LoRA dropout, or None.
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
        weights, biases, outs, pairs = [], [], [], []
        for projection, linear in enumerate(linears):
            inner = linear.get_base_layer() if hasattr(linear, "get_base_layer") else linear
            weights.append(inner.weight if stream is None else stream.on_device(inner.weight))
            biases.append(inner.bias)
            outs.append(inner.out_features)
            pairs += pairs_of(linear, projection)
        dropout = None if key is None else key.at(index, place)
        sites.append(LinearGroup(tuple(weights), tuple(biases), tuple(outs), tuple(pairs), dropout))
    first, second = module.input_layernorm, module.post_attention_layernorm
    return Layer(
        sites=tuple(sites),
        norms=((first.weight, first.variance_epsilon), (second.weight, second.variance_epsilon)),
        heads=sites[QKV].outs[0] // attention.head_dim,
        kv_heads=sites[QKV].outs[1] // attention.head_dim,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        index=index,
    )
