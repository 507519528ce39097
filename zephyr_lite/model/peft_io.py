"""LoRA adapters as files, in PEFT's format: read, check, hash, write.

Tensors are mapped from the file, not loaded: rank 144 on Mistral-7B takes 1.5 GB in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt
from torch import Tensor

from ..errors import UserError
from ..io.atomic import folder_aside, write_text
from ..io.safetensors import SafetensorsFile, tensor_bytes, write_stream
from ..io.text import check_values, read_object, shown
from .files import checked_place, download, named_folder, pickles, text_name

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD = "README.md"
PREFIX = "base_model.model."
# each of these makes the adapter more than W + s·B·A
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# these initializations subtract the adapter's first value from the base, so the file belongs to that changed base
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_AGAIN = "Copy the adapter again, or write it again with PEFT's save_pretrained."
# prefixes that launchers, torch.compile and PEFT models wrapped twice leave in tensor names
_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_PREFIXES = re.compile(r"^(?:base_model\.model\.|module\.)*")
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>\w+))?\.weight")


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


@dataclass
class AdapterFile:
    """A PEFT LoRA adapter on disk.

    Attributes:
        path: its folder.
        config: its adapter_config.json.
        modules: module name (`model.layers.0.self_attn.q_proj`) → LoraWeights; float32 files are mapped, not loaded.
        copies: whole parameters in the file, which PEFT adds for embeddings: name (`lm_head.weight`) → parameter.
    """

    path: Path
    config: dict[str, Any]
    modules: Mapping[str, LoraWeights]
    copies: Mapping[str, Tensor] = field(default_factory=dict)

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
        for name, mine in self.copies.items():
            own = of_base(name)
            if own is not None:
                mine = mine.to(own.device)
                # equal, or rounded to the other's dtype
                if torch.equal(mine.to(own.dtype), own) or torch.equal(own.to(mine.dtype), mine):
                    continue
            found = "the base has none" if own is None else f"the base's is {list(own.shape)} with other values"
            raise UserError(
                f"{self.path}: holds a whole {shown(name)} {list(mine.shape)} beside its LoRA; {found}, so it was trained too.",
                _by_peft(self.path),
            )


class _Settings(BaseModel):
    """The keys of adapter_config.json that the weights are computed from, and the base's name."""

    model_config = ConfigDict(strict=True, extra="ignore")
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    base_model_name_or_path: str | None = None


def _open(folder: Path) -> tuple[dict[str, Any], SafetensorsFile]:
    """An adapter's configuration, checked but for target_modules (the modules are those of the weights), and weights."""
    path, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(
            f"{folder}: no {CONFIG_NAME} there, so it is not a PEFT adapter.",
            "Give the folder that PEFT's save_pretrained wrote; for a run, a stage's adapter/.",
        )
    config = read_object(checked_place(path), hint=_AGAIN)
    other = [key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if config.get(key, "none") != plain]
    other += filter(config.get, UNSUPPORTED)
    if str(config.get("init_lora_weights")).lower().startswith(RESIDUAL_INITS):
        other.append("init_lora_weights")
    if other:
        hint = _by_peft(folder)
        if other == ["init_lora_weights"]:
            hint = "Convert it to a plain LoRA: PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…)."
        told = shown(repr(config.get(other[0])))
        raise UserError(f"{path}: {other[0]} is {told}; such an adapter cannot be stacked here.", hint)
    check_values(_Settings, config, path, _AGAIN)
    if not weights.is_symlink() and not weights.exists():
        raise UserError(
            f"{folder}: holds no {WEIGHTS_NAME} (found {pickles(folder)}).",
            "Load it with PEFT and save it again: model.save_pretrained(folder, safe_serialization=True).",
        )
    return config, SafetensorsFile(checked_place(weights))


def read_adapter(path: str | Path) -> AdapterFile:
    """Read a PEFT LoRA adapter's folder.

    Raises:
        UserError: a file is missing, it is not plain LoRA (DoRA, biases, modules_to_save, …), or a module's matrices do not
            fit each other or the configuration.
    """
    folder = Path(path)
    config, file = _open(folder)
    names: dict[str, dict[str, str]] = defaultdict(dict)
    copies: dict[str, Tensor] = {}
    for name in file.entries:
        plain = _PREFIXES.sub("", _WRAPPERS.sub("", name))
        plain = text_name(plain) or plain  # trained on a multimodal model
        match = _KEY.fullmatch(plain)
        if match is not None:
            sides = names[match["module"]]
            if match["side"] in sides:
                raise UserError(
                    f"{file.path}: holds two adapters, {shown(sides[match['side']])} and {shown(name)}.",
                    "Save them one by one: PEFT's save_pretrained(folder, selected_adapters=[NAME]).",
                )
            sides[match["side"]] = name
        elif plain.endswith(".weight") and "lora_" not in plain and ".modules_to_save." not in plain:
            copies[plain.replace(".base_layer.", ".")] = file.tensor(name)
        else:
            raise UserError(
                f"{file.path}: tensor {shown(name)} is no LoRA matrix of a linear layer, and cannot be stacked here.",
                _by_peft(folder),
            )
    if not names:
        raise UserError(f"{file.path}: holds no LoRA weights.", _AGAIN)
    modules = {module: _read_module(file, config, module, names[module]) for module in sorted(names)}
    return AdapterFile(folder, config, modules, copies)


def _read_module(file: SafetensorsFile, config: dict[str, Any], module: str, names: dict[str, str]) -> LoraWeights:
    """One module's matrices and scale, checked."""
    a, b = (file.tensor(names[side]) if side in names else torch.empty(0) for side in "AB")
    ranks = {config.get("r", 8), *(config.get("rank_pattern") or {}).values()}
    floats = a.is_floating_point() and b.is_floating_point()
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] not in ranks or not floats:
        raise UserError(
            f"{file.path}: {shown(module)} has lora_A {list(a.shape)} and lora_B {list(b.shape)}; by {CONFIG_NAME} they are "
            f"float matrices [r, in] and [out, r] of rank {' or '.join(map(str, sorted(ranks)))}.",
            "The adapter is incomplete, or its files belong to different adapters; save it again, or copy both files.",
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError(
            f"{file.path}: the LoRA of {shown(module)} holds NaN or infinite values.",
            "Its training had gone wrong; take an earlier checkpoint of it.",
        )
    alpha, rank = config.get("lora_alpha", 8), a.shape[0]
    for key, value in (config.get("alpha_pattern") or {}).items():
        # PEFT's rule: the first key that, as a regular expression, matches the end of the name, from a dot on
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return LoraWeights(a.float(), b.float(), float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _by_peft(folder: Path) -> str:
    """Hint for an adapter that is more than W + s·B·A: merge it with PEFT, and use the result as the base."""
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = repr(str(folder)) if own else "m.peft_config['default'].base_model_name_or_path"
    return (
        "Merge it with PEFT, and name the result (MERGED) as the base: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; '
        f"m = M.from_pretrained({str(folder)!r}, dtype='auto'); m.merge_and_unload().save_pretrained('MERGED'); "
        f"T.from_pretrained({tokenizer}).save_pretrained('MERGED')\""
    )


def compose(adapters: Sequence[AdapterFile]) -> dict[str, LoraWeights]:
    """One adapter that equals the sum of all: Σ sᵢ BᵢAᵢ = [s₁B₁ s₂B₂ …] @ [A₁; A₂; …].

    Returns:
        module name → LoraWeights with scale 1, float32.
    """
    parts: dict[str, list[LoraWeights]] = defaultdict(list)
    for adapter in adapters:
        for module, weights in adapter.modules.items():
            parts[module].append(weights)
            if (shape := parts[module][0].shape) != weights.shape:
                raise UserError(
                    f"{adapter.path}: {module} is {list(weights.shape)}, in an adapter below it {list(shape)}.",
                    "The adapters were trained on different bases and cannot be stacked.",
                )
    return {
        module: LoraWeights(torch.cat([w.a for w in found]), torch.cat([w.b * w.scale for w in found], dim=1), 1.0)
        for module, found in sorted(parts.items())
    }


def other_base(config: Mapping[str, Any], name_or_path: str) -> str | None:
    """A note on an adapter whose configuration names another base than the one it is used on; None: the same name.

    Only a note, since a base that was moved has another name.
    """
    told = config.get("base_model_name_or_path")
    if not told or told == name_or_path or Path(told).name == Path(name_or_path).name:
        return None
    return (
        f"its configuration names {shown(told)} as the base, it is used on {name_or_path}: right only if both are the same "
        "weights"
    )


def adapter_sha256(path: str | Path) -> str:
    """Content hash of an adapter: sorted tensor names, dtypes, shapes and bytes, and the settings of rank and alpha.

    The order of the tensors and the base's name do not change it.
    """
    config, file = _open(Path(path))
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
    rslora: bool = False,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT adapter (float32) that `PeftModel.from_pretrained` loads, with `alpha = scale · r` for each module.

    A new folder appears complete or not at all; in an existing one the two files are replaced and other files stay.

    Args:
        modules: module name → LoraWeights.
        base_model_name: the base's hub id or path, for adapter_config.json.
        rslora: write `use_rslora`, with `alpha = scale · √r`.
        extra_config: further keys of PEFT's LoraConfig (lora_dropout, revision, …).
    """
    folder = Path(folder)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(folder) as aside:
            write_adapter(aside, modules, base_model_name=base_model_name, rslora=rslora, extra_config=extra_config)
        return
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module in sorted(modules):
        weights = modules[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = ("F32", tuple(weights.a.shape))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = ("F32", tuple(weights.b.shape))
        ranks[module] = weights.rank
        alpha = weights.scale * (math.sqrt(weights.rank) if rslora else weights.rank)
        # 16 / r · r may not be 16 exactly
        alphas[module] = round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
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
        "use_rslora": rslora,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(ranks),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        **(extra_config or {}),
    }

    def write(name: str, file: BinaryIO) -> None:
        module, _, side = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        weights = modules[module]
        file.write(tensor_bytes((weights.a if side == "lora_A" else weights.b).float().cpu()))

    write_stream(folder / WEIGHTS_NAME, tensors, write, {"format": "pt"})
    write_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def fetch_adapter(name_or_path: str | Path, revision: str | None = None, *, beside: Sequence[str] = ()) -> Path:
    """The folder of an adapter: a local one, or a hub id, of which its two files are downloaded.

    Args:
        beside: patterns of further files to download.
    """
    if (local := named_folder("adapter", str(name_or_path))) is not None:
        return local
    return download("adapter", str(name_or_path), revision, [CONFIG_NAME, WEIGHTS_NAME, *beside])
