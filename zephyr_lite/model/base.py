"""The base model: found, checked, loaded once, frozen, in NF4, and told apart from other bases.

The first start quantizes a 16-bit base with transformers and bitsandbytes and saves the 4-bit model with ``save_pretrained``
in the user's cache; later starts load that copy. Plain transformers loads it too.

    ~/.cache/zephyr-lite/quantized/NAME-FINGERPRINT-nf4-double-bfloat16-v2/
        config.json  model-00001-of-00008.safetensors …  zephyr_lite.json

The environment variable ``ZEPHYR_LITE_CACHE`` replaces ``~/.cache/zephyr-lite``. A copy is used as long as the base's files
have the names, sizes and modification times that they had when it was made, and its own files the hashes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from ..config.load import RunConfig
from ..errors import UserError
from ..io.atomic import folder_aside, make_folder, remove_tree, write_json
from ..io.run_dir import cache_dir, read_json
from ..io.safetensors import tensor_bytes
from ..io.text import shown
from ..ops.nf4 import Linear4bit  # not from bitsandbytes: see ops/compile_later.py
from .families import FAMILIES, NAMES, head_width, layer_windows
from .files import again, check_config_file, fetch_base, open_shards, weight_files
from .tokenizer import check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

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
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_OTHER_MODEL = "The files belong to different models; fetch the model again."
NF4_STATE = ".quant_state.bitsandbytes__nf4"
# of a quantized copy
FORMAT = 2  # part of the folder's name: a copy of another format is made again
MANIFEST = "zephyr_lite.json"
SHARD_SIZE = "512MB"  # a shard is copied to the host as a whole when it is written


@dataclass(frozen=True)
class Base:
    """A loaded base model.

    Attributes:
        model: the Hugging Face model, every parameter frozen.
        tokenizer: its tokenizer.
        path: the folder that it was read from.
        name_or_path: the name that the user gave.
        dtype: compute dtype.
        device: where it computes; its parameters are there too, unless it is streamed.
        fingerprint: of its files (see ``fingerprint``).
        load_in_4bit, double_quant: how its linear layers are stored.
        streamed: the parameters are on the host, whatever `device` is.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name_or_path: str
    revision: str
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    load_in_4bit: bool
    double_quant: bool
    streamed: bool = False

    def describe(self) -> dict[str, Any]:
        """The base's entry in stage.json."""
        return {
            "name_or_path": self.name_or_path,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "load_in_4bit": self.load_in_4bit,
            "double_quant": self.double_quant,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def compute_device() -> torch.device:
    """The current CUDA device, or the CPU where there is none.

    Raises:
        UserError: torch is a ROCm build, whose devices it calls CUDA's.
    """
    if torch.version.hip is not None and torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} is a ROCm build; zephyr-lite supports NVIDIA cards only.",
            "Use a machine with an NVIDIA card and a CUDA build of torch, or hide the card to compute on the CPU: "
            "HIP_VISIBLE_DEVICES=-1.",
        )
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(choice: str, device: torch.device) -> torch.dtype:
    """``auto``: bfloat16 from compute capability 8.0, float16 on older cards, float32 on a CPU (bf16 is slower there)."""
    if choice != "auto":
        return getattr(torch, choice)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def read_model_config(folder: Path, *, any_family: bool = False) -> Any:
    """The model's configuration.

    Args:
        any_family: accept families and variants that the fused engine does not know.

    Raises:
        UserError: the file is broken, needs code of its own, or is of a family or variant that is not accepted.
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
        what = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: not a configuration that transformers reads: {shown(what, 300)}", again(path)
        ) from error
    if not any_family:
        check_family(config, str(path))
    return config


def check_family(config: Any, where: str) -> None:
    """Refuse models that the decoder layer would compute wrongly.

    Raises:
        UserError: another family, or a variant of the family that the fused engine does not know.
    """
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    problem, hint = "", "Set engine=trl, which trains any architecture."
    if config.model_type not in FAMILIES:
        problem = f"a {config.model_type} model; the fused engine knows the families {NAMES}"
        hint += " docs/extending.md shows how a family is added."
    elif rope in ("dynamic", "longrope"):
        problem = f"rotary embeddings of type {rope}, which depend on the length of a sequence"
    elif config.hidden_act != "silu":
        problem = f"hidden_act {config.hidden_act!r}; the fused engine knows silu"
    else:
        try:
            layer_windows(config)
        except ValueError as error:
            problem = str(error)
    if problem:
        raise UserError(f"{where}: {problem}.", hint)


def check_weights(folder: Path, config: Any) -> None:
    """Check every file of the weights; for the fused engine's families, compare tensor names and shapes with the model.

    Tensors that the files lack are reported on loading.

    Raises:
        UserError: a file is broken; the model has no place for a tensor, or one of another shape.
    """
    holds = {name: file for file in open_shards(folder).values() for name in file.entries}
    if config.model_type not in FAMILIES:
        return
    layers = 0
    for name in holds:
        if match := _LAYER.match(name):
            layers = max(layers, 1 + int(match[1]))
    if layers not in (0, config.num_hidden_layers):
        raise UserError(
            f"{folder}: config.json says {config.num_hidden_layers} layers, the weights have {layers}.", _OTHER_MODEL
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
        raise UserError(f"{file.path}: holds tensor {shown(name)}, {problem}.", _OTHER_MODEL)


def empty_model(folder: Path, config: Any) -> Any:
    """The model of a configuration, on the meta device.

    Raises:
        UserError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    except Exception as error:  # each model's own checks raise what they like
        path = folder / "config.json"
        raise UserError(f"{path}: not a model that transformers builds: {shown(error, 300)}.", again(path)) from error


def stored_settings(stored: Any, folder: Path) -> BitsAndBytesConfig:
    """The quantization settings of a base that is stored quantized.

    Raises:
        UserError: it is stored in another format than bitsandbytes' NF4.
    """
    told = stored if isinstance(stored, dict) else stored.to_dict()
    if not told.get("load_in_4bit") or told.get("bnb_4bit_quant_type") != "nf4":
        raise UserError(
            f"{folder}/config.json: the base is stored quantized as {shown(told.get('quant_method'))}"
            f"/{shown(told.get('bnb_4bit_quant_type', 'other'))}; only bitsandbytes' NF4 can be trained on.",
            "Use the 16-bit base, or one quantized to NF4.",
        )
    return BitsAndBytesConfig.from_dict(told)


def quantization_of(config: RunConfig, stored: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, bool, bool]:
    """The settings for from_pretrained, whether the base is in 4 bits, and whether its scales are quantized too."""
    if stored is not None:
        return None, True, bool(stored_settings(stored, folder).bnb_4bit_use_double_quant)
    if not config.load_in_4bit:
        return None, False, False
    double = config.bnb_4bit_use_double_quant
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return settings, True, double


def load_base(config: RunConfig, *, device: torch.device | None = None, stream: bool = False) -> Base:
    """Load the base of a run, frozen, onto the GPU where there is one.

    Args:
        device: where to compute; None: the GPU where there is one.
        stream: leave every parameter on the host, possibly mapped from the file.

    Raises:
        UserError: it cannot be found or read, is of another family, or is stored quantized in another format than NF4.
    """
    folder = fetch_base(config.model_name_or_path, config.model_revision)
    model_config = read_model_config(folder, any_family=config.engine == "trl")
    device = device or compute_device()
    place = torch.device("cpu") if stream else device
    dtype = compute_dtype(config.dtype, device)
    stored = getattr(model_config, "quantization_config", None)
    settings, four_bit, double = quantization_of(config, stored, folder, dtype)
    if four_bit and dtype == torch.float64:
        raise UserError("dtype float64: bitsandbytes dequantizes to at most float32.", "Set load_in_4bit=false.")
    if not sys.stderr.isatty():
        disable_progress_bar()  # unreadable in a log file
    check_weights(folder, model_config)
    known = model_config.model_type in FAMILIES
    if settings is not None and known:  # other families may rename their tensors on loading
        model = _load_quantized(folder, config.model_name_or_path, model_config, settings, dtype, device, place)
    else:
        model = _from_pretrained(folder, model_config, dtype, place, settings)
    model.config._name_or_path = model.name_or_path = str(folder)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # bitsandbytes would repack the weight in place at the first evaluation, and the layers would read noise
            module.support_avx512bf16_for_cpu = False
            if device.type == "cpu" and module.in_features % 64:
                raise UserError(
                    f"{folder}: a weight has {module.in_features} input features; on a CPU bitsandbytes gives wrong values "
                    "for rows that are no multiple of 64.",
                    "Set load_in_4bit=false, or run it on a GPU.",
                )
    if stored is not None and known:
        # embedding, norms and head, of which transformers keeps a 4-bit checkpoint's own dtype
        for parameter in model.parameters():
            if not hasattr(parameter, "quant_state"):
                parameter.data = parameter.data.to(dtype)
    return frozen_base(model, config, folder, dtype, device, four_bit=four_bit, double_quant=double, streamed=stream)


def _from_pretrained(
    source: Path, model_config: Any, dtype: torch.dtype, place: torch.device, quantization: BitsAndBytesConfig | None
) -> Any:
    """Load a folder whose files were checked (``check_weights``), and check that every weight was loaded."""
    model, loaded = AutoModelForCausalLM.from_pretrained(
        source,
        output_loading_info=True,
        trust_remote_code=False,
        config=copy.deepcopy(model_config),
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": str(place)},
        use_safetensors=True,
    )
    for key, what in (
        ("missing_keys", "no tensor {} in its files"),  # transformers initialized them at random
        ("unexpected_keys", "holds tensor {}, for which the model of config.json has no place"),
    ):
        if names := sorted(loaded[key]):
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise UserError(f"{source}: {what.format(shown(names[0]) + more)}.", _OTHER_MODEL)
    return model


def _load_quantized(
    source: Path,
    name: str,
    model_config: Any,
    settings: BitsAndBytesConfig,
    dtype: torch.dtype,
    device: torch.device,
    place: torch.device,
) -> Any:
    """The quantized model, from its copy in the cache, which is made first if there is none or the base's files have changed.

    Where the cache cannot be written, the model is quantized in memory, with a warning. The parameters go to `place`.
    """
    known = fingerprint(source)
    double = "-double" if settings.bnb_4bit_use_double_quant else ""
    suffix = f"{known[:16]}-nf4{double}-{str(dtype).removeprefix('torch.')}-v{FORMAT}"
    sources = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weight_files(source)}

    def manifest(folder: Path) -> dict[str, Any]:
        files = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:  # training with one flipped bit would not fail, only be wrong
                files[path.name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
        return {"format": FORMAT, "fingerprint": known, "files": files, "sources": sources}

    kept, model = quantized_dir(), None
    try:
        make_folder(kept)
        with FileLock(kept / f".lock-{suffix}"):
            # the base may have had another name when it was made
            own = kept / f"{Path(name).name.lstrip('.')[:40] or 'base'}-{suffix}"
            folder = min(kept.glob(f"[!.]*-{suffix}"), default=own)
            if read_json(folder / MANIFEST) != manifest(folder):
                if folder.exists():
                    logger.warning(f"{folder}: damaged, or made of other files of the base; it is made again")
                    remove_tree(folder)
                logger.info(f"quantizing the base once; later starts read {folder}")
                room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
                # for a streamed base, too: a card takes seconds, a CPU minutes
                where = device if room > sum(size for size, _ in sources.values()) / 2 else place
                model = _from_pretrained(source, model_config, dtype, where, settings)
                with folder_aside(folder) as aside:
                    model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
                    write_json(aside / MANIFEST, manifest(aside))
                model = None
    except (OSError, SafetensorError, NotImplementedError) as error:  # a file system without locks, too
        logger.warning(
            f"{kept}: the quantized base cannot be kept there ({getattr(error, 'strerror', None) or error}); make room, "
            "make it writable, or name another folder in the environment variable ZEPHYR_LITE_CACHE. The base is quantized "
            "in memory, now and at every start."
        )
        return _from_pretrained(source, model_config, dtype, place, settings) if model is None else model
    quantized = copy.deepcopy(model_config)
    quantized.quantization_config = settings.to_dict()
    return _from_pretrained(folder, quantized, dtype, place, None)


def quantized_dir() -> Path:
    """The folder of quantized bases in the user's cache."""
    return cache_dir() / "quantized"


def frozen_base(
    model: Any,
    config: RunConfig,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    four_bit: bool,
    double_quant: bool,
    streamed: bool = False,
) -> Base:
    """A loaded model as the base of a run: parameters frozen, no key-value cache, the folder's tokenizer.

    Raises:
        UserError: there is no tokenizer, or one of another model.
    """
    model.requires_grad_(False)
    model.config.use_cache = False
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], folder)
    return Base(
        model=model,
        tokenizer=tokenizer,
        path=folder,
        name_or_path=config.model_name_or_path,
        revision=config.model_revision,
        dtype=dtype,
        device=device,
        fingerprint=fingerprint(folder),
        load_in_4bit=four_bit,
        double_quant=double_quant,
        streamed=streamed,
    )


def fingerprint(folder: Path) -> str:
    """A hash that tells bases apart in milliseconds: the configuration that the output depends on, and of every tensor its
    name, dtype, shape and 4 KiB at 4 places.

    Files that transformers does not read, how tensors are split into files, and keys such as use_cache do not count.

    Raises:
        UserError: a file is missing or broken.
    """
    config = read_model_config(folder, any_family=True)
    told = {key: getattr(config, key, None) for key in _ARCHITECTURE}
    if config.model_type in FAMILIES:
        told |= {"head_dim": head_width(config), "windows": layer_windows(config)}
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

    Raises:
        UserError: the fingerprints differ.
    """
    if known is not None and not is_fingerprint_of(known, folder):
        raise UserError(
            f"{folder}: is not the model that {trained} was trained on (its files changed since, or it is another one).",
            "Restore it, or give the folder of that model with --base.",
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
