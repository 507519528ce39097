"""The machine that a run is planned for: this one, or a card by name."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..errors import UserError
from ..train.distributed import world
from .account import CONTEXT_BYTES, CPU, GIB, Device
from .gpus import Gpu

# Of the main memory that is available: what is offloaded or streamed is locked, and other programs want some.
HOST_SHARE = 0.5
# Main memory to spare on a machine that is not this one, unless memory.host says otherwise.
HOST_ELSEWHERE = 16 * GIB


@dataclass(frozen=True)
class Machine:
    """What a run may take.

    Attributes:
        kind: what computes.
        name: in words.
        card: its speed.
        free: bytes of the device's memory (a CPU: of main memory) for the run, and for its context if `context`.
        host: bytes of main memory to spare.
        context: what the process takes of `free` before its first tensor: a CUDA context, or on a CPU Python, libraries and
            rows; 0 where `free` was measured without it.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    card: Gpu
    free: int
    host: int
    context: int = 0

    def device(self, dtype: torch.dtype) -> Device:
        """How it computes in a dtype."""
        if self.kind == "cpu":
            return replace(CPU, context=self.context)
        return Device.of(self.card.capability, dtype.itemsize == 2, context=self.context)


def of_card(card: Gpu, vram: str | None = None) -> Machine:
    """A card that need not be here, with as much of its memory as `vram` says."""
    memory = int(card.memory * GIB) if vram is None else parse_size(vram, "memory.vram")
    return Machine("cuda", card.name, card, memory, HOST_ELSEWHERE, CONTEXT_BYTES)


def main_memory() -> int:
    """Bytes of main memory that are available: to the machine, and to the container that we are in; of these, the share of
    one of the run's processes here."""
    return _main_memory() // world().local_size


def _main_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                there = int(line.split()[1]) * 1024
                room = container_room()
                return there if room is None else min(there, room)
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 8 * GIB


def container_room(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control groups of this process leave it (cgroups v2 and v1), None where none limits it. A process that
    takes more is killed without a word; files that are only cached count as free."""
    rooms = []
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit, usage, cached = files
        folder = top / path.strip("/")
        # inside a container the path may be the host's, and the group itself lies at the top
        for place in (folder, *folder.parents) if folder.is_dir() else (top,):
            try:
                most = (place / limit).read_text().strip()
                stat = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
                if most != "max":
                    rooms.append(int(most) - int((place / usage).read_text()) + int(stat.get(cached, 0)))
            except (OSError, ValueError):
                pass  # the top of the tree has no such files
            if place == top:
                break
    return max(0, min(rooms)) if rooms else None


_UNITS = {
    "": GIB,
    "t": 2**40,
    "tib": 2**40,
    "tb": 2**40,
    "g": GIB,
    "gib": GIB,
    "gb": GIB,
    "m": 2**20,
    "mib": 2**20,
    "mb": 2**20,
}


def parse_size(text: str, what: str) -> int:
    """Bytes of "8GiB", "7.5 GB", "8" (GiB; nobody means powers of ten by a card's GB) or "512MiB".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if found is None or found[2].lower() not in _UNITS or not float(found[1]):
        raise UserError(f"{what}: {text!r} is no size.", "Write 8GiB, for instance.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def process_memory(device: torch.device) -> int:
    """Resident bytes of this process on a CPU, after memory that is no longer used was returned to the system; 0 on a GPU,
    where the allocator's statistics do not include the process."""
    if device.type == "cuda":
        return 0
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _resident("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what its allocator reserved at most, on a CPU the largest resident set of the process since
    ``reset_peak_memory``. What a plan's ``peak`` counts, too."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _resident("VmHWM")


def reset_peak_memory(device: torch.device) -> None:
    """Exclude from a CPU's ``peak_memory`` what loading and earlier stages took. Only Linux can do that."""
    if device.type == "cpu":
        with suppress(OSError):  # not Linux, or a sandbox without this file
            Path("/proc/self/clear_refs").write_text("5")


def _resident(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of the resident set, now or at its largest; without Linux's ``/proc`` always at its largest."""
    try:
        found = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
