"""A base's safetensors files: which ones its index names, whether they lie where they may, and what they hold.

transformers follows an index wherever it leads and draws at random what no file holds. So everything is checked here
before it sees a folder: names, links, headers, and that every tensor is where the index says.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.safetensors import SafetensorsFile, nbytes
from ..io.strict_json import is_whole, parse, read_object, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.", re.ASCII)
_QUANT_STATE = ".quant_state.bitsandbytes__"
_COMPUTED = ("float32", "float16", "bfloat16")


def local_folder(name: str) -> Path | None:
    """The folder of that name, with ``~`` spelled out; None where there is none.

    Raises:
        UserError: nothing can have that name, or what is there may not be looked at.
    """
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except RuntimeError:  # ~ of a user that this system does not know
        return None
    except OSError as error:
        raise UserError(f"{shown(name)}: cannot be looked up: {error.strerror}.", "Check the path.") from None


def pickles(folder: Path, *patterns: str) -> str:
    """Names of the pickles in a folder, the first three; "" where there are none."""
    found = sorted({path.name for pattern in patterns or PICKLES for path in folder.glob(pattern)})
    return ", ".join(shown(name) for name in found[:3]) + (", …" if len(found) > 3 else "")


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder is a snapshot of the hub's cache, whose files are links into ``blobs`` beside the snapshots."""
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


def again(path: Path) -> str:
    """What to do about a broken file of a base or an adapter: where it is the hub's, how to have it fetched anew."""
    if not in_hub_cache(path.parent):
        return "Copy the file again from where the model came from."
    try:
        blob = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a link to nowhere, or a loop of links
        blob = path
    both = f"{path} and {blob}" if blob != path else f"{path}"
    return f"Delete {both}, which lie in the hub's cache; the next start fetches the file again."


def checked_place(path: Path) -> Path:
    """The path of a file, which lies in its folder: what a link out of it leads to is somebody's own, not the model's.

    Links of the hub's cache, from a snapshot to its blob, are as they should be.

    Raises:
        UserError: it is missing, no file, a link to nowhere, or one out of the folder.
    """
    try:
        found, folder = path.resolve(strict=True), path.parent.resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{path} is missing, or a link to nowhere.", "Fetch the model again.") from None
    blobs = folder.parent.parent / "blobs" if in_hub_cache(folder) else folder
    if not (found.is_relative_to(folder) or found.is_relative_to(blobs)):
        raise UserError(
            f"{path}: is a link out of its folder, to {shown(found, 200)}.", "Put the file itself into the folder."
        )
    if not found.is_file():
        raise UserError(f"{path}: is not a file.", "Fetch the model again.")
    return path


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor → file name, as the folder's index says; None where there is no index.

    Raises:
        UserError: the index is broken, or names what is no safetensors file in the folder.
    """
    index = folder / INDEX
    if not index.is_symlink() and not index.exists():
        return None
    told = read_object(checked_place(index), hint=again(index)).get("weight_map")
    if not isinstance(told, dict) or not told:
        raise UserError(f"{index}: has no weight_map.", again(index))
    for tensor, name in told.items():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise UserError(
                f"{index}: puts tensor {shown(tensor)} into {shown(name)!r}, which is no name of a file in this folder.",
                "Use a copy of the model from a place that you trust.",
            )
        if not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: puts tensor {shown(tensor)} into {shown(name)}, which is no safetensors file.",
                "Only safetensors are read; convert the weights with transformers' save_pretrained first.",
            )
    for name in sorted(set(told.values())):
        if not (folder / name).is_symlink() and not (folder / name).exists():
            raise UserError(f"{index}: names {shown(name)}, which is not there.", "Fetch the model again.")
    return told


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads of a folder: ``model.safetensors``, or else those of its index; none of neither.

    Raises:
        UserError: the index is broken, or a file lies where it may not.
    """
    single = folder / SINGLE
    if single.is_symlink() or single.exists():
        return [checked_place(single)]
    told = weight_map(folder)
    return [checked_place(folder / name) for name in sorted(set(told.values()))] if told else []


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """File name → the file with its header checked, of every file that ``weight_files`` gives.

    Raises:
        UserError: there is none; a file is broken; a tensor is in two files, or not in the file that the index names.
    """
    files = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
    if not files:
        raise UserError(
            f"{folder}: neither {SINGLE} nor {INDEX} there (found {pickles(folder) or 'no weights'}).",
            "Only safetensors are read; convert the weights with transformers' save_pretrained first.",
        )
    holds: dict[str, str] = {}
    for name, file in files.items():
        for tensor in file.entries:
            if tensor in holds:
                raise UserError(
                    f"{folder}: tensor {shown(tensor)} is in {holds[tensor]} and in {name}.",
                    "Remove the files that do not belong to the model.",
                )
            holds[tensor] = name
    told = {} if SINGLE in files and len(files) == 1 else weight_map(folder) or {}
    for tensor, name in told.items():
        if tensor not in holds:
            raise UserError(f"{folder / INDEX}: names {shown(tensor)}, which no file holds.", "Fetch the model again.")
        if holds[tensor] != name:
            raise UserError(
                f"{folder / INDEX}: puts tensor {shown(tensor)} into {name}; it is in {holds[tensor]}.",
                "Fetch the model again.",
            )
    return files


def check_layers(folder: Path, files: Iterable[SafetensorsFile], layers: int) -> None:
    """Refuse weights that have fewer decoder layers than config.json says (the rest would be drawn at random), or more (they
    would be left out).

    Raises:
        UserError: says both numbers.
    """
    found = {int(match[1]) for file in files for name in file.entries if (match := _LAYER.match(name))}
    if found and max(found) + 1 != layers:
        raise UserError(
            f"{folder}: config.json says {layers} layers, the weights have {max(found) + 1}.",
            "The files belong to different models; fetch the model again.",
        )


def check_shapes(files: Iterable[SafetensorsFile], model: Mapping[str, Any], packed: Collection[str]) -> None:
    """Refuse files that are another model's: by names and shapes alone, before anything of 15 GB is read.

    Args:
        model: name → tensor (on the meta device) of the model that config.json describes.
        packed: names of the weights that are kept in NF4, whose parts are compared.

    Raises:
        UserError: names the tensor, the file, and both shapes; a tensor that nothing would read; or what is missing of a
            weight in NF4.
    """
    holds = {name: file for file in files for name in file.entries}
    for name, file in holds.items():
        weight, _, part = name.rpartition(".weight.")
        if part and f"{weight}.weight" in packed:
            continue
        if name not in model:
            # transformers adds the prefix itself, and computes inv_freq, which old checkpoints hold
            if f"model.{name}" not in model and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(
                    f"{file.path}: holds tensor {shown(name)}, for which the model of config.json has no place.",
                    "The files belong to different models, or the weights need other code; fetch the model again.",
                )
            continue
        shape = packed_shape(holds, name) if name in packed else file.entries[name].shape
        if tuple(model[name].shape) != shape:
            raise UserError(
                f"{file.path}: tensor {shown(name)} is {list(shape)}; by config.json it is {list(model[name].shape)}.",
                "The files belong to different models; fetch the model again.",
            )


def packed_shape(holds: Mapping[str, SafetensorsFile], weight: str) -> tuple[int, ...]:
    """Shape of a weight that bitsandbytes keeps in NF4, whose parts are there and fit together.

    Args:
        holds: tensor → the file that has it.

    Raises:
        UserError: a part is missing or of another size, or it is another format than NF4 in blocks of 64.
    """
    file = holds[weight]
    try:
        name = f"{weight}{_QUANT_STATE}nf4"
        buffer = io.BytesIO()
        if holds[name].entries[name].nbytes > 10_000:
            raise ValueError("its quant_state is too long")
        holds[name].copy_bytes(name, buffer)
        state = parse(buffer.getvalue())
        rows, width = state["shape"]
        if not (is_whole(rows) and is_whole(width) and rows > 0 and width > 0):
            raise ValueError(f"its shape is {shown(state['shape'])}")
        if state["quant_type"] != "nf4" or state["blocksize"] != 64 or state["dtype"] not in _COMPUTED:
            raise ValueError("it is in another format than NF4 in blocks of 64")
        blocks = -(-rows * width // 64)
        wanted = {"": ("U8", -(-rows * width // 2)), ".quant_map": ("F32", 16), ".absmax": ("F32", blocks)}
        if f"{weight}.nested_absmax" in holds:
            offset = state["nested_offset"]
            if state["nested_blocksize"] != 256 or state["nested_dtype"] != "float32" or not isinstance(offset, float):
                raise ValueError("its scales are quantized in another way than bitsandbytes' own")
            wanted[".absmax"] = ("U8", blocks)
            wanted |= {".nested_absmax": ("F32", -(-blocks // 256)), ".nested_quant_map": ("F32", 256)}
        for part, (dtype, count) in wanted.items():
            entry = holds[weight + part].entries[weight + part]
            # the packed codes may be kept as numbers of any width (bnb_4bit_quant_storage)
            if (part and entry.dtype != dtype) or entry.nbytes != nbytes(dtype, (count,)):
                raise ValueError(f"{shown(weight + part)} is {entry.dtype} {list(entry.shape)}")
    except KeyError as error:
        raise UserError(
            f"{file.path}: {shown(weight)} is not whole in NF4: there is no {shown(error.args[0])}.",
            "Fetch the model again.",
        ) from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file.path}: {shown(weight)} is not whole in NF4: {shown(error, 200)}.", "Fetch the model again."
        ) from None
    return rows, width
