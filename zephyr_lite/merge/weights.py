"""Merging a chain of adapters into the base's weights, streamed from file to file.

The base is never loaded. Its shards are read tensor by tensor and written in the same order, names and dtypes: weights with
an adapter are computed in float32 by blocks of rows, all others are copied as bytes. A merge of any base takes a few hundred
megabytes of memory.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..io.atomic import check_room, folder_aside, write_json
from ..io.safetensors import Entry, row_blocks, tensor_bytes, write_stream
from ..model.files import fetch_base
from ..model.peft_io import AdapterFile, LoraWeights, compose, write_adapter
from ..model.tokenizer import load_tokenizer, save_tokenizer
from ..ops.nf4 import through_nf4
from .base_files import BaseFiles, model_files

logger = logging.getLogger(__name__)

MARK = "zephyr_lite.json"
MERGED, COMPOSED = "merged model", "composed adapter"  # key ``kind`` of it
BLOCK_BYTES = 64 * 2**20  # of float32 rows; larger blocks are no faster

Modules = Mapping[str, LoraWeights]
Way = Literal["base", "nf4"]


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge."""

    merged: int  # weights that an adapter changed
    requantized: int  # weights that went through NF4, with adapters or without
    copied: int  # tensors that were copied as bytes
    eos_token_ids: list[int]  # where generation stops


def merge(
    base: str | Path,
    adapters: Sequence[AdapterFile | Modules],
    out: str | Path,
    *,
    onto: Way = "base",
    double_quant: bool = True,
    quant_dtype: torch.dtype = torch.bfloat16,
    tokenizer_from: str | Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Merge a chain of adapters into a base and write a model folder that plain transformers loads.

    Args:
        base: a folder or hub id; 16-bit, 32-bit, or a checkpoint that bitsandbytes quantized to NF4.
        adapters: the chain, from the bottom up; adapter files, or module name → LoraWeights.
        out: the folder to make. It appears complete or not at all.
        onto: "base": the stored weights. "nf4": the weights that 4-bit training saw, each linear layer quantized to NF4 and
            back.
        double_quant, quant_dtype: how that training quantized: bnb_4bit_use_double_quant, and the dtype the base was
            loaded in.
        tokenizer_from: a folder with tokenizer files and chat template (a stage's adapter/); default: the base's own.
        lineage: where this came from; written to zephyr_lite.json and to the weights' metadata.
        overwrite: replace an earlier merge in `out`.

    Raises:
        UserError: `out` exists and is not an earlier merge; the disk is too small; the base cannot be read; an adapter
            does not fit the base; the result is not finite in the base's dtype.
    """
    start = time.monotonic()
    out = Path(out).expanduser()
    files = BaseFiles(fetch_base(str(base)))
    claim(out, overwrite)
    if files.quantized and onto != "nf4":
        raise UserError(
            f"{base}: is quantized to NF4, so its 16-bit weights are not there to merge onto.",
            "Merge onto what it holds (--onto nf4), or give the 16-bit base with --base.",
        )
    for adapter in adapters:
        if isinstance(adapter, AdapterFile):
            adapter.check_copies(files.parameter)
    chain = [adapter.modules if isinstance(adapter, AdapterFile) else adapter for adapter in adapters]
    _check_fit(files, chain)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # with tokenizer, config.json and headers
    check_room(out.absolute().parent, files.nbytes + 64 * 2**20, "the result")
    merged = {f"{module}.weight" for modules in chain for module in modules}
    in_nf4 = files.quantized or (files.linears() if onto == "nf4" else set[str]())
    copied = files.entries.keys() - merged - in_nf4
    marks = {"kind": MERGED, "onto": onto, **(lineage or {})}
    if in_nf4 and not files.quantized:
        marks |= {"nf4": {"double_quant": double_quant, "loaded_as": str(quant_dtype).removeprefix("torch.")}}

    def write(name: str, file: BinaryIO) -> None:
        if name in copied:
            file.write(tensor_bytes(files.tensor(name)))
            return
        if name in files.quantized:
            read = files.stored_nf4(name).__getitem__
        elif name in in_nf4:
            read = through_nf4(files.tensor(name), double_quant=double_quant, dtype=quant_dtype).__getitem__
        else:
            read = files.tensor(name).__getitem__
        module = name.removesuffix(".weight")
        _write_rows(files.entries[name], read, [modules[module] for modules in chain if module in modules], file)
        files.forget()

    with folder_aside(out) as aside:
        # the small files first: their errors show before gigabytes are written
        ends = model_files(files, aside, Path(tokenizer_from) if tokenizer_from else None)
        for shard, names in files.shards.items():
            header = {name: (files.entries[name].dtype, files.entries[name].shape) for name in names}
            metadata = {**files.files[shard].metadata, "format": "pt", "zephyr_lite": json.dumps(marks, default=str)}
            write_stream(aside / shard, header, write, metadata)
            if len(files.shards) > 1:
                logger.info(f"written {shard}")
        files.write_index(aside)
        write_json(aside / MARK, marks)
    through = f", {len(in_nf4)} taken through NF4" if in_nf4 else ""
    logger.info(
        f"{out}: {files.nbytes / 1e9:.2f} GB in {time.monotonic() - start:.0f} s; {len(merged)} weights merged{through}, "
        f"{len(copied)} copied unchanged."
    )
    return MergeReport(len(merged), len(in_nf4), len(copied), ends)


def adapter_only(
    adapters: Sequence[AdapterFile],
    out: str | Path,
    *,
    base_model_name: str,
    tokenizer_from: str | Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the chain as one PEFT adapter that belongs on the bare base, with tokenizer and chat template.

    Raises:
        UserError: `out` exists and is not an earlier result; the adapters do not fit together.
    """
    out = Path(out).expanduser()
    claim(out, overwrite)
    chain = compose(adapters)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with folder_aside(out) as aside:
        write_adapter(aside, chain, base_model_name=base_model_name)
        if tokenizer_from is not None:
            save_tokenizer(load_tokenizer(Path(tokenizer_from)), aside)
        write_json(aside / MARK, {"kind": COMPOSED, **(lineage or {})})


def claim(out: Path, overwrite: bool) -> None:
    """Refuse an output folder with other files, or with an earlier merge that is not to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MARK).is_file():
        what = f"other things ({next(out.iterdir()).name}, …)" if out.is_dir() else "a file"
        raise UserError(f"{out}: holds {what}.", "Choose another --out; only an earlier merge is ever replaced.")
    if not overwrite:
        raise UserError(f"{out}: holds another, earlier merge.", "Add --overwrite, or choose another --out.")


def _check_fit(files: BaseFiles, chain: Sequence[Modules]) -> None:
    for module, weights in (item for modules in chain for item in modules.items()):
        if files.tied and module.rpartition(".")[2] == "lm_head":
            raise UserError(
                f"the adapter changes {module}, which this base ({files.folder}) ties to its embeddings.",
                "One matrix cannot be both; keep the adapter apart (--adapter-only), or train without lm_head.",
            )
        entry = files.entries.get(f"{module}.weight")
        if entry is None or entry.shape != weights.shape:
            found = "not there" if entry is None else list(entry.shape)
            raise UserError(
                f"{module} is {found} in {files.folder}; the adapter was made for {list(weights.shape)}.",
                "It is an adapter of another base; give that one with --base.",
            )


def _write_rows(entry: Entry, read: Callable[[slice], Tensor], parts: Sequence[LoraWeights], file: BinaryIO) -> None:
    """W + Σ s·B·A in float32, block of rows by block of rows, rounded to the base's dtype."""
    height, width = entry.shape
    for rows in row_blocks(height, width * 4, BLOCK_BYTES):
        block = read(rows).to(torch.float32, copy=True)
        for part in parts:
            block.addmm_(part.b[rows], part.a, alpha=part.scale)
        result = block.to(entry.torch_dtype)
        if parts and not bool(torch.isfinite(result).all()):
            raise UserError(
                f"{entry.name}: merged, it is not finite in {entry.dtype}.",
                "The adapter holds NaN, infinite or huge values; use an earlier checkpoint.",
            )
        file.write(tensor_bytes(result))
