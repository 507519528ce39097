"""Unsloth under TRL's trainers: its loader, its kernels, its gradient checkpointing.

Its fused kernels know one active adapter. So the adapters below are treated as engine trl treats them: merged into a
16- or 32-bit base under a fresh adapter, and on a 4-bit base trained on (composed into one, at their own rank) against
the frozen copy that TRL's DPO makes of them.

What Unsloth would change silently is refused: another dtype than asked for, 16 bits where 4 were asked for, scales of
the weights that are not quantized, rotary embeddings stretched beyond the model's own length, an extended vocabulary.

Unsloth replaces classes of transformers, PEFT and TRL, so it has to be imported before them, and this module imports nothing
heavy. The command line imports it once it knows the engine; from Python, before any other import::

    from zephyr_lite.engines import start_unsloth
    start_unsloth()
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..io.run_dir import cache_dir

if TYPE_CHECKING:
    from ..config.load import RunConfig
    from ..model.base import Base

WANTED = ">=2026.10.7,<2026.11"  # as the extra in pyproject.toml
INSTALL = 'pip install "zephyr-lite[unsloth]"'


def start_unsloth() -> None:
    """Import Unsloth."""
    if hasattr(sys.modules.get("unsloth"), "FastLanguageModel"):
        return
    if conflicts := unsloth_conflicts():
        raise UserError(
            f"engine unsloth: {'; '.join(conflicts)}.", f"{INSTALL}, in an environment of its own; or set engine=trl."
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # it writes the sources that it generates, into the current folder by default
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / f"unsloth-{version('unsloth')}"))
    try:
        importlib.import_module("unsloth")
    except Exception as error:
        raise UserError(
            f"engine unsloth: unsloth {version('unsloth')} does not start here: {type(error).__name__}: {error}",
            f"It needs a GPU that it knows, and the versions of its extra: {INSTALL}. Or set engine=trl.",
        ) from error


def unsloth_conflicts() -> list[str]:
    """The reasons why it cannot be imported; empty where there are none."""
    from packaging.specifiers import SpecifierSet

    result = []
    for name in ("unsloth", "unsloth_zoo"):
        try:
            if not SpecifierSet(WANTED).contains(version(name), prereleases=True):
                result.append(f"{name} {version(name)} is installed, wanted is {WANTED}")
        except PackageNotFoundError:
            result.append(f"{name} {WANTED} is not installed")
    return result


def load_unsloth(config: RunConfig) -> Base:
    """The base through ``FastLanguageModel.from_pretrained``, frozen, from the folder that the other engines read."""
    start_unsloth()
    from unsloth import FastLanguageModel

    from ..model.base import compute_device, compute_dtype, fetch_base, frozen_base, quantization_of
    from ..model.base_folder import read_model_config
    from ..model.files import check_config_file, has_text_model

    folder = fetch_base(config.model_name_or_path, config.model_revision)
    if has_text_model(check_config_file(folder)):
        raise UserError(
            f"{folder}: a multimodal model, which Unsloth loads with its other parts.",
            "Set engine=fused or engine=trl, which load the text model alone.",
        )
    model_config: Any = read_model_config(folder, any_family=True)
    device = compute_device()
    dtype = compute_dtype(config.dtype, device)
    stored = getattr(model_config, "quantization_config", None)
    _, four_bit, double = quantization_of(config, stored, folder, dtype)
    if four_bit and stored is None and not double:
        raise UserError(
            "bnb_4bit_use_double_quant false: Unsloth always quantizes the scales of a base that it quantizes.",
            "Set bnb_4bit_use_double_quant=true, or engine=fused.",
        )
    own_length = getattr(model_config, "max_position_embeddings", None) or config.max_length
    model, _ = FastLanguageModel.from_pretrained(
        str(folder),
        max_seq_length=min(config.max_length, own_length),  # beyond its own it would stretch the positions
        dtype=dtype,
        load_in_4bit=four_bit,
        load_in_16bit=not four_bit,
        device_map={"": str(device)},
        use_exact_model_name=True,
        random_state=config.seed,
    )
    embedding = model.get_input_embeddings().weight
    found = {
        "load_in_4bit": (any(getattr(p, "quant_state", None) is not None for p in model.parameters()), four_bit),
        "dtype": (embedding.dtype, dtype),
        "the vocabulary's size": (embedding.shape[0], model_config.vocab_size),
    }
    for name, (there, wanted) in found.items():  # Unsloth prints a line and continues
        if there != wanted:
            raise UserError(
                f"{folder}: Unsloth {version('unsloth')} loaded it with {name} {there}, wanted was {wanted}.",
                "Ask for what it does here, or set engine=trl.",
            )
    return frozen_base(model, config, folder, dtype, device, four_bit=four_bit, double_quant=double)


def unsloth_model(model: Any, shape: dict[str, Any], *, dropout: float, seed: int, checkpointing: bool) -> Any:
    """``FastLanguageModel.get_peft_model``: Unsloth's PeftModel with a fresh adapter. ``shape``: its rank, alpha, patterns and
    targets; targets are projections, or the full names of modules where there is a rank_pattern."""
    from unsloth import FastLanguageModel

    from ..model.adapters import AdapterStack

    targets = shape["target_modules"]
    made = FastLanguageModel.get_peft_model(
        model,
        **{**shape, "target_modules": sorted({module.rsplit(".", 1)[-1] for module in targets})},
        lora_dropout=dropout,
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=seed,
    )
    if "rank_pattern" in shape and {name for name, _ in AdapterStack(made).lora_layers()} != set(targets):
        raise UserError(
            "the adapters below are on some layers only, in a pattern that Unsloth's adapter cannot have.",
            "Set engine=fused.",
        )
    return made
