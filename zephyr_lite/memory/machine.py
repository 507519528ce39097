"""The machine that a run is planned for: this one, measured, or a card by name; what its memory has free and what a run took."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

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
from .device import CONTEXT_BYTES, CPU, GIB, Device
from .gpus import PROCESSOR, Gpu
from .workload import Workload

logger = logging.getLogger(__name__)
# Share of the available main memory that a run may lock for what is offloaded or streamed.
HOST_SHARE = 0.5
# Main memory to spare on a machine that is not this one, unless memory.host says otherwise.
HOST_ELSEWHERE = 16 * GIB
THE_CPU = "the CPU"
# of each measurement of speed, at least
SECONDS, CALLS = 0.15, 25
COPY_BYTES = 128 * 2**20
RUNS = 5  # the newest ones of a kind whose measured speed corrects the predicted one
# of a CPU's measurements: each takes a millisecond or two, which other processes seldom interrupt
TOKENS, WIDTH, ELEMENTS = 256, 512, 2**20


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
    vram = None if memory.vram is None else parse_size(memory.vram, "memory.vram")
    host = None if memory.host is None else parse_size(memory.host, "memory.host")
    if device.type == "cpu":
        card = _processor(dtype, torch.get_num_threads()) if measure else PROCESSOR
        # the process is a part of the measured peak, so of the plan too; it has taken its memory already
        process = process_memory(device)
        free = process + (free_memory(device) if vram is None else min(free_memory(device), vram))
        # offloaded bytes are in the memory that is planned with
        return Machine(THE_CPU, card, free, free if host is None else host, replace(CPU, context=process))
    capability = torch.cuda.get_device_capability(device)
    if measure:
        card = _measured_card(device, dtype)  # first: the libraries that it loads take memory too
    else:
        card = Gpu(torch.cuda.get_device_name(device), 0, 50, 500, 12, capability)
    if host is None:
        host = int(main_memory() * HOST_SHARE)
        if is_wsl():
            from ..model.activation_offload import lockable

            host = lockable(host, device)
    free = free_memory(device)
    free = free if vram is None else min(free, vram - CONTEXT_BYTES)
    return Machine(card.name, card, free, host, Device.of(capability, dtype.itemsize == 2, context=0))


def _card_rates(device: torch.device, dtype: torch.dtype, free: int) -> tuple[float, float, float]:
    """(10^12 operations of a product, 10^9 bytes through the card's memory, 10^9 between it and locked memory) a second."""
    from ..model.activation_offload import host_bytes

    rows, width = (4096, 4096) if free > 2**30 else (1024, 2048)
    a, b = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(rows, rows, device=device, dtype=dtype)
    size = min(COPY_BYTES, free // 8)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    host, there = host_bytes(size // 2, device), source[: size // 2]
    products = _rate(device, lambda: torch.mm(a, b.T, out=out), 2 * rows * rows * width / 1e12)
    memory = _rate(device, lambda: target.copy_(source), 2 * size / 1e9)
    up = _rate(device, lambda: there.copy_(host, non_blocking=True), size // 2 / 1e9)
    down = _rate(device, lambda: host.copy_(there, non_blocking=True), size // 2 / 1e9)
    return products, memory, min(up, down)


def _measured_card(device: torch.device, dtype: torch.dtype) -> Gpu:
    """The speed of a card, in about two seconds: matrix products, and copies on it and to locked memory."""
    properties = torch.cuda.get_device_properties(device)
    products, memory, link = _card_rates(device, dtype, torch.cuda.mem_get_info(device)[0])
    # autograd's thread has a handle and a workspace of its own, which are to be there when free memory is asked for
    weight = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    (weight @ weight).sum().backward()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts them
    torch.cuda.empty_cache()
    return Gpu(
        name=properties.name,
        memory=properties.total_memory / 2**30,
        tflops=products,
        bandwidth=memory,
        pcie=link,
        capability=torch.cuda.get_device_capability(device),
        int8=4.0 if "GeForce" in properties.name else 2.0,
        share=0.9,  # of what one product alone reaches: others are smaller, and the card gets warm
        measured=True,
    )


@cache
def _processor(dtype: torch.dtype, threads: int) -> Gpu:
    """The speed of the CPU with this number of threads, in less than a second, once in a process: a matrix product, an
    exponential and the dequantization of a weight."""
    cpu = torch.device("cpu")
    # no random numbers: the generators are the run's
    a, b = torch.ones(TOKENS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    out = torch.empty(TOKENS, WIDTH, dtype=dtype)
    products = _rate(cpu, lambda: torch.mm(a, b.T, out=out), 2 * TOKENS * WIDTH * WIDTH / 1e12)
    # not a copy: what only moves bytes on a card is bound by its arithmetic here, SiLU and softmax most of all
    logits = torch.ones(ELEMENTS, dtype=dtype)
    weights = torch.empty_like(logits)
    memory = _rate(cpu, lambda: torch.exp(logits, out=weights), 2 * ELEMENTS * dtype.itemsize / 1e9)
    values = b if dtype.itemsize <= 4 else b.float()  # bitsandbytes knows no float64
    weight = Params4bit(values, quant_type="nf4", compress_statistics=True, requires_grad=False).to("cpu")
    buffer = torch.empty(WIDTH, WIDTH, dtype=dtype)
    unpacked = _rate(cpu, lambda: dequantize(weight, dtype, out=buffer), WIDTH * WIDTH / 1e9)
    return replace(
        PROCESSOR,
        tflops=products,
        bandwidth=memory,
        pcie=memory,  # what is offloaded or streamed is a copy in the same memory
        unpacking=unpacked,
        measured=True,
    )


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
    dtype = str(job.dtype).removeprefix("torch.")
    return (
        f"{machine}, engine {job.engine}, {dtype}, {job.shape.layers} layers of {job.shape.hidden}{', int8' * job.int8}"
    )


def earlier_runs(machine: str, job: Workload) -> list[float]:
    """Measured over predicted speed of the last runs of a base of this size on a machine, oldest first."""
    return _measured().get(_kind(machine, job), [])


def add_run(machine: str, job: Workload, ratio: float) -> None:
    """Record a run's measured over predicted speed, in ``measured.json`` in the cache."""
    file = cache_dir() / "measured.json"
    found, kind = _measured(), _kind(machine, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**found, kind: [*found.get(kind, []), round(ratio, 4)][-RUNS:]})


def _measured() -> dict[str, list[float]]:
    file = cache_dir() / "measured.json"
    try:
        return TypeAdapter(dict[str, list[float]]).validate_json(file.read_bytes()) if file.exists() else {}
    except ValueError:
        logger.warning(f"{file}: damaged, so earlier runs do not correct the plan; the next run starts it anew")
        return {}


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
        if kinds == "":
            top, files = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.strip("/")
        if not folder.is_dir():  # inside a container the path may be the host's, and the group itself is the top
            folder = top
        while folder.is_relative_to(top):
            limit = folder / files[0]
            if limit.is_file() and (most := limit.read_text().strip()) != "max":
                stat = (folder / "memory.stat").read_text().split()
                cached = int(stat[stat.index(files[2]) + 1]) if files[2] in stat else 0
                rooms.append(int(most) - int((folder / files[1]).read_text()) + cached)
            folder = folder.parent
    return max(0, min(rooms)) if rooms else None


_UNITS = {"": GIB, "t": 2**40, "g": GIB, "m": 2**20}


def parse_size(text: str, what: str) -> int:
    """Bytes of "8GiB", "7.5 GB", "8" (GiB: a card's GB are powers of two) or "512MiB"."""
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Exclude from a CPU's ``peak_memory`` what loading and earlier stages took. Only Linux can do that."""
    if device.type == "cpu":
        with suppress(OSError):  # not Linux, or a sandbox without this file
            Path("/proc/self/clear_refs").write_text("5")
