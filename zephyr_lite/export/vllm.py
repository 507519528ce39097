"""What vLLM needs of a folder: a whole model, or an adapter on a base.

Source: docs.vllm.ai, engine arguments and LoRA adapters (its configuration's ``MaxLoRARanks``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import read_object
from ..merge.base_files import GENERATION
from ..model.base import read_model_config
from ..model.files import open_shards
from ..model.peft_io import read_adapter
from ..model.tokenizer import check_vocabulary, load_tokenizer
from .gguf import end_ids, model_folder

# the values that --max-lora-rank takes
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_MERGED = "Serve the merged model instead: zephyr-lite merge --out model/"


def check_model(folder: str | Path) -> list[str]:
    """Faults of a model's folder that vLLM would run into.

    Raises:
        UserError: the folder holds no model, or a file of it is broken.
    """
    folder = model_folder(folder)
    config = read_model_config(folder, any_family=True)
    open_shards(folder)
    faults = []
    if not config.architectures:
        faults.append("config.json names no architectures, which vLLM needs")
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, folder)
    if not tokenizer.chat_template:
        faults.append("the tokenizer has no chat template: /v1/chat/completions refuses every request")
    if not (folder / GENERATION).is_file():
        faults.append(f"there is no {GENERATION}: answers end at config.json's eos_token_id only")
    elif not end_ids(folder, config):
        faults.append(f"{GENERATION} and config.json name no eos_token_id: answers never end")
    return faults


def serve_model(folder: str | Path) -> str:
    """The command line that serves a model's folder."""
    return f"vllm serve {folder} --served-model-name {Path(folder).resolve().name}"


def lora_rank(rank: int) -> int:
    """The smallest ``--max-lora-rank`` for an adapter of this rank.

    Raises:
        UserError: vLLM serves none that large.
    """
    if rank > LORA_RANKS[-1]:
        raise UserError(f"the adapter's rank is {rank}, and vLLM serves adapters up to {LORA_RANKS[-1]}.", _MERGED)
    return min(allowed for allowed in LORA_RANKS if rank <= allowed)


def serve_adapter(folder: str | Path) -> str:
    """The command line that serves a PEFT adapter (``merge --adapter-only``) on its base.

    Raises:
        UserError: vLLM serves the adapter wrongly or not at all.
    """
    adapter, name = read_adapter(Path(folder)), Path(folder).resolve().name
    config: dict[str, Any] = read_object(adapter.path / "adapter_config.json")
    scales = {round(weights.scale, 6) for weights in adapter.modules.values()}
    if len(scales) > 1 or any(name.endswith(("lm_head", "embed_tokens")) for name in adapter.modules):
        raise UserError(
            f"{folder}: vLLM has one scale per adapter, and serves no embeddings or output head as one.", _MERGED
        )
    rank = lora_rank(max(weights.rank for weights in adapter.modules.values()))
    return (
        f"vllm serve {config.get('base_model_name_or_path')} --enable-lora --lora-modules {name}={folder} "
        f"--max-lora-rank {rank} --chat-template {Path(folder) / 'chat_template.jinja'}"
    )
