"""The live stack of LoRA adapters on the frozen base: the only place where adapters are attached, switched and frozen."""

from __future__ import annotations

# first: peft imports bitsandbytes, which ops/nf4 keeps from fetching kernels of the hub
from ..ops import nf4  # noqa: F401

# isort: split
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import UserError
from ..io.text import shown
from ..ops.lora import ALIGNMENT, SMALL
from .families import family_of
from .peft_io import AdapterFile, LoraWeights


def check_targets(targets: Sequence[str] | str, config: Any) -> list[str]:
    """The projections that ``lora_target_modules`` names, in a base with this configuration."""
    projections = family_of(config).projections
    wanted = [*projections] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not re.fullmatch(r"[\w.-]+", target, re.ASCII) or target.split(".")[-1] not in projections:
            raise UserError(
                f"lora_target_modules: {shown(repr(target))} is none of {', '.join(projections)}.",
                "Name projections of the decoder layers (no regular expressions), or all-linear.",
            )
    return wanted


def check_shapes(adapter: AdapterFile, base: nn.Module) -> dict[str, nn.Module]:
    """Compare an adapter with its base, of which any device will do; the base's modules by name, without their adapters.

    Raises:
        UserError: it does not fit.
    """
    layers = {}
    for module, layer in base.named_modules():
        layers[module] = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    for module, weights in adapter.modules.items():
        layer = layers.get(module)
        shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else None
        if shape != weights.shape:
            found = f"the weight there is {list(shape)}" if shape else "it has no linear layer of this name"
            raise UserError(
                f"adapter {adapter.path}: {shown(module)} is for a weight {list(weights.shape)} of its base; in this base "
                f"{found}.",
                "It was trained on another base; give that one as model_name_or_path.",
            )
    return layers


class AdapterStack:
    """The base with frozen adapters switched on, and at most one trainable adapter on top.

    Attributes:
        model: a PeftModel over the base, or the bare base where there is no adapter.
        frozen: names of the frozen adapters, from the bottom up.
        trainable: name of the trainable adapter, or None.

    Args:
        model: the base.
        device: of the adapters; None: that of the weight under each (the host, for a streamed base).
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        self.model: Any = model
        self._device = device
        self.frozen: list[str] = []
        self.trainable: str | None = None

    @property
    def base(self) -> Any:
        """The Hugging Face model; PEFT wraps the linear layers that have adapters."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def names(self) -> list[str]:
        """Every adapter, from the bottom up."""
        return [*self.frozen, *([self.trainable] if self.trainable else [])]

    def add_frozen(self, name: str, adapter: AdapterFile) -> None:
        """Put a frozen adapter on top, switched on."""
        assert self.trainable is None, "add frozen adapters before the trainable one"
        layers = check_shapes(adapter, self.base)
        adapter.check_copies(lambda name: getattr(layers.get(name.removesuffix(".weight")), "weight", None))
        self._add(name, {module: weights.rank for module, weights in adapter.modules.items()})
        self.load(name, adapter.modules)
        self.frozen.append(name)
        self._activate(self.names)

    def add_trainable(
        self, name: str, *, r: int, alpha: float, targets: Sequence[str] | str, seed: int, rslora: bool = False
    ) -> None:
        """Put the trainable adapter on top: A uniform as in PEFT (Kaiming, a = √5), B zero, both float32.

        A is drawn on the CPU, module by module, so that it depends only on the seed. The scale is alpha / r, or alpha / √r
        with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).
        """
        if name in self.frozen:
            raise UserError(f"stage {name}: an adapter below it has the same name.", "Give the stage another name.")
        wanted = check_targets(targets, self.base.config)
        modules, missing = [], set(wanted)
        for module, layer in self.base.named_modules():
            if ".layers." in module and isinstance(layer, (LoraLayer, nn.Linear)):
                matching = [target for target in wanted if f".{module}".endswith(f".{target}")]
                missing.difference_update(matching)
                if matching:
                    modules.append(module)
        if missing:
            raise UserError(
                f"lora_target_modules: this base has no linear layer {min(missing)} in its decoder layers.",
                "Name projections that it has, or all-linear.",
            )
        self._add(name, dict.fromkeys(modules, r))
        generator = torch.Generator().manual_seed(seed)
        for module in modules:
            layer = self.base.get_submodule(module)
            layer.scaling[name] = alpha / (math.sqrt(r) if rslora else r)
            weight = layer.lora_A[name].weight
            with torch.no_grad():
                fresh = torch.empty(weight.shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                weight.copy_(fresh)
                layer.lora_B[name].weight.zero_()
        self.trainable = name
        self._activate(self.names)

    def load(self, name: str, modules: Mapping[str, LoraWeights]) -> None:
        """Overwrite an attached adapter's weights and scales."""
        with torch.no_grad():
            for module, weights in modules.items():
                layer = self.base.get_submodule(module)
                layer.lora_A[name].weight.copy_(weights.a)
                layer.lora_B[name].weight.copy_(weights.b)
                layer.scaling[name] = weights.scale

    def weights(self, name: str) -> dict[str, LoraWeights]:
        """An attached adapter's weights, float32 on the CPU, by module name."""
        result = {}
        for module, layer in self.lora_layers():
            if name in layer.lora_A:
                a = layer.lora_A[name].weight.detach().float().cpu().clone()
                b = layer.lora_B[name].weight.detach().float().cpu().clone()
                result[module] = LoraWeights(a, b, layer.scaling[name])
        return result

    def lora_layers(self) -> Iterator[tuple[str, Any]]:
        for module, layer in self.base.named_modules():
            if isinstance(layer, LoraLayer):
                yield module, layer

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters: ``MODULE.lora_A`` and ``MODULE.lora_B`` → parameter."""
        result = {}
        for module, layer in self.lora_layers():
            if self.trainable in layer.lora_A:
                result[f"{module}.lora_A"] = layer.lora_A[self.trainable].weight
                result[f"{module}.lora_B"] = layer.lora_B[self.trainable].weight
        return result

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside the block the Hugging Face model (``generate``, a plain forward) runs with these adapters only."""
        if not isinstance(self.model, PeftModel):
            yield
            return
        try:
            if names:
                self._activate(list(names))
                yield
            else:
                with self.model.disable_adapter():
                    yield
        finally:
            self._activate(self.names)

    @contextmanager
    def by_row(self, rows: Sequence[Sequence[str]]) -> Iterator[None]:
        """Inside the block each row of a batch runs with its own adapters, all in one pass through the base.

        Every adapter is on; its scale is a column with 0 for the rows that run without it.

        Args:
            rows: names of the adapters of each row.
        """
        if all(list(names) == list(rows[0]) for names in rows):
            with self.only(rows[0]):
                yield
            return
        used = [name for name in self.names if any(name in names for names in rows)]
        scales = {}
        try:
            self._activate(used)
            for module, layer in self.lora_layers():
                scales[module] = dict(layer.scaling)
                for name in used:
                    if name in layer.lora_A:
                        on = [layer.scaling[name] if name in names else 0.0 for names in rows]
                        layer.scaling[name] = layer.lora_A[name].weight.new_tensor(on)[:, None, None]
            yield
        finally:
            for module, layer in self.lora_layers():
                layer.scaling.update(scales.get(module, {}))
            self._activate(self.names)

    def _add(self, name: str, ranks: dict[str, int]) -> None:
        rank = max(ranks.values())
        others = {module: other for module, other in ranks.items() if other != rank}
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            rank_pattern=others,
            target_modules=sorted(ranks),
            lora_dropout=0.0,  # dropout is a hash inside the decoder; PEFT's would draw from the global generator
            task_type="CAUSAL_LM",
        )
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, config)
        else:
            self.model = get_peft_model(self.model, config, adapter_name=name)
        self._lay_out(name)

    def _lay_out(self, name: str) -> None:
        """Put an adapter's weights into one buffer, each aligned: all A, then all B, so that a layer casts and an optimizer
        updates many at once. Those that an 8-bit optimizer would keep in 32 bits are at the end."""
        layers = [layer for _, layer in self.lora_layers() if name in layer.lora_A]
        a, b = ([part[name].weight for part in parts] for parts in zip(*((x.lora_A, x.lora_B) for x in layers)))
        weights = [w for w in (*a, *b) if w.numel() >= SMALL] + [w for w in (*b, *a) if w.numel() < SMALL]
        sizes = [-(-weight.numel() // ALIGNMENT) * ALIGNMENT for weight in weights]
        dtype = torch.promote_types(weights[0].dtype, torch.float32)
        buffer = torch.zeros(sum(sizes), dtype=dtype, device=self._device or weights[0].device)
        for weight, part in zip(weights, buffer.split(sizes)):
            weight.data = part[: weight.numel()].view_as(weight).copy_(weight.data)

    def _activate(self, names: list[str]) -> None:
        """Switch adapters on; PEFT makes all of them trainable, only the trainable adapter may be."""
        self.model.base_model.set_adapter(names)
        for _, layer in self.lora_layers():
            for name in layer.lora_A:
                layer.lora_A[name].weight.requires_grad_(name == self.trainable)
                layer.lora_B[name].weight.requires_grad_(name == self.trainable)


def resolve_frozen_names(paths: Sequence[Path]) -> list[str]:
    """A name for each frozen adapter: the stage's if it is in a run's folder, else its place in the stack. None is called
    ``base``, the name of the model without adapters."""
    names: list[str] = []
    for place, path in enumerate(paths):
        name = path.parent.name if path.name in ("adapter", "delta") else f"adapter{place}"
        name = re.sub(r"[^\w-]", "_", name) or f"adapter{place}"
        names.append(f"{name}_{place}" if name in [*names, "base"] else name)
    return names
