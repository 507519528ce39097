"""Safetensors files without loading them: a checked header, tensors mapped from the file, and a streaming writer.

Mapped tensors are in the page cache and not in the process's own memory, so files larger than the memory can be read
and written.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from .atomic import bytes_aside
from .text import shown

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F32", "F16", "BF16", "F64")
# The first bytes of torch.save's files: a zip archive, or (before torch 1.6) a pickle of protocol 2 to 5.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of this safetensors dtype and shape."""
    return math.prod(shape) * DTYPES[dtype].itemsize


class SafetensorsFile:
    """A safetensors file whose header was checked (by the safetensors library); tensors are mapped when asked for.

    Attributes:
        entries: name → Entry, in the order of their bytes in the file.
        metadata: the header's ``__metadata__``.

    Raises:
        UserError: the file is missing, cut short or a pickle, its header is broken, or a dtype is unknown.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # a pipe would block
            raise UserError(f"{self.path}: is not a file.", "Fetch it again.")
        try:
            self._file: Any = safe_open(self.path, "pt")
        except SafetensorError as error:
            raise self._broken(str(error)) from None
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.entries: dict[str, Entry] = {}
        self._stored: dict[str, str] = {}  # name → the file's own, where ``rename`` changed it
        for name in self._file.offset_keys():
            tensor = self._file.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise self._broken(f"tensor {shown(name)} has the unsupported dtype {tensor.get_dtype()}")
            self.entries[name] = Entry(name, tensor.get_dtype(), tuple(tensor.get_shape()))

    def _broken(self, what: str) -> UserError:
        with self.path.open("rb") as file:
            start = file.read(8)
        if start == b"version ":
            return UserError(
                f"{self.path}: is a git-lfs pointer, not the weights.",
                "Fetch the file itself: `git lfs pull`, or `hf download`.",
            )
        if start.startswith(_PICKLES):
            what = "it is a pickle, and pickles are never opened"
        return UserError(f"{self.path}: not a complete safetensors file: {what}.", "Download or write it again.")

    def rename(self, rule: Callable[[str], str | None]) -> None:
        """Give tensors other names; leave those out for which the rule gives None."""
        entries, self.entries = self.entries, {}
        for name, entry in entries.items():
            if (new := rule(name)) is not None:
                self.entries[new], self._stored[new] = replace(entry, name=new), name

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own dtype and shape, as a view of the mapped file: treat it as read-only."""
        if self._file is None:
            self._file = safe_open(self.path, "pt")
        tensor: Tensor = self._file.get_tensor(self._stored.get(name, name))
        return tensor

    def forget(self) -> None:
        """Unmap the pages that were read (as soon as no tensor uses them); they are mapped again when needed."""
        self._file = None


def write_stream(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    write: Callable[[str, BinaryIO], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file tensor by tensor, as ``write`` produces them. It appears complete or not at all.

    Args:
        tensors: name → (safetensors dtype, shape), in the order of the bytes.
        write: called as write(name, file) for each tensor; it writes exactly that tensor's bytes.
        metadata: strings for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with bytes_aside(Path(path)) as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        position = out.tell()
        for name, (dtype, shape) in tensors.items():
            write(name, out)
            position += nbytes(dtype, shape)
            assert out.tell() == position, f"{path}: tensor {name}: {out.tell() - position:+d} bytes"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor of any dtype; of a contiguous one without a copy."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def row_blocks(rows: int, row_bytes: int, block_bytes: int) -> Iterator[slice]:
    """Slices that cut ``rows`` rows of ``row_bytes`` each into blocks of at most ``block_bytes`` (at least one row)."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
