"""The machine that a run is planned for: this one, measured, or a card by name; what its memory has free and what a run took."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from bitsandbytes.nn import Params4bit
from pydantic import TypeAdapter

from ..config.load import MemorySpec
from ..errors import UserError
from ..io.atomic import write_json
from ..io.run_dir import cache_dir
from ..model.allocator import is_wsl
from ..ops.nf4 import dequantize
from .gpus import CONTEXT_BYTES, CPU, GIB, PROCESSOR, Device, Gpu
from .workload import Workload

# Share of the available main memory that a run may lock for what is offloaded or streamed.
HOST_SHARE = 0.5
# Main memory to spare on a machine that is not this one, unless memory.host says otherwise.
HOST_ELSEWHERE = 16 * GIB
THE_CPU = "the CPU"
# of each measurement of speed, at least
SECONDS, CALLS = 0.15, 25
COPY_BYTES = 128 * 2**20
# bytes that a card has free where its speed is measured; into less no run fits whose speed matters
MEASURABLE = 2 * GIB
RUNS = 5  # the newest ones of a kind whose measured speed corrects the predicted one


@dataclass(frozen=True)
class Machine:
    """The memory and speed that a run is planned with."""

    name: str  # of the device
    card: Gpu  # its speed
    free: int  # bytes of the device's memory (a CPU: of main memory) for the run, ``device.context`` included
    host: int  # bytes of main memory that may be locked
    device: Device  # how it allocates


def of_card(card: Gpu, dtype: torch.dtype, memory: MemorySpec) -> Machine:
    """A card that need not be here, with the memory that ``memory.vram`` and ``memory.host`` say."""
    free = int(card.memory * GIB) if memory.vram is None else parse_size(memory.vram, "memory.vram")
    host = HOST_ELSEWHERE if memory.host is None else parse_size(memory.host, "memory.host")
    return Machine(card.name, card, free, host, Device.of(card.capability, dtype.itemsize == 2, context=CONTEXT_BYTES))


def this_machine(device: torch.device, dtype: torch.dtype, memory: MemorySpec, *, measure: bool = True) -> Machine:
    """The machine that this process runs on.

    Args:
        device: where the run computes.
        dtype: of the computation.
        memory: ``vram`` caps the free memory to that of a card of this size (less its context; on a CPU as it is); ``host``
            is the main memory that may be locked.
        measure: measure the speed; False: it does not matter.
    """
    host = None if memory.host is None else parse_size(memory.host, "memory.host")
    if device.type == "cpu":
        card = _measured(device, dtype, torch.get_num_threads()) if measure else PROCESSOR
        # the process is a part of the measured peak, so of the plan too; it has taken its memory already
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free in the process is not its memory
        process = psutil.Process().memory_info().rss
        free = process + usable_memory(device, memory)
        # offloaded bytes are in the memory that is planned with
        return Machine(THE_CPU, card, free, free if host is None else host, replace(CPU, context=process))
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    card = Gpu(name, 0, 50, 500, 12, capability)
    if measure and free_memory(device) > MEASURABLE:  # first: the libraries that it loads take memory too
        card = _measured(device, dtype, 1)
        # autograd's thread has a handle and a workspace of its own, which are to be there when free memory is asked for
        weight = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        (weight @ weight).sum().backward()
        torch._C._cuda_clearCublasWorkspaces()  # the plan counts them
        torch.cuda.empty_cache()
    if host is None:
        host = int(main_memory() * HOST_SHARE)
        if is_wsl():
            from ..model.activation_offload import lockable

            host = lockable(host, device)
    how = Device.of(capability, dtype.itemsize == 2, context=0)
    return Machine(name, card, usable_memory(device, memory), host, how)


@cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> Gpu:
    """The speed of the device, on a CPU with this number of threads; takes about two seconds."""
    rates = _rates(device, dtype)
    if device.type == "cpu":
        return replace(PROCESSOR, **rates, measured=True)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        memory=properties.total_memory / 2**30,
        **rates,
        capability=torch.cuda.get_device_capability(device),
        int8=4.0 if "GeForce" in properties.name else 2.0,
        share=0.9,  # of what one product alone reaches: others are smaller, and the card gets warm
        measured=True,
    )


def _rates(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of ``Gpu`` that are measured: matrix products; exponentials, which the memory bounds on a card and the arithmetic
    on a CPU, as it does SiLU and softmax; copies to a card and back, or on a CPU the dequantization of a weight."""
    from ..model.activation_offload import host_bytes

    # on a CPU each call takes a millisecond or two, which other processes seldom interrupt
    rows, width = (4096, 4096) if device.type == "cuda" else (256, 512)
    own = torch.Generator(device).manual_seed(0)  # the default generators are the run's
    a, b = (torch.randn(n, width, device=device, dtype=dtype, generator=own) for n in (rows, width))
    out, numbers = torch.empty_like(a), torch.zeros(4 * width**2, device=device, dtype=dtype)
    exponentials = torch.empty_like(numbers)
    products = _rate(device, lambda: torch.mm(a, b.T, out=out), 2 * rows * width**2 / 1e12)
    memory = _rate(device, lambda: torch.exp(numbers, out=exponentials), 2 * numbers.nbytes / 1e9)
    found = {"tflops": products, "bandwidth": memory}
    if device.type == "cuda":
        host, there = host_bytes(COPY_BYTES, device), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        up = _rate(device, lambda: there.copy_(host, non_blocking=True), COPY_BYTES / 1e9)
        down = _rate(device, lambda: host.copy_(there, non_blocking=True), COPY_BYTES / 1e9)
        return {**found, "pcie": min(up, down)}
    values = b if dtype.itemsize <= 4 else b.float()  # bitsandbytes knows no float64
    weight = Params4bit(values, quant_type="nf4", compress_statistics=True, requires_grad=False).to(device)
    unpacked = _rate(device, lambda: dequantize(weight, dtype, out=b), width**2 / 1e9)
    # what is offloaded or streamed is a copy in the same memory
    return {**found, "pcie": memory, "unpacking": unpacked}


def _rate(device: torch.device, run: Callable[[], object], amount: float) -> float:
    """The amount that ``run`` does a second at its fastest (other processes only make it slower), to two digits, so that two
    starts plan alike."""
    repeat = 4 if device.type == "cuda" else 1
    times: list[float] = []
    run()
    # where other processes hold a core, most calls wait for a thread
    while repeat * sum(times) < SECONDS or len(times) < CALLS:
        started = time.perf_counter()
        for _ in range(repeat):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - started) / repeat)
    return float(f"{amount / min(times):.2g}")


def _kind(machine: str, job: Workload) -> str:
    dtype, int8 = str(job.dtype).removeprefix("torch."), ", int8" * job.int8
    return f"{machine}, engine {job.engine}, {dtype}, {job.shape.layers} layers of {job.shape.hidden}{int8}"


def earlier_runs(machine: str, job: Workload) -> list[float]:
    """Measured over predicted speed of the last runs of a base of this size on a machine, oldest first."""
    return _all_runs().get(_kind(machine, job), [])


def add_run(machine: str, job: Workload, ratio: float) -> None:
    """Record a run's measured over predicted speed, in ``measured.json`` in the cache."""
    found, kind = _all_runs(), _kind(machine, job)
    cache_dir().mkdir(parents=True, exist_ok=True)
    write_json(cache_dir() / "measured.json", {**found, kind: [*found.get(kind, []), round(ratio, 4)][-RUNS:]})


def _all_runs() -> dict[str, list[float]]:
    """Kind → ratios, of ``measured.json``; a missing or damaged file is empty."""
    with suppress(OSError, ValueError):
        return TypeAdapter(dict[str, list[float]]).validate_json((cache_dir() / "measured.json").read_bytes())
    return {}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return main_memory()


def usable_memory(device: torch.device, memory: MemorySpec) -> int:
    """Bytes that can still be taken on the device, at most those of a card of the size ``memory.vram``, less its context."""
    free = free_memory(device)
    if memory.vram is None:
        return free
    return min(free, parse_size(memory.vram, "memory.vram") - CONTEXT_BYTES * (device.type == "cuda"))


def cap_allocator(device: torch.device, memory: MemorySpec) -> None:
    """Under WSL2, refuse PyTorch's allocator more than the plan was made for. The driver there moves what does not fit to main
    memory, and the run would be ten times slower, where an allocation that fails leads to a smaller plan."""
    if device.type == "cuda" and is_wsl():
        total = torch.cuda.get_device_properties(device).total_memory
        most = usable_memory(device, memory) + torch.cuda.memory_allocated(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), device)


def keep_freed_pages() -> None:
    """Let glibc keep the pages that a step frees: returning them to the system and getting them back costs a CPU run a twentieth
    of its time."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 32 * 2**20)
        mallopt(trim_threshold, 2**31 - 1)


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
        if kinds and "memory" not in kinds.split(","):
            continue
        top, names = root, ("memory.max", "memory.current", "inactive_file")
        if kinds:
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = top / path.strip("/")
        # inside a container the path may be the host's: of it and the folders above, the top is there
        for place in (folder, *folder.parents):
            limit, used = (place / name for name in names[:2])
            if place.is_relative_to(top) and limit.is_file() and (most := limit.read_text().strip()) != "max":
                cached = re.search(rf"^{names[2]} (\d+)$", (place / "memory.stat").read_text(), re.MULTILINE)
                rooms.append(int(most) - int(used.read_text()) + int(cached[1] if cached else 0))
    return max(0, min(rooms)) if rooms else None


_UNITS = {"": GIB, "t": 2**40, "g": GIB, "m": 2**20}


def parse_size(text: str, what: str) -> int:
    """Bytes of "8GiB", "7.5 GB", "8" (GiB: a card's GB are powers of two) or "512MiB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|[tgm](?:i?b)?)\s*", str(text).lower())
    if found is None or not float(found[1]):
        raise UserError(f"{what}: {text!r} is no size.", "Write 8GiB, for instance.")
    return int(float(found[1]) * _UNITS[found[2][:1]])


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU what its allocator reserved at most, on a CPU the largest resident set of the process since
    ``reset_peak_memory``. What a plan's ``peak`` counts, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    with suppress(OSError, IndexError):  # not Linux, or a sandbox that does not tell it
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Exclude from a CPU's ``peak_memory`` what loading and earlier stages took. Only Linux can do that."""
    if device.type == "cpu":
        with suppress(OSError):  # not Linux, or a sandbox without this file
            Path("/proc/self/clear_refs").write_text("5")
