"""Batch → log-probabilities, over the Hugging Face model's own parameters (the families of ``families``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..data.batch import Batch
from ..errors import UserError
from ..ops.dropout import DropoutKey, uniform
from ..ops.lora import LoraPair
from ..ops.rms_norm import rms_norm
from ..ops.token_logps import TokenStats, token_logps
from .adapters import AdapterStack
from .dequant_buffer import DequantBuffer, ScratchMode
from .execution import ExecutionConfig, Keep, layer_contexts, layer_of, norm_of
from .layer import run_layer

if TYPE_CHECKING:
    from .activation_offload import ActivationOffload
    from .weight_streaming import WeightStreamer

Keeps = Keep | Sequence[Keep]


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout of one forward pass, on the trainable adapter only, and NEFTune's ``noise`` (its alpha) on the embeddings."""

    p: float
    seed: int
    step: int
    noise: float = 0.0


class Decoder:
    """Runs batches through the live stack.

    Args:
        stack: base and adapters; read at every call, so switching or loading adapters needs no new decoder.
        dtype: the compute dtype of the hidden states.
        names: the adapters that are on, from the bottom up; None: all of the stack.
        scratch: size of the buffer for dequantized weights (see ``dequant_buffer``).
        stream: holds the base's layers, if they are on the host.

    Raises:
        UserError: an adapter reaches the output head.
    """

    def __init__(
        self,
        stack: AdapterStack,
        dtype: torch.dtype,
        names: Sequence[str] | None = None,
        scratch: ScratchMode = "layer",
        stream: WeightStreamer | None = None,
    ) -> None:
        self.stack = stack
        self.dtype = dtype
        self.names = names
        self.scratch = DequantBuffer(scratch)
        self.stream = stream
        self.offload: ActivationOffload | None = None
        self.tile: int | None = None
        # more fields of each layer's sites: those of int8
        self.of_sites: Sequence[Sequence[Mapping[str, Any]]] = [[{}] * 4] * stack.base.config.num_hidden_layers
        if isinstance(getattr(stack.base, "lm_head", None), LoraLayer):
            raise UserError(
                "an adapter of the stack changes the output head, which the fused engine takes as it is.",
                "Merge that adapter into the base first (zephyr-lite merge --adapter), or set engine=trl.",
            )

    @property
    def device(self) -> torch.device:
        return self.stack.base.model.embed_tokens.weight.device if self.stream is None else self.stream.device

    def follow(self, execution: ExecutionConfig) -> None:
        """Compute with these settings from the next pass on; no pass may be under way, or wait for its backward pass. What
        a failed pass left behind is dropped. A resident base moves to the host for ``stream``; a streamed one stays
        there."""
        if execution.stream and self.stream is None:
            device = self.device
            self.scratch.free()
            from .weight_streaming import WeightStreamer

            self.stream = WeightStreamer(self.stack.base, device)
        if self.scratch.mode != execution.scratch:
            self.scratch = type(self.scratch)(execution.scratch)
        self.tile = execution.tile
        if self.offload is not None:
            self.offload.clear()
        if self.offload is None or self.offload.layers != execution.offload:
            self.offload = None
            if execution.offload:
                from .activation_offload import ActivationOffload

                self.offload = ActivationOffload(self.device, execution.offload)

    def release(self) -> None:
        """Free the dequantization buffer and what a failed pass left behind."""
        self.scratch.free()
        if self.offload is not None:
            self.offload.clear()

    def token_logps(
        self, batch: Batch, *, reference: bool = False, keep: Keeps = "all", dropout: Dropout | None = None
    ) -> Tensor:
        """Log-probability of each target of the batch.

        Args:
            batch: on the decoder's device.
            reference: with the trainable adapter's columns zero and without a graph. With the policy's ``dropout`` it runs
                the same products as the policy, so that both round alike.
            keep: tensors that a layer keeps for its backward pass (see ``layer``): one value for all, or one a layer.
            dropout: of the trainable adapter, in training.
        Returns:
            [N] float32, in the order of ``batch.target_ids``; differentiable unless ``reference``.
        """
        off = self.stack.trainable if reference else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not reference):
            (rows,) = self._run(batch, dropout, keep, (off,))
            return token_logps(rows, self._head(), batch.target_ids)

    def policy_and_reference(
        self, batch: Batch, *, keep: Keeps = "all", dropout: Dropout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Policy and reference in one pass, layer by layer, so that each weight is dequantized once: bit for bit the results of
        two calls of ``token_logps``. The reference's half keeps nothing and needs the memory of one layer."""
        policy, reference = self._run(batch, dropout, keep, (None, self.stack.trainable))
        head = self._head()
        with torch.no_grad():
            reference_logps = token_logps(reference, head, batch.target_ids)
        return token_logps(policy, head, batch.target_ids), reference_logps

    def token_stats(
        self, batch: Batch, *, keep: Keeps = "all", dropout: Dropout | None = None
    ) -> tuple[Tensor, TokenStats]:
        """The policy's log-probabilities, as ``token_logps`` gives them, with entropy and top-1 of the same pass."""
        (rows,) = self._run(batch, dropout, keep, (None,))
        return token_logps(rows, self._head(), batch.target_ids, stats=True)

    def _head(self) -> Tensor:
        """[V, D] on the device; of a streamed base a temporary copy."""
        weight = self.stack.base.lm_head.weight.detach()
        return weight.to(self.device, non_blocking=True)

    def _run(self, batch: Batch, dropout: Dropout | None, keep: Keeps, off: Sequence[str | None]) -> list[Tensor]:
        """The hidden states that predict the targets, after the final norm: [N, D] (a row that predicts two targets occurs
        twice), once for each of ``off``: the name of an adapter that is switched off (without a graph), or None."""
        model = self.stack.base.model
        if self.stream is None:
            x = model.embed_tokens(batch.tokens).detach().to(self.dtype)
        else:
            tokens = batch.tokens.cpu() if batch.host_tokens is None else batch.host_tokens
            x = self.stream.embedded(model.embed_tokens, tokens).to(self.dtype)
        shared = {"mlp_chunk": self.tile, "offload": self.offload, "stream": self.stream}
        contexts = layer_contexts(model, x, batch.positions, batch.segments, batch.segment_starts, **shared)
        key = None
        if dropout is not None and (dropout.p > 0 or dropout.noise):
            key = DropoutKey(dropout.p, dropout.seed, dropout.step, batch.streams, batch.positions)
            if dropout.noise:  # NEFTune (Jain et al. 2023, arXiv 2310.05914)
                lengths = torch.tensor([segment.queries for segment in batch.segments])
                most = dropout.noise / (lengths * x.shape[1]).sqrt().repeat_interleave(lengths)[:, None].to(x.device)
                x = (x + uniform(key.at(-1, 0), x.shape[1]) * most).to(self.dtype)
            key = key if dropout.p > 0 else None
        keeps = [keep] * len(model.layers) if isinstance(keep, str) else keep
        streams = [x] * len(off)
        del x  # so that the first layer frees it
        for index, module in enumerate(model.layers):
            for place, name in enumerate(off):
                pairs, fields = partial(self._pairs, off=name), self.of_sites[index]
                layer = layer_of(module, pairs, key, index=index, stream=self.stream, of_sites=fields)
                with torch.set_grad_enabled(torch.is_grad_enabled() and name is None):
                    streams[place] = run_layer(streams[place], layer, contexts[index], self.scratch, keeps[index])
        if self.offload is not None:
            self.offload.wait_pending()
        rows = [stream[batch.target_rows] for stream in streams]
        return [rms_norm(r, *norm_of(model.norm, model.config)) for r in rows]

    def _pairs(self, linear: Any, projection: int, off: str | None) -> list[LoraPair]:
        """The adapters of a projection; ``off`` is switched off."""
        pairs: list[LoraPair] = []
        if not isinstance(linear, LoraLayer):
            return pairs
        for name in self.stack.names if self.names is None else self.names:
            if name in linear.lora_A:
                a, b, trained = linear.lora_A[name].weight, linear.lora_B[name].weight, name == self.stack.trainable
                pairs.append(LoraPair(projection, a, b, linear.scaling[name], off=name == off, dropout=trained))
        return pairs
