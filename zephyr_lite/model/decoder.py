"""Batch → log-probabilities, over the Hugging Face model's own parameters (Mistral and Llama families)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..data.batch import Batch
from ..errors import UserError
from ..ops.attention import SegmentTable, attention
from ..ops.dropout import DropoutKey
from ..ops.lora import LoraPair, lora_linear
from ..ops.rms_norm import rms_norm
from ..ops.rope import rope
from ..ops.swiglu import swiglu
from ..ops.token_logps import TokenStats, token_logps, token_stats
from .adapters import AdapterStack

Keep = Literal["input", "all"]


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one forward pass: on the trainable adapter only."""

    p: float
    seed: int
    step: int


@dataclass(frozen=True)
class _Pass:
    """What every layer of one forward pass reads."""

    table: SegmentTable
    cos: Tensor
    sin: Tensor
    off: str | None
    dropout: DropoutKey | None


class Decoder:
    """Runs batches through the live stack.

    Args:
        stack: base and adapters; read at every call, so switching or loading adapters needs no new decoder.
        dtype: the compute dtype of the hidden states.
        names: the adapters that take part, from the bottom up; None: all of the stack.

    Raises:
        UserError: an adapter reaches the output head.
    """

    def __init__(self, stack: AdapterStack, dtype: torch.dtype, names: Sequence[str] | None = None) -> None:
        self.stack = stack
        self.dtype = dtype
        self.names = names
        if isinstance(getattr(stack.base, "lm_head", None), LoraLayer):
            raise UserError(
                "an adapter of the stack changes the output head, which the fused engine takes as it is.",
                "Merge that adapter into the base first (zephyr-lite merge --adapter), or set engine=trl.",
            )

    @property
    def device(self) -> torch.device:
        return self.stack.base.model.embed_tokens.weight.device

    def token_logps(
        self, batch: Batch, *, reference: bool = False, keep: Keep = "all", dropout: Dropout | None = None
    ) -> Tensor:
        """Log-probability of each target of the batch.

        Args:
            batch: on the decoder's device.
            reference: with the trainable adapter off and without a graph: its columns are there, and zero. Given the
                policy's ``dropout`` it runs the products that the policy runs, so that both round alike.
            keep: what a layer keeps for its backward pass; ``input`` recomputes the rest.
            dropout: for the trainable adapter, in training.
        Returns:
            [N] float32, in the order of ``batch.target_ids``; differentiable unless ``reference``.
        """
        if reference:
            with torch.no_grad():
                if self.stack.trainable is None:
                    return self.token_logps(batch)
                rows = self.hidden(batch, dropout=dropout, off=self.stack.trainable)
                return token_logps(rows, self.stack.base.lm_head.weight, batch.target_ids)
        rows = self.hidden(batch, keep=keep, dropout=dropout)
        return token_logps(rows, self.stack.base.lm_head.weight, batch.target_ids)

    def token_stats(self, batch: Batch) -> tuple[Tensor, TokenStats]:
        """The policy's log-probabilities with entropy and top-1, without a graph."""
        with torch.no_grad():
            rows = self.hidden(batch)
            return token_stats(rows, self.stack.base.lm_head.weight, batch.target_ids)

    def hidden(
        self,
        batch: Batch,
        *,
        keep: Keep = "all",
        dropout: Dropout | None = None,
        off: str | None = None,
        at_targets: bool = True,
    ) -> Tensor:
        """The last hidden states after the final norm.

        Returns:
            [N, D] at ``batch.target_rows`` (each row that predicts two targets stands there twice), or [T, D] of
            every token where ``at_targets`` is False.
        """
        model = self.stack.base.model
        x = model.embed_tokens(batch.tokens).to(self.dtype)
        cos, sin = model.rotary_emb(x, batch.positions[None])
        window = getattr(self.stack.base.config, "sliding_window", None)
        state = _Pass(
            table=SegmentTable.build(batch.segments, window, x.device),
            cos=cos[0].to(self.dtype),
            sin=sin[0].to(self.dtype),
            off=off,
            dropout=None
            if dropout is None or dropout.p == 0
            else DropoutKey(dropout.p, dropout.seed, dropout.step, batch.streams, batch.positions),
        )
        for index, layer in enumerate(model.layers):
            if keep == "input" and torch.is_grad_enabled():
                x = checkpoint(
                    self._layer, x, layer, index, state, use_reentrant=False, preserve_rng_state=False
                )  # dropout is a hash, so there is no generator state to restore
            else:
                x = self._layer(x, layer, index, state)
        if at_targets:
            x = x[batch.target_rows]
        return rms_norm(x, model.norm.weight, model.norm.variance_epsilon)

    def _layer(self, x: Tensor, layer: Any, index: int, state: _Pass) -> Tensor:
        attn, mlp = layer.self_attn, layer.mlp
        normed = rms_norm(x, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
        q, k, v = self._site(normed, (attn.q_proj, attn.k_proj, attn.v_proj), index, 0, state)
        q = rope(q.unflatten(-1, (-1, attn.head_dim)), state.cos, state.sin)
        k = rope(k.unflatten(-1, (-1, attn.head_dim)), state.cos, state.sin)
        mixed = attention(q, k, v.unflatten(-1, (-1, attn.head_dim)), state.table, attn.scaling)
        x = x + self._site(mixed.flatten(1), (attn.o_proj,), index, 1, state)[0]
        normed = rms_norm(x, layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon)
        gate, up = self._site(normed, (mlp.gate_proj, mlp.up_proj), index, 2, state)
        return x + self._site(swiglu(gate, up), (mlp.down_proj,), index, 3, state)[0]

    def _site(self, x: Tensor, modules: Sequence[Any], layer: int, site: int, state: _Pass) -> tuple[Tensor, ...]:
        """All projections that read x, with the stack of adapters."""
        weights, biases, pairs = [], [], []
        for projection, module in enumerate(modules):
            inner = module
            if isinstance(module, LoraLayer):
                inner = module.get_base_layer()
                for name in self.stack.names if self.names is None else self.names:
                    if name in module.lora_A:
                        pairs.append(
                            LoraPair(
                                projection,
                                module.lora_A[name].weight,
                                module.lora_B[name].weight,
                                module.scaling[name],
                                off=name == state.off,
                                dropout=name == self.stack.trainable,
                            )
                        )
            weights.append(inner.weight)
            biases.append(inner.bias)
        key = state.dropout.at(layer, site) if state.dropout is not None else None
        return lora_linear(x, weights, biases, pairs, key)
