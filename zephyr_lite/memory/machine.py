"""The machine that a run is planned for: this one, or a card by name; what its memory has free and what a run took."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil
import torch

from ..config.load import MemorySpec
from ..errors import UserError
from ..model.activation_offload import lockable
from ..model.allocator import is_wsl
from .estimate import CONTEXT_BYTES, CPU, GIB, Device
from .gpus import PROCESSOR, Gpu

# Share of the available main memory that a run may lock for what is offloaded or streamed.
HOST_SHARE = 0.5
# Main memory to spare on a machine that is not this one, unless memory.host says otherwise.
HOST_ELSEWHERE = 16 * GIB


@dataclass(frozen=True)
class Machine:
    """The memory and speed that a run is planned with.

    Attributes:
        kind: where it computes.
        name: of the device.
        card: its speed.
        free: bytes of the device's memory (a CPU: of main memory) for the run, ``context`` included.
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
        """How it allocates, computing in a dtype."""
        if self.kind == "cpu":
            return replace(CPU, context=self.context)
        return Device.of(self.card.capability, dtype.itemsize == 2, context=self.context)


def of_card(card: Gpu, vram: str | None = None) -> Machine:
    """A card that need not be here, with as much of its memory as `vram` says."""
    memory = int(card.memory * GIB) if vram is None else parse_size(vram, "memory.vram")
    return Machine("cuda", card.name, card, memory, HOST_ELSEWHERE, CONTEXT_BYTES)


def this_machine(device: torch.device, dtype: torch.dtype, memory: MemorySpec, *, measure: bool = True) -> Machine:
    """The machine that this process runs on.

    Args:
        device: where the run computes.
        dtype: of the computation.
        memory: ``vram`` caps the free memory to that of a card of this size (less its context; on a CPU as it is).
        measure: measure the speed; False: it does not matter.

    Raises:
        UserError: ``vram`` is no size.
    """
    if measure:
        from .calibrate import measure as measured
    vram = None if memory.vram is None else parse_size(memory.vram, "memory.vram")
    host = int(main_memory() * HOST_SHARE)
    if device.type == "cpu":
        card = measured(device, dtype) if measure else PROCESSOR
        # the process is a part of the measured peak, so of the plan too; it has taken its memory already
        process = process_memory(device)
        free = free_memory(device) if vram is None else min(free_memory(device), vram)
        return Machine("cpu", "the CPU", card, free + process, host, process)
    if measure:
        card = measured(device, dtype)  # first: the libraries that it loads take memory too
    else:
        card = Gpu(torch.cuda.get_device_name(device), 0, 50, 500, 12, torch.cuda.get_device_capability(device))
    if is_wsl():
        host = lockable(host, device)
    free = free_memory(device)
    return Machine("cuda", card.name, card, free if vram is None else min(free, vram - CONTEXT_BYTES), host)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return main_memory()


def cap_allocator(device: torch.device, memory: MemorySpec) -> None:
    """Under WSL2, refuse PyTorch's allocator more than the plan was made for. The driver there moves what does not fit to main
    memory, and the run would be ten times slower, where an allocation that fails leads to a smaller plan."""
    if device.type != "cuda" or not is_wsl():
        return
    free = free_memory(device)
    if memory.vram is not None:
        free = min(free, parse_size(memory.vram, "memory.vram") - CONTEXT_BYTES)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (free + torch.cuda.memory_allocated(device)) / total), device)


def keep_freed_pages() -> bool:
    """Let glibc keep the pages that a step frees: returning them to the system and getting them back costs a CPU run a twentieth
    of its time. Returns whether it was told to (False on other C libraries)."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))


def main_memory() -> int:
    """Bytes of main memory that are available to the machine and to its container; of these, the share of one of the run's
    processes here."""
    there, room = psutil.virtual_memory().available, container_room()
    # torchrun and accelerate launch set it
    return (there if room is None else min(there, room)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def container_room(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control groups of this process (cgroups v2 and v1) leave it, None without a limit. A process that takes
    more is killed; cached files count as free."""
    rooms = []
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.strip("/")
        # inside a container the path may be the host's, and the group itself is the top
        for place in [p for p in (folder, *folder.parents) if p.is_relative_to(top)] if folder.is_dir() else [top]:
            limit = place / files[0]
            if limit.is_file() and (most := limit.read_text().strip()) != "max":
                stat = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
                rooms.append(int(most) - int((place / files[1]).read_text()) + int(stat.get(files[2], 0)))
    return max(0, min(rooms)) if rooms else None


_UNITS = {"": GIB, "t": 2**40, "g": GIB, "m": 2**20}


def parse_size(text: str, what: str) -> int:
    """Bytes of "8GiB", "7.5 GB", "8" (GiB: a card's GB are powers of two) or "512MiB".

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[tgm](?:i?b)?)\s*", str(text).lower())
    if found is None or not float(found[1]):
        raise UserError(f"{what}: {text!r} is no size.", "Write 8GiB, for instance.")
    return int(float(found[1]) * _UNITS[found[2][:1]])


def process_memory(device: torch.device) -> int:
    """Resident bytes of this process on a CPU, after memory that is no longer used was returned to the system; 0 on a GPU,
    where the allocator's statistics do not include the process."""
    if device.type == "cuda":
        return 0
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what its allocator reserved at most, on a CPU the largest resident set of the process since
    ``reset_peak_memory``. What a plan's ``peak`` counts, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
    if found is not None:
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Exclude from a CPU's ``peak_memory`` what loading and earlier stages took. Only Linux can do that."""
    if device.type == "cpu":
        with suppress(OSError):  # not Linux, or a sandbox without this file
            Path("/proc/self/clear_refs").write_text("5")
