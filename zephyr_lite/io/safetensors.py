"""Safetensors files without loading them: a checked header, tensors mapped from the file, and a writer that streams.

Mapped tensors live in the page cache, not in the process' own (anonymous) memory, so a file larger than the memory can
be read, and a file larger than the memory can be written.
"""

import io
import json
import math
import mmap
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor

from zephyr_lite.errors import UserError
from zephyr_lite.io.atomic import bytes_aside
from zephyr_lite.io.strict_json import is_whole, parse, shown

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
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F32", "F16", "BF16", "F64")
COPY_CHUNK = 16 * 2**20
# The format's own bound; a larger number is the first eight bytes of something else.
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 16
# A name is printed by whoever loads the file; so many tensors of nothing would keep transformers busy for minutes.
MAX_NAME, MAX_TENSORS = 1000, 100_000
# How torch.save's files begin: a zip archive, or (before torch 1.6) a pickle of protocol 2 to 5.
_ZIP = b"PK\x03\x04"
# what a clone without git-lfs has in place of a large file
_LFS = b"version "
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes lie (absolute offsets) and how to read them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor of this safetensors dtype and shape takes."""
    return math.prod(shape) * DTYPES[dtype].itemsize


class SafetensorsFile:
    """A safetensors file whose header was read and checked; its tensors are mapped when asked for.

    Attributes:
        entries: name → Entry, in the order in which the bytes lie in the file.
        metadata: the header's `__metadata__` (strings).

    Raises:
        UserError: the file is missing or cut short, is a pickle, or its header is broken: no JSON, a tensor twice, a name that
            cannot be printed, too many names, an unknown dtype, a size that differs from dtype × shape, offsets out of
            bounds, or tensors that overlap or leave gaps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            size, raw = self._header_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.path} is missing, or a link to nowhere.", "Fetch it again.") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror}.", "Fetch it again.") from None
        try:
            header = parse(raw)
        except ValueError as error:
            raise self._broken(f"its header is not JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise self._broken("its __metadata__ is not a JSON object")
        self.metadata: dict[str, str] = {str(key): str(value) for key, value in metadata.items()}
        self.data_start = 8 + len(raw)
        if len(header) > MAX_TENSORS:
            raise self._broken(f"its header names {len(header):,} tensors; {MAX_TENSORS:,} are the most that is read")
        entries = [self._entry(name, value) for name, value in header.items()]
        entries.sort(key=lambda entry: (entry.start, entry.end))
        position = self.data_start
        for entry in entries:
            if entry.start != position:
                what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
                raise self._broken(f"tensor {shown(entry.name)} {what}")
            position = entry.end
        if position != size:
            raise self._broken(f"its tensors end at byte {position}, the file at {size}")
        self.entries: dict[str, Entry] = {entry.name: entry for entry in entries}

    def _header_bytes(self) -> tuple[int, bytes]:
        """The file's size, and its header."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{self.path}: is not a file.", "Fetch it again.")
        size = status.st_size
        with open(self.path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length < 2 or length > min(size - 8, MAX_HEADER):
                if prefix[:2] in _PICKLES or prefix[:4] == _ZIP:
                    raise self._broken("it begins as a pickle does, which is never opened")
                if prefix == _LFS:
                    raise UserError(
                        f"{self.path}: is a git-lfs pointer, and not the weights themselves.",
                        "Fetch the file itself: `git lfs pull`, or `hf download`.",
                    )
                raise self._broken(f"its header would be {length} bytes long in a file of {size} bytes")
            raw = file.read(length)
        if len(raw) < length:
            raise self._broken(f"it ended after {len(raw)} of its header's {length} bytes")
        return size, raw

    def _broken(self, what: str) -> UserError:
        return UserError(f"{self.path}: not a complete safetensors file: {what}.", "Download or write it again.")

    def _entry(self, name: str, value: object) -> Entry:
        try:
            assert name.isprintable() and len(name) <= MAX_NAME and isinstance(value, dict)
            dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
            assert isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)
            assert len(shape) <= MAX_DIMENSIONS and all(is_whole(n) for n in (*shape, *offsets))
            begin, end = offsets
        except (AssertionError, KeyError, ValueError):
            raise self._broken(f"the header entry of tensor {shown(name)} is malformed") from None
        if dtype not in DTYPES:
            raise self._broken(f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
        # torch counts elements and strides in 64 bits, of an empty tensor too
        counted = math.prod(n for n in shape if n) * DTYPES[dtype].itemsize < 2**63
        if begin < 0 or min(shape, default=0) < 0 or not counted or end - begin != nbytes(dtype, shape):
            raise self._broken(
                f"tensor {shown(name)} ({dtype} {shown(shape)}) has data offsets {shown(begin)} to {shown(end)}"
            )
        return Entry(name, dtype, tuple(shape), self.data_start + begin, self.data_start + end)

    @cached_property
    def _map(self) -> mmap.mmap:
        # Copy-on-write, so that torch may take the buffer as writable while the file stays as it is.
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, name: str) -> Tensor:
        """The tensor, in its own dtype and shape, as a view of the mapped file: treat it as read-only."""
        entry = self.entries[name]
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=entry.torch_dtype)
        if entry.start % entry.torch_dtype.itemsize:  # legal in the format, not for a typed view
            raw = bytearray(self._map[entry.start : entry.end])
            return torch.frombuffer(raw, dtype=entry.torch_dtype).view(entry.shape)
        count = entry.nbytes // entry.torch_dtype.itemsize
        return torch.frombuffer(self._map, dtype=entry.torch_dtype, count=count, offset=entry.start).view(entry.shape)

    def forget(self) -> None:
        """Let go of the pages that were read; they come back from the file when touched again."""
        if "_map" in self.__dict__ and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def copy_bytes(self, name: str, out: BinaryIO) -> None:
        """Write the tensor's bytes as they are to `out`, in chunks."""
        entry = self.entries[name]
        with open(self.path, "rb") as file:
            file.seek(entry.start)
            left = entry.nbytes
            while left:
                chunk = file.read(min(COPY_CHUNK, left))
                if not chunk:
                    raise self._broken(f"it ended inside tensor {shown(name)}")
                out.write(chunk)
                left -= len(chunk)


def write_stream(
    path: str | Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    write: Callable[[str, BinaryIO], None],
    metadata: Mapping[str, str] | None = None,
    digest: "Digest | None" = None,
) -> None:
    """Write a safetensors file: the header first, then tensor after tensor as `write` produces them. It appears
    complete or not at all.

    Args:
        tensors: name → (safetensors dtype, shape), in the order of the bytes.
        write: called as write(name, file) for each tensor; it writes exactly that tensor's bytes.
        metadata: strings for the header.
        digest: is given the file's bytes as they are written (``hashlib.sha256()``).

    Raises:
        OSError: it cannot be written.
        RuntimeError: `write` wrote another number of bytes than the header says.
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
        file = _Counted(out, digest)
        file.write(struct.pack("<Q", len(raw)) + raw)
        position = file.tell()
        for name, (dtype, shape) in tensors.items():
            write(name, cast(BinaryIO, file))
            position += nbytes(dtype, shape)
            if file.tell() != position:
                raise RuntimeError(f"{path}: tensor {name} took {file.tell() - position:+d} bytes more than announced")


class Digest(Protocol):
    """What takes bytes in: a hash."""

    def update(self, data: Any, /) -> None: ...


class _Counted(io.RawIOBase):
    """Passes on what is written, counted, and hashed where that is wanted."""

    def __init__(self, out: BinaryIO, digest: Digest | None) -> None:
        self.out, self.digest, self.written = out, digest, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.written

    def write(self, data: Any) -> int:
        if self.digest is not None:
            self.digest.update(data)
        self.out.write(data)
        size = memoryview(data).nbytes
        self.written += size
        return size


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, without a copy."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def row_blocks(rows: int, row_bytes: int, block_bytes: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of `row_bytes` each into blocks of at most `block_bytes` (one row at least)."""
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
