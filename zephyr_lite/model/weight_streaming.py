"""Weight streaming: decoder layers on the host, copied to the device one layer ahead of the computation.

The frozen matrices of a layer, with their quantization state, are in one block of page-locked memory (a slab). Two buffers on
the device take the slabs of even and odd layers in turn, so that a slab is one copy and a matrix is a view of a buffer, made
once. The backward pass begins with both buffers filled. The embedding stays on the host, where its rows are gathered; the head
is copied while log-probabilities are computed. Norms and adapters stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.nf4 import stored_tensors, weight_over
from .activation_offload import SideStream, host_bytes, pack, views
from .families import family_of


class WeightStreamer:
    """The layers of a model on the host, and two buffers on the device.

    The weights of `model` become views of the slabs, layer by layer, so that nothing is held twice. Embedding and head move to
    the host, everything else to `device`.

    Args:
        model: a causal language model of ``families``; linear layers plain or 4-bit, on the host or on the device, with
            adapters or without.
        device: where the run computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self._side = SideStream(device)
        layers, head = list(model.model.layers), model.lm_head.weight
        self._linears = [_linears(layer, family_of(model.config).projections) for layer in layers]
        self._starts, sizes = zip(*(pack(_stored(linears)) for linears in self._linears))
        # allocations that may be refused come before anything is moved
        self.slabs = [host_bytes(size, device) for size in sizes]
        locked = host_bytes(head.nbytes, device).view(head.dtype).view(head.shape)
        for layer, linears, starts, slab in zip(layers, self._linears, self._starts, self.slabs):
            on_host = iter(views(slab, starts, _stored(linears)))
            for linear in linears:
                for name, tensor in stored_tensors(linear.weight).items():
                    view = next(on_host)
                    view.copy_(tensor)
                    (linear.weight if name == "" else tensor).data = view
                if linear.bias is not None:
                    linear.bias.data = linear.bias.data.to(device)
            for name, module in layer.named_modules():
                if name.endswith("norm"):
                    module.to(device)
        head.data = locked.copy_(head.data)
        model.model.embed_tokens.to("cpu")
        for module in (model.model.norm, model.model.rotary_emb):
            module.to(device)
        self.buffers: list[Tensor] = []
        self._views: dict[Tensor, Tensor] = {}
        self._holds: list[int | None] = [None, None]
        self._ready: list[Any] = [None, None]
        self._gathered: Tensor | None = None
        self._gone: Any = None

    def on_device(self, weight: Tensor) -> Tensor:
        """The view of a device buffer that holds the matrix while its layer is loaded (see ``begin``)."""
        if not self.buffers:
            self._allocate()
        return self._views[weight]

    def _allocate(self) -> None:
        """Allocate the buffers when the first pass begins, which may run out of memory and be retried."""
        sizes = [max((slab.numel() for slab in self.slabs[slot::2]), default=0) for slot in range(2)]
        buffers = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        for index, (linears, starts) in enumerate(zip(self._linears, self._starts)):
            on_device = iter(views(buffers[index % 2], starts, _stored(linears)))
            for linear in linears:
                tensors = {name: next(on_device) for name in stored_tensors(linear.weight)}
                self._views[linear.weight] = weight_over(linear.weight, tensors)
        self.buffers = buffers

    def begin(self, layer: int, step: int) -> None:
        """Let later work read this layer, and start copying the next one (`layer + step`).

        Called when all work on the layer before has been enqueued.
        """
        slot = layer % 2
        self._load(layer)
        self._side.wait(self._ready[slot])
        if 0 <= layer + step < len(self.slabs):
            self._load(layer + step)

    def embedded(self, embedding: Any, tokens: Tensor) -> Tensor:
        """The tokens' embeddings, gathered on the host into page-locked memory: [T, D] on the device."""
        weight, scale = embedding.weight, getattr(embedding, "embed_scale", None)
        count, width = tokens.numel(), weight.shape[1]
        if self._gathered is None or self._gathered.shape[0] < count:
            self._gathered = (
                host_bytes(count * width * weight.element_size(), self.device).view(weight.dtype).view(-1, width)
            )
        if self._gone is not None:
            self._gone.synchronize()  # the copy of the micro-batch before
        rows = torch.index_select(weight.detach(), 0, tokens, out=self._gathered[:count])
        if self.device.type != "cuda":
            there = rows.clone()
        else:
            there = rows.to(self.device, non_blocking=True)
            self._gone = torch.cuda.Event()
            self._gone.record(torch.cuda.current_stream(self.device))
        return there if scale is None else there.mul_(scale.to(there.dtype))

    def _load(self, layer: int) -> None:
        slot = layer % 2
        if self._holds[slot] == layer:
            return
        slab = self.slabs[layer]
        self._holds[slot] = None  # if the copy fails, no layer is loaded
        self._ready[slot] = self._side.copy([(self.buffers[slot][: slab.numel()], slab)])
        self._holds[slot] = layer


def _linears(layer: Any, names: Sequence[str]) -> list[Any]:
    found = [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in names]
    return [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in found]


def _stored(linears: Sequence[Any]) -> list[Tensor]:
    """All tensors of the weights of a layer."""
    return [tensor for linear in linears for tensor in stored_tensors(linear.weight).values()]
