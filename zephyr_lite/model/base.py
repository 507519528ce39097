"""The base model: loaded once, frozen, in NF4.

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
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerBase

from ..config.load import RunConfig
from ..errors import UserError
from ..io.atomic import folder_aside, remove_tree, write_json
from ..io.run_dir import cache_dir, read_json
from ..io.text import shown
from ..ops.nf4 import Linear4bit  # not from bitsandbytes, whose import ops/nf4.py makes faster
from .base_folder import (
    OTHER_MODEL,
    check_weights,
    fingerprint,
    read_model_config,
    stored_settings,
)
from .families import FAMILIES
from .files import TEXT_NAMES, check_config_file, fetch_base, has_text_model, weight_files
from .tokenizer import check_vocabulary, load_tokenizer

logger = logging.getLogger(__name__)

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
    """The current CUDA device, or the CPU where there is none."""
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
    check_weights(folder, model_config)
    if has_text_model(told := check_config_file(folder)):
        logger.info(
            f"{folder}: a multimodal model ({told['model_type']}); its text model ({model_config.model_type}) is loaded"
        )
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
    return frozen_base(model, config, folder, dtype, device, four_bit=four_bit, double_quant=double)


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
        key_mapping=TEXT_NAMES,
    )
    model._weight_conversions = None  # save_pretrained would give the tensors their multimodal names back
    if has_text_model(check_config_file(source)):
        loaded["unexpected_keys"] = ()  # the other parts' weights, which are not loaded
    for key, what in (
        ("missing_keys", "no tensor {} in its files"),  # transformers initialized them at random
        ("unexpected_keys", "holds tensor {}, for which the model of config.json has no place"),
    ):
        if names := sorted(loaded[key]):
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            raise UserError(f"{source}: {what.format(shown(names[0]) + more)}.", OTHER_MODEL)
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
        kept.mkdir(parents=True, exist_ok=True)
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
) -> Base:
    """A loaded model as the base of a run: parameters frozen, no key-value cache, the folder's tokenizer."""
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
    )
