"""A base whose decoder layers lie on the host and come to the device one layer ahead of the computation.

Every layer's frozen matrices, with all that their quantization needs, lie in one block of locked memory (a slab). Two
buffers on the device take the slabs in turn, the even layers' and the odd ones', so that a slab is one copy, and a
matrix is a view of a buffer, made once: no quantization state is ever moved. Where the forward pass ends the backward
pass begins, with both buffers filled. The embedding stays on the host, where its rows are gathered; the head comes
over for as long as log-probabilities are computed. Norms and adapters are small, and stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.nf4 import stored_tensors, weight_over
from .offload import ALIGNMENT, SideStream, host_bytes

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class StreamedBase:
    """The layers of a model on the host, and its buffers on the device.

    Takes over the weights of `model` (a Mistral or Llama for causal language modelling, on the host): they become views
    of the slabs, so that nothing is held twice. Everything else of the model but embedding and head moves to `device`.

    Args:
        model: its linear layers plain or 4-bit, without adapters yet.
        device: where the run computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.device = device
        self._side = SideStream(device)
        layouts = [_layout(linears) for linears in map(_linears, model.model.layers)]
        self.buffers = [
            torch.empty(max((size for _, size in layouts[slot::2]), default=0), dtype=torch.uint8, device=device)
            for slot in range(2)
        ]
        self.slabs: list[Tensor] = []
        self._views: dict[Tensor, Tensor] = {}
        for index, (module, (places, size)) in enumerate(zip(model.model.layers, layouts)):
            slab = host_bytes(size, device)
            for linear, starts in zip(_linears(module), places):
                self._views[linear.weight] = self._move(linear, starts, slab, self.buffers[index % 2])
            self.slabs.append(slab)
        self._holds: list[int | None] = [None, None]
        self._ready: list[Any] = [None, None]
        _lock(model.lm_head.weight, device)
        for module in (model.model.norm, model.model.rotary_emb):
            module.to(device)
        for layer in model.model.layers:
            layer.input_layernorm.to(device)
            layer.post_attention_layernorm.to(device)
            for linear in _linears(layer):
                if linear.bias is not None:
                    linear.bias.data = linear.bias.data.to(device)

    @property
    def host_bytes(self) -> int:
        return sum(slab.numel() for slab in self.slabs)

    def on_device(self, weight: Tensor) -> Tensor:
        """The view through which a layer's matrix is read while the layer is there (see ``begin``)."""
        return self._views[weight]

    def begin(self, layer: int, step: int) -> None:
        """What is computed from here on may read this layer; the next one (`layer + step`) starts to come over.

        Called when all that reads the layer before has been given to the device.
        """
        slot = layer % 2
        self._load(layer)
        self._side.wait(self._ready[slot])
        if 0 <= layer + step < len(self.slabs):
            self._load(layer + step)

    def _load(self, layer: int) -> None:
        slot = layer % 2
        if self._holds[slot] == layer:
            return
        slab = self.slabs[layer]
        self._holds[slot] = None  # if the copy fails, neither layer is there
        self._ready[slot] = self._side.copy([(self.buffers[slot][: slab.numel()], slab)])
        self._holds[slot] = layer

    @staticmethod
    def _move(linear: nn.Linear, starts: dict[str, int], slab: Tensor, buffer: Tensor) -> Tensor:
        """Copy a matrix into the slab, let the parameter be a view of that, and return the view of the buffer."""
        weight = linear.weight
        tensors = stored_tensors(weight)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[starts[name] : starts[name] + t.nbytes].view(t.dtype).view(t.shape)
                for name, t in tensors.items()
            }

        on_host = views(slab)
        for name, tensor in tensors.items():
            on_host[name].copy_(tensor)
        weight.data = on_host[""]
        for name, tensor in tensors.items():
            if name:
                tensor.data = on_host[name]
        return weight_over(weight, views(buffer))


def _linears(layer: Any) -> list[Any]:
    return [module for name, module in layer.named_modules() if name.rsplit(".", 1)[-1] in PROJECTIONS]


def _layout(linears: Sequence[Any]) -> tuple[list[dict[str, int]], int]:
    """Where each tensor of each matrix begins in the layer's slab, and how long that is."""
    places, end = [], 0
    for linear in linears:
        starts = {}
        for name, tensor in stored_tensors(linear.weight).items():
            starts[name] = end
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        places.append(starts)
    return places, end


def slab_bytes(layer: Any) -> int:
    """Bytes of a decoder layer's slab."""
    return _layout(_linears(layer))[1]


def _lock(parameter: Tensor, device: torch.device) -> None:
    """Put a parameter into locked memory, as a copy to the card wants it."""
    if device.type == "cuda":
        source = parameter.data
        locked = host_bytes(source.nbytes, device).view(source.dtype).view(source.shape)
        parameter.data = locked.copy_(source)
