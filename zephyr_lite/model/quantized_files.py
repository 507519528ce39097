"""The files of a quantized base: the checkpoint that ``save_pretrained`` of the quantized model would write, made tensor by
tensor from the mapped files of the 16-bit one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

from ..io.atomic import copy_file, rename, write_json
from ..io.safetensors import DTYPE_NAMES, SafetensorsFile, nbytes, row_blocks, tensor_bytes, write_stream
from ..ops.nf4 import quantize_parts
from .base_content import INDEX, SINGLE, BaseFiles, NotKept, file_hash, tensor_hash

# quantized tensors are held in memory until a file of them is full, then written at once
SHARD_BYTES = 128 * 2**20
# what is merely cast goes to the file so many bytes at a time
CAST_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Source:
    """A tensor of the base, and whether it is quantized."""

    file: SafetensorsFile
    name: str
    quantized: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def kept_bytes(self, settings: BitsAndBytesConfig, dtype: torch.dtype) -> int:
        """What it takes in the kept folder, to a few hundred bytes."""
        elements = nbytes("U8", self.shape)
        if not self.quantized:
            return elements * dtype.itemsize
        blocks = -(-elements // 64)
        return -(-elements // 2) + (blocks + blocks // 64 + 1024 if settings.bnb_4bit_use_double_quant else 4 * blocks)


def tensors_to_keep(base: BaseFiles, config: Any, settings: BitsAndBytesConfig) -> list[Source]:
    """All tensors to keep, in the model's order.

    Raises:
        NotKept: the files name their tensors otherwise than the model.
    """
    wanted = _model_tensors(config, settings)
    found: dict[str, SafetensorsFile] = {}
    for file in base.files:
        opened = SafetensorsFile(file)
        found |= dict.fromkeys(opened.entries, opened)
    if missing := [name for name, (_, needed) in wanted.items() if needed and name not in found]:
        raise NotKept(f"{base.source}: no tensor {missing[0]} in its files.")
    return [Source(found[name], name, quantized) for name, (quantized, _) in wanted.items() if name in found]


def _model_tensors(config: Any, settings: BitsAndBytesConfig) -> dict[str, tuple[bool, bool]]:
    """The model's tensors in its order: whether transformers quantizes each, and whether it must be in the files."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    names = list(model.state_dict())
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=None)
    return {name: (quantizer.param_needs_quantization(model, name), name not in tied) for name in names}


def write_quantized(
    folder: Path,
    base: BaseFiles,
    config: Any,
    settings: BitsAndBytesConfig,
    dtype: torch.dtype,
    tensors: list[Source],
    device: torch.device,
) -> dict[str, str]:
    """The checkpoint, into an empty folder; the base's files are hashed as they are read. Returns their hashes.

    Raises:
        NotKept: a file of the base was changed meanwhile.
        OSError: it cannot be written.
    """
    files = {tensor.file.path: tensor.file for tensor in tensors}
    known: dict[Path, dict[str, bytes]] = {path: {} for path in files}
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}

    def flush() -> None:
        if waiting:
            shards.append(list(waiting))
            _write_shard(folder / f"{len(shards)}.safetensors", waiting, dtype)
            waiting.clear()
            for file in files.values():
                file.forget()

    total = size = 0
    for tensor in tensors:
        weight = tensor.file.tensor(tensor.name)
        known[tensor.file.path][tensor.name] = tensor_hash(tensor.file, tensor.name)
        if tensor.quantized:
            parts = quantize_parts(
                weight, double_quant=bool(settings.bnb_4bit_use_double_quant), dtype=dtype, device=device
            )
            waiting |= {f"{tensor.name}.{part}" if part else tensor.name: value for part, value in parts.items()}
        else:
            waiting[tensor.name] = weight  # mapped: it takes no memory, and is cast on its way to the file
        size += tensor.kept_bytes(settings, dtype)
        total += tensor.kept_bytes(settings, dtype)
        if size >= SHARD_BYTES:
            flush()
            size = 0
    flush()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        rename(folder / f"{number}.safetensors", folder / name)
        index |= dict.fromkeys(names, name)
    if len(shards) > 1:
        stored = sum((folder / name).stat().st_size for name in set(index.values()))
        write_json(folder / INDEX, {"metadata": {"total_size": stored}, "weight_map": dict(sorted(index.items()))})
    _write_config(folder, base.source, config, settings, dtype)
    hashes = {
        base.name(path): file_hash(files.get(path) or SafetensorsFile(path), known.get(path, {})) for path in base.files
    }
    if base.changed():
        raise NotKept(f"{base.source}: its files were changed while they were read.")
    return hashes


def _write_shard(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """In the order of their items' sizes, largest first, so that every tensor is aligned to its items."""

    def stored(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if not tensor.is_floating_point() or _is_scale(name) else dtype

    order = sorted(tensors, key=lambda name: -stored(name, tensors[name]).itemsize)

    def write(name: str, out: BinaryIO) -> None:
        tensor = tensors[name]
        wanted = stored(name, tensor)
        if tensor.dtype == wanted:
            out.write(tensor_bytes(tensor))
            return
        row = wanted.itemsize * (tensor.numel() // max(1, tensor.shape[0]))
        for rows in row_blocks(tensor.shape[0], row, CAST_BYTES):
            out.write(tensor_bytes(tensor[rows].to(wanted)))

    header = {name: (DTYPE_NAMES[stored(name, tensors[name])], tuple(tensors[name].shape)) for name in order}
    write_stream(path, header, write, {"format": "pt"})


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _write_config(folder: Path, source: Path, config: Any, settings: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    quantized = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    quantized.architectures = [type(model).__name__]
    quantized.dtype = str(dtype).removeprefix("torch.")
    quantized.quantization_config = settings.to_dict()
    quantized.save_pretrained(folder)
    generation = source / "generation_config.json"
    if generation.is_file():
        copy_file(generation, folder / generation.name)
    else:
        model.generation_config.save_pretrained(folder)
