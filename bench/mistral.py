"""A Mistral-7B of random weights in NF4, as a folder in the hub's layout, for benches where the real one is not at hand.

    python -m bench.mistral --out base.json [--base FOLDER]      # build it, for other benches

What a step costs does not depend on what the weights are, so nothing is downloaded. Every matrix is drawn and quantized
on the device by itself. The tensors are those that ``save_pretrained`` of a model in bitsandbytes' NF4 writes, so that
transformers, TRL and Unsloth load the folder too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.card import describe_card
from bench.command import run, save
from zephyr_lite.demo.base import cache_dir
from zephyr_lite.errors import UserError
from zephyr_lite.io.atomic import folder_aside
from zephyr_lite.model.base import compute_device, compute_dtype

# config.json of mistralai/Mistral-7B-v0.1
MISTRAL_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = MISTRAL_7B | {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
STD = 0.02


def ensure_base(folder: Path, shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Build the model of a shape, ``MISTRAL_7B`` or one like it, if the folder does not exist; whether it was built now.

    Args:
        device: where weights are drawn and quantized.
        dtype: of what is not quantized, and what the rest dequantizes to.
    """
    if folder.exists():
        config = folder / "config.json"
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        if any(found.get(key) != shape[key] for key in ("hidden_size", "num_hidden_layers")):
            raise UserError(f"{folder}: holds something else.", "Give another folder, or delete this one.")
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(folder) as aside:
        _write_model(aside, shape, device, dtype)
        make_tokenizer(shape["vocab_size"]).save_pretrained(aside)
    return True


def prepare(base: Path | None, shape: dict[str, Any]) -> dict[str, Any]:
    """Build the model if it does not exist; the model and the card, for JSON."""
    device = compute_device()
    dtype = compute_dtype("auto", device)
    size = f"{shape['num_hidden_layers']}x{shape['hidden_size']}-{str(dtype).removeprefix('torch.')}"
    path = base or cache_dir() / "bench" / f"mistral-random-nf4-{size}"
    begun = time.monotonic()
    built = ensure_base(path, shape, device, dtype)
    seconds = round(time.monotonic() - begun, 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "base": {"folder": str(path.resolve()), "built_now": built, "seconds": seconds, "shape": shape},
        "card": describe_card(device),
        "on_a_card": device.type == "cuda",
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the benches on this model."""
    parser.add_argument("--layers", type=int, default=32, help="fewer than Mistral's, for a small card")
    parser.add_argument("--base", type=Path, help="the model's folder, built if it does not exist; default: a cache")
    parser.add_argument("--tiny", action="store_true", help="a tiny model in one process, on a CPU too: does it run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")


def on_card(prepare: Callable[..., dict[str, Any]], args: argparse.Namespace, *more: Any) -> dict[str, Any]:
    """``prepare(base, shape, *more)`` in a process of its own, because what a process takes of the card it gives back only
    when it ends; a tiny one in this process. Raises UserError: there is no card."""
    if args.tiny:
        return prepare(args.base, TINY, *more)
    if not torch.cuda.is_available():
        raise UserError("this bench measures an NVIDIA card, and PyTorch finds none here.", "--tiny runs on a CPU.")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(prepare, args.base, MISTRAL_7B | {"num_hidden_layers": args.layers}, *more).result()


def matrices(shape: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, in the model's order."""
    from transformers import MistralConfig, MistralForCausalLM

    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(**shape))
    for name, tensor in model.state_dict().items():
        yield name, tuple(tensor.shape)


def random_weight(name: str, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of that name: ones for a norm, else normal numbers whose seed is the name."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, STD, generator=generator)


def decoder_parameters(shape: dict[str, Any]) -> int:
    """Numbers in the matrices of all decoder layers: what a token is multiplied with, the output head aside."""
    return sum(size[0] * size[1] for name, size in matrices(shape) if name.endswith("_proj.weight"))


def _write_model(folder: Path, shape: dict[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    import bitsandbytes.functional as bnb
    from huggingface_hub import save_torch_state_dict
    from transformers import BitsAndBytesConfig, MistralConfig

    tensors: dict[str, Tensor] = {}
    for name, size in matrices(shape):
        weight = random_weight(name, size, device, dtype)
        if name.endswith("_proj.weight"):
            weight, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            tensors |= {f"{name}.{k}": v.cpu().contiguous() for k, v in state.as_dict(packed=True).items()}
        tensors[name] = weight.cpu().contiguous()
    save_torch_state_dict(tensors, folder, max_shard_size="1GB")
    config = MistralConfig(**shape)
    config.architectures = ["MistralForCausalLM"]
    config.dtype = dtype
    config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    config.save_pretrained(folder)


def make_tokenizer(entries: int) -> Any:
    """A byte-level tokenizer with Zephyr's chat template: a token a byte, filled up to ``entries`` with tokens that no
    text contains."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from zephyr_lite.data.templates import TEMPLATES

    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words += [f"<unused {place}>" for place in range(len(words), entries)]
    tokenizer = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        # an engine that found no pad token would add one, and a row to the embedding
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
    )
    fast.chat_template = TEMPLATES["zephyr"]
    return fast


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    args = parser.parse_args(words)
    found = prepare(args.base, TINY if args.tiny else MISTRAL_7B | {"num_hidden_layers": args.layers})
    save(args.out, found)
    return found


if __name__ == "__main__":
    run(main)
