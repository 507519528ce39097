"""What a base's folder holds, before anything is loaded: its configuration, its tensors' names and shapes, its fingerprint."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from ..errors import UserError
from ..io.safetensors import tensor_bytes
from ..io.text import shown
from .families import FAMILIES, NAMES, family_of, head_width, layer_windows
from .files import again, check_config_file, has_text_model, open_shards

# the configuration keys that a model's output depends on; ``fingerprint`` adds head_dim and the layers' windows
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
)
# what a layer or the head would compute if the key is set
_REFUSED = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "resid_pdrop",
    "embd_pdrop",
)
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
OTHER_MODEL = "The files belong to different models; fetch the model again."
NF4_STATE = ".quant_state.bitsandbytes__nf4"


def read_model_config(folder: Path, *, any_family: bool = False) -> Any:
    """The model's configuration; of a multimodal one the text model's (``has_text_model``).

    Args:
        any_family: accept families and variants that the fused engine does not know.
    """
    path = folder / "config.json"
    told = check_config_file(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each model's own checks raise what they like
        if "auto_map" in told and "trust_remote_code" in str(error):
            raise UserError(
                f"{path}: needs code of its own (auto_map: {shown(told['auto_map'])}), which is never run.",
                "Use a model of a family that transformers knows by itself.",
            ) from error
        what, hint = " ".join(str(error).split()) or type(error).__name__, again(path)
        if '"su"' in path.read_text(encoding="utf-8"):  # of Phi-3's first revisions
            hint = 'Write "longrope" instead of "su", its older name, into the file, or take a later revision of the model.'
        raise UserError(f"{path}: not a configuration that transformers reads: {shown(what, 300)}", hint) from error
    if has_text_model(told):
        config = config.get_text_config()
        for key in ("quantization_config", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            if key in told:
                setattr(config, key, told[key])
    if not any_family:
        check_family(config, str(path))
    return config


def check_family(config: Any, where: str) -> None:
    """Refuse models that the decoder layer would compute wrongly.

    Raises:
        UserError: another family, or a variant of the family that the fused engine does not know.
    """
    rope = getattr(config, "rope_parameters", None) or {}  # one, or one for each type of layer
    ropes = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    activation, known = getattr(config, "hidden_act", None), family_of(config).activation
    activation = activation or getattr(config, "hidden_activation", None)
    refused = [key for key in _REFUSED if getattr(config, key, None)]
    problem, hint = "", "Set engine=trl, which trains any architecture."
    if config.model_type not in FAMILIES:
        problem = f"model_type is {shown(config.model_type)}; the fused engine knows the families {NAMES}"
        hint += " docs/extending.md shows how a family is added."
    elif "dynamic" in ropes:
        problem = "rotary embeddings of type dynamic, which depend on the length of a sequence"
    elif activation != known:
        problem = f"hidden_act {activation!r}; the fused engine knows {known}"
    elif family_of(config).q_scale and "original_max_position_embeddings" not in rope:
        problem = "rope_parameters has no original_max_position_embeddings, which the scale of the queries depends on"
        hint = "Copy config.json again from where it came from."
    elif refused:
        problem = f"{refused[0]} is {getattr(config, refused[0])}, which the fused engine does not compute"
    else:
        try:
            layer_windows(config)
        except ValueError as error:
            problem = str(error)
    if problem:
        raise UserError(f"{where}: {problem}.", hint)


def check_length(config: Any, max_length: int, where: str) -> None:
    """Refuse sequences for which the rotary frequencies would depend on the other sequences of a micro-batch.

    Raises:
        UserError: the type is longrope, which has other frequencies from a length on, and max_length is beyond it.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and max_length > (limit := rope["original_max_position_embeddings"]):
        raise UserError(
            f"{where}: rotary embeddings of type longrope, which change in sequences of more than {limit:,} tokens; "
            f"max_length is {max_length:,}.",
            f"Set max_length={limit} or less, or engine=trl.",
        )


def check_weights(folder: Path, config: Any) -> None:
    """Check every file of the weights; for the fused engine's families, compare tensor names and shapes with the model.

    Tensors that the files lack are reported on loading.
    """
    holds = {name: file for file in open_shards(folder).values() for name in file.entries}
    if config.model_type not in FAMILIES:
        return
    layers = max((1 + int(match[1]) for match in map(_LAYER.match, holds) if match), default=0)
    if layers not in (0, config.num_hidden_layers):
        raise UserError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have {layers}.", OTHER_MODEL
        )
    places = empty_model(folder, config).state_dict()
    for name, file in holds.items():
        weight = name.partition(".weight.")[0].removesuffix(".weight") + ".weight"
        if weight + NF4_STATE in holds or name.endswith("rotary_emb.inv_freq"):
            continue  # bitsandbytes' parts of an NF4 weight; what transformers computes and old checkpoints hold
        shape, wanted = file.entries[name].shape, places.get(name, places.get(f"model.{name}"))
        if wanted is None:
            problem = "for which the model of config.json has no place"
        elif wanted.shape != shape:
            problem = f"which is {list(shape)}; by config.json it is {list(wanted.shape)}"
        else:
            continue
        raise UserError(f"{file.path}: holds tensor {shown(name)}, {problem}.", OTHER_MODEL)


def empty_model(folder: Path, config: Any) -> Any:
    """The model of a configuration, on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # each model's own checks raise what they like
        path = folder / "config.json"
        raise UserError(f"{path}: not a model that transformers builds: {shown(error, 300)}.", again(path)) from error


def stored_settings(stored: Any, folder: Path) -> BitsAndBytesConfig:
    """The quantization settings of a base that is stored quantized."""
    told = stored if isinstance(stored, dict) else stored.to_dict()
    if not told.get("load_in_4bit") or told.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{folder}/config.json: the base is stored quantized as {shown(told.get('quant_method'))}"
            f"/{shown(told.get('bnb_4bit_quant_type', 'other'))}; only bitsandbytes' NF4 can be trained on.",
            "Use the 16-bit base, or one quantized to NF4.",
        )
    return BitsAndBytesConfig.from_dict(told)


def fingerprint(folder: Path) -> str:
    """A hash that tells bases apart in milliseconds: the configuration that the output depends on, and of every tensor its
    name, dtype, shape and 4 KiB at 4 places.

    Files that transformers does not read, how tensors are split into files, and keys such as use_cache do not count.
    """
    config = read_model_config(folder, any_family=True)
    told = {key: getattr(config, key, None) for key in _ARCHITECTURE}
    if config.model_type in FAMILIES:
        told |= {"head_dim": head_width(config), "windows": layer_windows(config)}
        told |= {
            key: getattr(config, key) for key in ("no_rope_layers", "query_pre_attn_scalar") if hasattr(config, key)
        }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    holds = {name: file for file in open_shards(folder).values() for name in file.entries}
    for name in sorted(holds):
        entry, data = holds[name].entries[name], tensor_bytes(holds[name].tensor(name))
        digest.update(repr((name, entry.dtype, entry.shape)).encode())
        for place in range(4):
            start = len(data) * place // 4
            digest.update(data[start : start + 2**12])
    return digest.hexdigest()


def is_fingerprint_of(known: str, folder: Path) -> bool:
    """Whether a fingerprint in a stage.json, of this version or of an earlier one, is the folder's."""
    return known in (fingerprint(folder), _fingerprint_of_files(folder))


def check_fingerprint(known: str | None, folder: Path, trained: str) -> None:
    """Refuse a folder that is not the base that something was trained on.

    Args:
        known: the base's fingerprint in stage.json; None: unknown, nothing is compared.
        trained: what was trained on the base, for the message.
    """
    if known is not None and not is_fingerprint_of(known, folder):
        raise UserError(
            f"{folder}: is not the model that {trained} was trained on (its files changed since, or it is another model).",
            "Restore it, or give the folder of that model with --base (in training: model_name_or_path=FOLDER).",
        )


def _fingerprint_of_files(folder: Path) -> str:
    """The fingerprint of earlier versions: config.json, and of every safetensors file 1 MiB and 64 KiB at 16 places."""
    config = check_config_file(folder)
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(min(size, 2**20)))
            for place in range(16):
                file.seek(size * place // 16)
                digest.update(file.read(2**16))
    return digest.hexdigest()
