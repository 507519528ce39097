"""``fuse(model)``: the hand-written decoder layer inside other trainers, such as TRL's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any, get_args

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..data.batch import Segment
from ..errors import UserError
from ..ops.dispatch import check_kernels
from ..ops.dropout import DropoutKey
from ..ops.lora import LoraPair
from ..ops.nf4 import is_quantized
from ..ops.rms_norm import rms_norm
from ..ops.segments import segment_starts
from .base_folder import check_family
from .dequant_buffer import DequantBuffer, ScratchMode
from .execution import Keep, layer_contexts, layer_of, norm_of
from .families import Shape, layer_windows
from .layer import run_layer


def fuse(model: Any, *, keep: Keep | None = None, scratch: ScratchMode = "layer") -> Any:
    """Run a model's decoder layers with the hand-written layer, inside any trainer.

    The model is of one of the families that the fused engine knows (``families``).

    The base may be in 4 bits (bitsandbytes) or plain; adapters are PEFT's LoRA, attached before or after this call, and PEFT
    decides which are on and which is trained. Padding is removed before the first layer and put back as zeros after the last;
    rows packed into one stay apart where positions start again. LoRA dropout is a hash under a seed drawn from torch's
    generator. Generation with a cache, and forward passes that return attention weights or all hidden states, run as before.

    Args:
        model: a PeftModel, or a Hugging Face causal language model; changed in place.
        keep: tensors that a layer keeps for its backward pass (see ``layer``); None: ``input`` with gradient checkpointing,
            else ``all``.
        scratch: size of the buffer for dequantized weights (see ``dequant_buffer``).
    Returns:
        model.

    Raises:
        UserError: here and in a forward pass, for what the layer would compute wrongly: another architecture, trained weights
            that are no LoRA adapter's, hooks on the layers, other storage than plain or 4 bits, a mask that is not [B, T].
    """
    if keep not in (None, *get_args(Keep)) or scratch not in get_args(ScratchMode):
        raise UserError(
            f"fuse: keep={keep!r}, scratch={scratch!r}.",
            f"keep is None or one of {', '.join(get_args(Keep))}; scratch is one of {', '.join(get_args(ScratchMode))}.",
        )
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(causal, PreTrainedModel) or not hasattr(causal, "lm_head"):
        raise UserError(
            f"fuse: expected a PeftModel or a causal language model of transformers, got a {type(model).__name__}.",
            "Load it with AutoModelForCausalLM.from_pretrained.",
        )
    check_family(causal.config, "this model")
    inner: Any = causal.model
    for module in inner.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack the weight in place at the first evaluation, and the layer would read noise
            module.support_avx512bf16_for_cpu = False
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                "fuse: bitsandbytes has repacked this model's 4-bit weights for inference on this processor.",
                "Load it again, and fuse it before its first forward pass.",
            )
    fused = _Fused(inner, keep, scratch)
    inner.forward = MethodType(_Fused.forward, fused)
    return model


class _Fused:
    """Replacement of the forward method of the model's decoder (embeddings to final norm)."""

    def __init__(self, inner: Any, keep: Keep | None, scratch: ScratchMode) -> None:
        self.inner = inner
        self.plain: Callable[..., Any] = inner.forward
        self.keep = keep
        self.scratch = DequantBuffer(scratch)
        self.checked: set[tuple[torch.device, torch.dtype]] = set()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        inner = self.inner
        if use_cache is None:
            use_cache = inner.config.use_cache and not torch.is_grad_enabled()
        wants = ("output_attentions", "output_hidden_states")
        more = any(kwargs.get(k) or getattr(inner.config, k, None) for k in wants)
        if use_cache or past_key_values is not None or more:
            return self.plain(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        if inputs_embeds is None:
            x = inner.embed_tokens(input_ids)
            if not any(p.requires_grad for p in inner.embed_tokens.parameters()):
                x = x.detach()  # trainers let it require a gradient for checkpointing
        else:
            x = inputs_embeds
        if x.device.type != inner.norm.weight.device.type or x.device != inner.layers[-1].mlp.down_proj.weight.device:
            raise UserError("fuse: the model's layers are on more than one device.", 'Load it with device_map={"": 0}.')
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        windowed = any(window is not None for window in layer_windows(inner.config))
        where, positions, segments = _without_padding(x, attention_mask, position_ids, windowed)
        flat = x.flatten(0, 1)
        flat = (flat if where is None else flat[where]).to(dtype)
        if (x.device, dtype) not in self.checked:
            self.checked.add((x.device, dtype))
            with torch.no_grad():
                for note in check_kernels(x.device, dtype, Shape.of(inner.config).widths):
                    warnings.warn(note, stacklevel=2)
        with torch.autocast(kind, enabled=False):
            flat = self._layers(flat, positions, segments)
        if where is not None:
            flat = flat.new_zeros(x.shape[0] * x.shape[1], flat.shape[1]).index_copy(0, where, flat)
        return BaseModelOutputWithPast(last_hidden_state=flat.view(*x.shape[:2], -1), past_key_values=None)

    def _layers(self, x: Tensor, positions: Tensor, segments: list[Segment]) -> Tensor:
        inner, config = self.inner, self.inner.config
        contexts = layer_contexts(inner, x, positions, segments, segment_starts(segments).to(x.device))
        recompute = any(getattr(m, "gradient_checkpointing", False) for m in (inner, *inner.layers))
        keep: Keep = self.keep or ("input" if recompute and inner.training else "all")
        if inner.training and getattr(config, "attention_dropout", 0):
            raise UserError(f"fuse: attention_dropout is {config.attention_dropout}; only 0 is known.")
        _no_hooks(inner.layers)
        p = _dropout_of(inner)
        # one draw per forward pass, from the generator that the trainer seeds
        places = torch.arange(x.shape[0], device=x.device)
        key = DropoutKey(p, int(torch.randint(2**31 - 1, ())), 0, places, torch.zeros_like(places)) if p else None
        for index, module in enumerate(inner.layers):
            layer = layer_of(module, _active_pairs, key, index=index)
            frozen = [norm.weight for norm in (*layer.norms, *layer.post_norms, *layer.head_norms)]
            frozen += [w for site in layer.sites for w in (*site.weights, *site.biases) if w is not None]
            if torch.is_grad_enabled() and any(w.requires_grad for w in frozen):
                raise UserError(
                    f"fuse: layer {index} has weights to be trained that are no LoRA adapter's.",
                    "Train with a PEFT LoraConfig, or leave fuse out.",
                )
            x = run_layer(x, layer, contexts[index], self.scratch, keep)
        if isinstance(inner.norm, ModulesToSaveWrapper) or inner.norm.weight.requires_grad:
            return inner.norm(x)  # rms_norm gives its weight no gradient
        return rms_norm(x, *norm_of(inner.norm, config))


def _without_padding(
    x: Tensor, mask: Tensor | None, positions: Tensor | None, windowed: bool
) -> tuple[Tensor | None, Tensor, list[Segment]]:
    """Places of the flattened batch that hold a token (None: all), their positions, and their segments."""
    rows, length = x.shape[:2]
    if mask is not None and mask.shape != (rows, length):
        raise UserError(
            f"fuse: an attention mask of {list(mask.shape)} for tokens of {[rows, length]}; only [batch, tokens] is known.",
            'Load the model with attn_implementation="sdpa" and let the trainer\'s collator make the mask.',
        )
    packed = mask is None and positions is not None  # as in transformers: positions alone tell packed rows apart
    if positions is None:
        positions = torch.arange(length, device=x.device)[None]
    positions = positions.expand(rows, length)
    starts = torch.zeros(rows, length, dtype=torch.bool, device=x.device)
    starts[:, 0] = True
    if packed:
        starts[:, 1:] = positions.diff(dim=1) != 1
    where = None
    flat, starts = positions.reshape(-1), starts.reshape(-1)
    if mask is not None:
        kept = mask.bool()
        if windowed and bool((kept[:, 1:] & ~kept[:, :-1] & (kept[:, :-1].cumsum(1) > 0)).any()):
            raise UserError(
                "fuse: an attention mask with holes, which this model's sliding window would count.",
                "Take out what it hides instead.",
            )
        # the first token of each row
        starts = (kept & (kept.cumsum(1) == 1)).reshape(-1)
        where = kept.reshape(-1).nonzero()[:, 0]
        flat, starts = flat[where], starts[where]
        if where.numel() == rows * length:
            where = None
    borders = [*starts.nonzero()[:, 0].tolist(), flat.numel()]
    return where, flat, [Segment(a, b) for a, b in pairwise(borders)]


def _active_pairs(linear: Any, projection: int) -> list[LoraPair]:
    """PEFT's active adapters, as in its own forward pass."""
    base = linear.get_base_layer() if isinstance(linear, LoraLayer) else linear
    if isinstance(base, BaseTunerLayer):
        raise UserError(f"fuse: a projection has an adapter of {type(base).__module__}; of PEFT's only LoRA is known.")
    if type(base) is not nn.Linear and not is_quantized(base.weight):
        raise UserError(
            f"fuse: a projection is a {type(base).__name__}; plain linear layers and bitsandbytes' 4 bits are known.",
            "Load the base in 16 bits or with load_in_4bit.",
        )
    if not isinstance(linear, LoraLayer):
        return []
    if linear.merged and linear.disable_adapters:
        raise UserError("fuse: adapters are merged into the base and switched off.", "Call unmerge_adapter() first.")
    if linear.merged or linear.disable_adapters:
        return []
    pairs = []
    for name in linear.active_adapters:
        if name not in linear.lora_A:
            continue
        if name in linear.lora_variant or linear.lora_bias.get(name):
            raise UserError(f"fuse: adapter {name} is a variant of LoRA (DoRA or the like, or one with a bias).")
        dropout = linear.lora_dropout[name]
        dropped = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        a, b = linear.lora_A[name].weight, linear.lora_B[name].weight
        pairs.append(LoraPair(projection, a, b, linear.scaling[name], dropout=dropped))
    return pairs


def _no_hooks(layers: nn.Module) -> None:
    """Refuse hooks on the layers, whose own forward methods do not run. (Those of transformers only collect outputs.)"""
    for name, module in layers.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not (getattr(hook, "__module__", None) or "").startswith("transformers."):
                raise UserError(
                    f"fuse: layers.{name} has a forward hook, which would not be called.",
                    "Remove it, or leave fuse out. (A batch with adapter_names works through such hooks.)",
                )


def _dropout_of(inner: nn.Module) -> float:
    """The dropout probability of the active adapters; 0 where there is none."""
    values = {
        module.lora_dropout[name].p
        for module in inner.modules()
        if isinstance(module, LoraLayer) and not module.disable_adapters
        for name in module.active_adapters
        if name in module.lora_dropout and isinstance(module.lora_dropout[name], nn.Dropout) and module.training
    } - {0.0}
    if len(values) > 1:
        raise UserError(f"fuse: active adapters have different dropout: {', '.join(map(str, sorted(values)))}.")
    return values.pop() if values else 0.0
