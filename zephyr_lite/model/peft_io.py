"""LoRA adapters as files, in PEFT's format: read, check, hash, write.

Tensors are mapped from the file, not loaded: rank 144 on Mistral-7B takes 1.5 GB in float32.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError
from ..io.atomic import folder_aside, make_folder, write_text
from ..io.safetensors import FLOATS, SafetensorsFile, tensor_bytes, write_stream
from ..io.text import shown
from .fetch import download
from .peft_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    by_peft,
    pattern_value,
    read_config,
    weights_file,
)
from .shards import local_folder

PREFIX = "base_model.model."
# prefixes that launchers, torch.compile and PEFT models wrapped twice leave in tensor names
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PREFIXES = re.compile(r"(?:base_model\.model\.|module\.)*")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight")
_LAYER = re.compile(r"(?P<parent>.*\blayers)\.(?P<index>\d+)\.(?:.*\.)?[^.]+")


@dataclass(frozen=True)
class LoraWeights:
    """LoRA of one module: W becomes W + scale · b @ a.

    Attributes:
        a: float32 [r, in].
        b: float32 [out, r].
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.b.shape[0], self.a.shape[1]


class LazyModules(Mapping[str, LoraWeights]):
    """Module name → LoraWeights, read or computed at each access."""

    def __init__(self, readers: Mapping[str, Callable[[], LoraWeights]]) -> None:
        self._readers = readers

    def __getitem__(self, module: str) -> LoraWeights:
        return self._readers[module]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass
class AdapterFile:
    """A PEFT LoRA adapter on disk.

    Attributes:
        path: its folder.
        config: its adapter_config.json.
        modules: module name (`model.layers.0.self_attn.q_proj`) → LoraWeights, mapped from the file at each access.
        copies: whole parameters in the file, which PEFT adds for embeddings: name (`lm_head.weight`) → function that reads it.
    """

    path: Path
    config: dict[str, Any]
    modules: Mapping[str, LoraWeights]
    copies: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Content hash (``adapter_sha256``)."""
        return adapter_sha256(self.path)

    def check_copies(self, of_base: Callable[[str], Tensor | None]) -> None:
        """Refuse whole parameters in the file that differ from the base's.

        Args:
            of_base: name of a parameter → the base's, or None.

        Raises:
            UserError: one differs; says how to merge the adapter with PEFT instead.
        """
        for name, read in self.copies.items():
            mine, own = read(), of_base(name)
            if own is not None:
                mine = mine.to(own.device)
                # equal, or rounded to the other's dtype
                if torch.equal(mine.to(own.dtype), own) or torch.equal(own.to(mine.dtype), mine):
                    continue
            found = "the base has none" if own is None else f"the base's is {list(own.shape)} with other values"
            raise UserError(
                f"{self.path}: holds a whole {shown(name)} {list(mine.shape)} beside its LoRA; {found}, so it was trained too.",
                by_peft(self.path),
            )


def read_adapter(path: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter's folder.

    Raises:
        UserError: a file is missing, it is not plain LoRA (DoRA, biases, modules_to_save, …), a module has only A or only B,
            shapes do not fit, or a rank is not the configuration's.
    """
    folder = Path(path)
    config = read_config(folder)
    file = SafetensorsFile(weights_file(folder))
    names: dict[str, dict[str, str]] = defaultdict(dict)
    copies: dict[str, Callable[[], Tensor]] = {}
    for name, entry in file.entries.items():
        plain = _WRAPPERS.sub("", name)
        plain = plain[_PREFIXES.match(plain).end() :]  # type: ignore[union-attr]
        match = _KEY.fullmatch(plain)
        if match is None:
            if plain.endswith(".weight") and "lora_" not in plain and ".modules_to_save." not in plain:
                copies[plain.replace(".base_layer.", ".")] = partial(file.tensor, name)
                continue
            what = "an adapter on an embedding" if "lora_embedding_" in name else "no LoRA matrix of a linear layer"
            raise UserError(
                f"{file.path}: tensor {shown(name)} is {what}, which cannot be stacked here.", by_peft(folder)
            )
        if entry.dtype not in FLOATS or len(entry.shape) != 2:
            raise UserError(
                f"{file.path}: tensor {shown(name)} is {entry.dtype} {list(entry.shape)}; a LoRA matrix is a float matrix.",
                "Save the adapter again with PEFT's save_pretrained (under ZeRO-3 or FSDP, gather the weights first).",
            )
        module, side = match["module"], match["side"]
        if side in names[module]:
            raise UserError(
                f"{file.path}: holds two adapters, {shown(names[module][side])} and {shown(name)}.",
                "Save them one by one: PEFT's save_pretrained(folder, selected_adapters=[NAME]).",
            )
        names[module][side] = name
    if not names:
        raise UserError(f"{file.path}: holds no LoRA weights.", "Save the adapter again with PEFT's save_pretrained.")
    readers = {
        module: partial(_read_module, file, module, names[module], _scale(file, config, module, names[module]))
        for module in sorted(names)
    }
    return AdapterFile(folder, config, LazyModules(readers), copies)


def _read_module(file: SafetensorsFile, module: str, names: dict[str, str], scale: float) -> LoraWeights:
    """Raises UserError where a value is not finite."""
    a, b = (file.tensor(names[side]) for side in "AB")
    for side, matrix in (("A", a), ("B", b)):
        if not bool(torch.isfinite(matrix).all()):
            raise UserError(
                f"{file.path}: lora_{side} of {shown(module)} holds NaN or infinite values.",
                "Its training had gone wrong; take an earlier checkpoint of it.",
            )
    return LoraWeights(a.float(), b.float(), scale)


def _scale(file: SafetensorsFile, config: dict[str, Any], module: str, names: dict[str, str]) -> float:
    if missing := sorted({"A", "B"} - set(names)):
        raise UserError(
            f"{file.path}: {shown(module)} has no lora_{missing[0]}.", "The adapter is incomplete; save it again."
        )
    a, b = (file.entries[names[side]].shape for side in "AB")
    rank = a[0]
    if rank == 0 or b[1] != rank:
        raise UserError(
            f"{file.path}: {shown(module)} has lora_A {list(a)} and lora_B {list(b)}; the rank must be one and above 0.",
            "The adapter is incomplete; save it again.",
        )
    told = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
    if rank not in told:
        raise UserError(
            f"{file.path}: {shown(module)} has rank {rank}, {CONFIG_NAME} says {' or '.join(map(str, sorted(told)))}.",
            "Configuration and weights belong to different adapters; copy both files again.",
        )
    alpha = float(pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def adapter_sha256(path: str | Path) -> str:
    """Content hash of an adapter: sorted tensor names, dtypes, shapes and bytes, and the settings of rank and alpha.

    The order of the tensors and the base's name do not change it.
    """
    folder = Path(path)
    config = read_config(folder)
    file = SafetensorsFile(weights_file(folder))
    settings = {
        "r": int(config.get("r", 8)),
        "lora_alpha": float(config.get("lora_alpha", 8)),
        "use_rslora": bool(config.get("use_rslora", False)),
        # lists, because the first of several matching patterns counts
        "rank_pattern": list((config.get("rank_pattern") or {}).items()),
        "alpha_pattern": list((config.get("alpha_pattern") or {}).items()),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(file.entries):
        entry = file.entries[name]
        digest.update(f"\n{name} {entry.dtype} {list(entry.shape)}\n".encode())
        digest.update(tensor_bytes(file.tensor(name)))
    return digest.hexdigest()


def write_adapter(
    folder: str | Path,
    modules: Mapping[str, LoraWeights],
    *,
    base_model_name: str,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT adapter (float32) that `PeftModel.from_pretrained` loads, with `alpha = scale · r` for each module.

    A new folder appears complete or not at all; in an existing one the two files are replaced and other files stay.

    Args:
        modules: module name → LoraWeights; a lazy mapping is written module by module.
        base_model_name: the base's hub id or path, for adapter_config.json.
        extra_config: further keys of PEFT's LoraConfig (lora_dropout, revision, …).

    Raises:
        OSError: it cannot be written.
    """
    assert modules
    folder = Path(folder)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in sorted(modules):
        weights = modules[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = ("F32", tuple(weights.a.shape))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = ("F32", tuple(weights.b.shape))
        ranks[module] = weights.rank
        alpha = weights.scale * weights.rank
        # 16 / r · r may not be 16 exactly
        alphas[module] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    rank, rank_pattern = _pattern(ranks)
    alpha, alpha_pattern = _pattern(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _target_modules(list(ranks)),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        **(extra_config or {}),
    }

    def write(name: str, file: BinaryIO) -> None:
        match = _KEY.fullmatch(name.removeprefix(PREFIX))
        assert match is not None
        weights = modules[match["module"]]
        file.write(tensor_bytes((weights.a if match["side"] == "A" else weights.b).float().cpu()))

    def write_both(into: Path) -> None:
        write_stream(into / WEIGHTS_NAME, tensors, write, {"format": "pt"})
        write_text(into / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")

    if folder.is_dir():
        write_both(folder)
        return
    make_folder(folder.parent)
    with folder_aside(folder) as aside:
        write_both(aside)


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and a PEFT pattern for the others: by leaf name (`q_proj`) where all of a leaf agree."""
    default = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[Any]] = defaultdict(set)
    for module, value in values.items():
        by_leaf[_leaf(module)].add(value)
    pattern = {}
    for module, value in values.items():
        if value != default:
            pattern[_leaf(module) if len(by_leaf[_leaf(module)]) == 1 else module] = value
    return default, pattern


def _target_modules(modules: Sequence[str]) -> list[str]:
    """Leaf names (`q_proj`) where the adapter has that leaf in every layer, full names otherwise; sorted.

    (PEFT gives a leaf name a LoRA in every layer.)
    """
    layers: dict[str, list[int | None]] = defaultdict(list)  # leaf → index of each module's layer, None outside of them
    parents: set[str] = set()
    for module in modules:
        match = _LAYER.fullmatch(module)
        layers[_leaf(module)].append(int(match["index"]) if match else None)
        parents |= {match["parent"]} if match else set()
    count = 1 + max((index for found in layers.values() for index in found if index is not None), default=-1)
    everywhere = {leaf for leaf, found in layers.items() if set(found) == set(range(count)) and len(found) == count}
    if len(parents) != 1:
        everywhere = set()
    return sorted({_leaf(module) if _leaf(module) in everywhere else module for module in modules})


def fetch_adapter(name_or_path: str | Path, revision: str | None = None, *, beside: Sequence[str] = ()) -> Path:
    """The folder of an adapter: a local one, or a hub id, of which its two files are downloaded.

    Args:
        beside: patterns of further files to download.

    Raises:
        UserError: there is no such folder, and no such adapter on the hub, or no access to it.
    """
    if (local := local_folder(str(name_or_path))) is not None:
        return local
    return download("adapter", str(name_or_path), revision, [CONFIG_NAME, WEIGHTS_NAME, *beside])
