"""The plan of a run: how much runs at once, what each layer keeps, what lies on the host. Made before anything is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from ..config.load import MemorySpec
from ..errors import UserError
from ..model.activation_offload import lockable
from ..model.allocator import is_wsl
from ..model.dequant_buffer import ScratchMode
from ..model.layer_spec import Keep
from .account import (
    CONTEXT_BYTES,
    GIB,
    Setting,
    account,
    in_words,
    kept_per_token,
    kept_widths,
    scratch_widths,
)
from .gpus import PROCESSOR, Gpu
from .machine import HOST_SHARE, Machine, main_memory, parse_size, process_memory
from .search import KEEPS, LEAST, Limits, cures, fixed_tokens, least_account, least_host, search
from .speed import step_time
from .workload import Shape, Workload

# At once on a CPU: enough for matrix products at full speed, little enough for its caches.
CPU_TOKENS = 2048
# Of the free memory, where the accounting is not exact: on a CPU, and for other engines' layers.
SHARE = 0.7


@dataclass(frozen=True)
class Plan:
    """The plan of a run; part of stage.json, so that a resumed run makes the same split and the same sums.

    Attributes:
        micro_tokens: a micro-batch holds at most so many tokens (one example at least).
        keep: what each layer keeps for its backward pass, from the first layer to the last (see ``layer``).
        offload: what the first so many layers keep lies on the host between the two passes (see ``offload``).
        stream: the decoder layers' weights lie on the host, and come to the device one layer ahead (see ``stream``).
        tile: the MLP runs over so many tokens at a time; None: over all of a micro-batch.
        scratch: how much room dequantized weights get (see ``memory``).
        reference: a live reference runs in the policy's pass (``together``), or in one of its own before it.
        threads: the number of CPU threads, which decides the order of sums there.
        bytes_per_token: of what all layers keep under this plan, wherever it lies.
        free_bytes: what is left of the free memory when base, adapters, gradients and optimizer are there.
        account: bytes of the device's memory by name, at the peak; the last entry is their sum (see ``account``).
        host: bytes of main memory that are locked, by name.
        managed: bytes of optimizer states that CUDA keeps on the host where the device is full.
        at: where in a step the peak is.
        seconds_per_step, tokens_per_second: what the cost model expects; 0: nothing is known.
    """

    micro_tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    reference: Literal["together", "own"] = "together"
    threads: int = 1
    bytes_per_token: int = 0
    free_bytes: int = 0
    account: dict[str, int] = field(default_factory=dict, hash=False)
    host: dict[str, int] = field(default_factory=dict, hash=False)
    managed: int = 0
    at: str = ""
    seconds_per_step: float = 0.0
    tokens_per_second: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))  # JSON knows lists only

    @property
    def recomputes(self) -> bool:
        """Whether any layer's matrix products are computed again in the backward pass."""
        return any(keep != "all" for keep in self.keep)

    @property
    def peak(self) -> int:
        """Bytes of the device's memory at the peak; 0: not counted."""
        return self.account.get("peak", 0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}

    def lines(self) -> list[str]:
        """What was decided, in words."""
        said = [
            f"{self.micro_tokens:,} tokens at once, {self.bytes_per_token / 2**20:.2f} MiB kept a token: "
            f"{kept_in_words(self.keep)}"
        ]
        if self.offload:
            which = "all layers" if self.offload == len(self.keep) else f"the first {self.offload} layers"
            said.append(f"what {which} keep lies in main memory between the passes")
        if self.stream:
            said.append("the base lies in main memory and is copied one layer ahead")
        if self.tile is not None:
            said.append(f"the MLP takes {self.tile:,} tokens at a time")
        return said


_WORDS: dict[Keep, str] = {
    "all": "everything that a matrix product computed",
    "attention": "layer inputs and the attention's output, the rest is recomputed",
    "input": "layer inputs, the rest is recomputed",
}


def kept_in_words(keep: Sequence[Keep]) -> str:
    first, last = keep[0], keep[-1]
    if first == last:
        return _WORDS[first]
    count = sum(k == first for k in keep)
    return f"{_WORDS[first]} (layers 1 to {count}); {_WORDS[last]} (the last {len(keep) - count})"


def this_machine(device: torch.device, dtype: torch.dtype, memory: MemorySpec, *, measure: bool = True) -> Machine:
    """The machine that we are on.

    Args:
        device: where the run will compute.
        dtype: in what.
        memory: ``vram`` caps what is free to what a card of that size would have (its context comes off; a CPU's process
            does not).
        measure: measure the speed; False: it does not matter.

    Raises:
        UserError: ``vram`` is no size.
    """
    host = int(main_memory() * HOST_SHARE)
    if measure:
        from .calibrate import measure as measured
    if device.type == "cpu":
        card = measured(device, dtype) if measure else PROCESSOR
        # the process is a part of the measured peak, so of the plan too; it has taken its memory already
        process = process_memory(device)
        free = free_memory(device)
        if memory.vram is not None:
            free = min(free, parse_size(memory.vram, "memory.vram"))
        return Machine("cpu", "the CPU", card, free + process, host, process)
    limit = None if memory.vram is None else parse_size(memory.vram, "memory.vram") - CONTEXT_BYTES
    if measure:
        card = measured(device, dtype)  # first: the libraries that it loads take room too
    if is_wsl():
        host = lockable(host, device)
    free = free_memory(device)
    if not measure:
        capability = torch.cuda.get_device_capability(device)
        card = Gpu(torch.cuda.get_device_name(device), free / GIB, 50, 500, 12, capability)
    return Machine("cuda", card.name, card, free if limit is None else min(free, limit), host)


def make_plan(job: Workload, machine: Machine, memory: MemorySpec) -> Plan:
    """The fastest plan that fits: searched on a card under the fused engine; elsewhere the first policy that fits.

    Args:
        job: what is computed.
        machine: where.
        memory: what the user fixed; ``host`` replaces the machine's.

    Raises:
        UserError: nothing fits the card; says how much is missing, and what would help. (A CPU's memory is no fixed
            number, and another engine's layers are not ours to count: they are never refused.)
    """
    host = machine.host if memory.host is None else parse_size(memory.host, "memory.host")
    limits = Limits(machine.free, host, machine.card, machine.device(job.dtype))
    if machine.kind == "cpu" or job.engine != "fused":
        return _simple(job, limits, memory, machine.name)
    found = search(job, limits, memory)
    if found is None:
        raise _refusal(job, limits, memory, machine)
    setting, fits = found.setting, found.account
    resident = sum(fits.resident.values()) + 4 * job.parameters
    return Plan(
        # the user's own number where it is less than an example: of two that would fit, one runs
        micro_tokens=min(setting.tokens, memory.micro_tokens or setting.tokens),
        keep=setting.keep,
        offload=setting.offload,
        stream=setting.stream,
        tile=setting.tile,
        scratch=setting.scratch,
        reference="together" if setting.together else "own",
        threads=torch.get_num_threads(),
        bytes_per_token=kept_per_token(job, setting.keep),
        free_bytes=max(0, machine.free - resident),
        account=fits.as_dict(),
        host=fits.host,
        managed=fits.managed,
        at=fits.at,
        seconds_per_step=round(found.time.step, 4),
        tokens_per_second=round(found.time.tokens_per_second, 2),
    )


def _simple(job: Workload, limits: Limits, memory: MemorySpec, name: str) -> Plan:
    """The first policy of ``all``, ``attention``, ``input`` under which a micro-batch of useful size fits, and then as
    many tokens as fit; a live reference in the policy's pass where that fits too. On a CPU what is offloaded or streamed
    lies in the same memory.

    Raises:
        UserError: ``memory.host`` is less than what ``offload`` or ``stream`` take at least.
    """
    layers = job.shape.layers
    wanted = CPU_TOKENS if limits.kind.backend == "cpu" else 16384
    wanted = max(job.longest, min(wanted, job.step_most or wanted))
    ours = job.engine == "fused"
    setting = Setting(
        job.longest,
        (LEAST,) * layers,
        layers if memory.offload and ours else 0,
        bool(memory.stream) and ours,
    )
    there_already = limits.kind.context
    budget = there_already + int((limits.device - there_already) * SHARE)
    host = None if memory.host is None else limits.host

    def host_of(setting: Setting) -> int:
        return sum(account(job, setting, limits.kind).host.values())

    def fits(setting: Setting) -> bool:
        found = account(job, setting, limits.kind)
        there = sum(found.host.values())
        return found.peak + there <= budget and (host is None or there <= host)

    fixed = replace(
        setting,
        keep=(memory.keep or LEAST,) * layers,
        tokens=job.longest if memory.micro_tokens is None else fixed_tokens(job, memory.micro_tokens),
    )
    if host is not None and host_of(fixed) > host:
        said = " and ".join(f"memory.{key}=true" for key in ("offload", "stream") if getattr(memory, key))
        raise UserError(
            f"{name}: {said} takes {in_words(host_of(fixed))} of main memory at least, and memory.host allows "
            f"{in_words(host)}.",
            f"Allow {-(-host_of(fixed) // GIB)}GiB, or leave {said.replace('=true', '')} out.",
        )
    if job.storage != "dense" and not fits(setting):
        setting = replace(setting, scratch="small")
    keep = memory.keep
    if keep is None:
        keep = LEAST
        useful = replace(setting, tokens=max(job.longest, min(wanted, 2048)))
        for policy in KEEPS[:-1]:
            if fits(replace(useful, keep=(policy,) * layers)):
                keep = policy
                break
    setting = replace(setting, keep=(keep,) * layers)
    together = fits(setting)
    setting = replace(setting, together=together)
    if memory.micro_tokens is not None:
        tokens = min(memory.micro_tokens, fixed_tokens(job, memory.micro_tokens))
    else:
        low, high = job.longest, wanted
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(replace(setting, tokens=middle)) else (low, middle - 1)
        tokens = low
    setting = replace(setting, tokens=max(tokens, job.longest))
    found = account(job, setting, limits.kind)
    time = step_time(job, setting, limits.card)
    resident = sum(found.resident.values()) + 4 * job.parameters
    return Plan(
        micro_tokens=tokens,
        keep=setting.keep,
        offload=setting.offload,
        stream=setting.stream,
        scratch=setting.scratch,
        reference="together" if together else "own",
        threads=torch.get_num_threads(),
        bytes_per_token=kept_per_token(job, setting.keep),
        free_bytes=max(0, limits.device - resident),
        account=found.as_dict() if ours else {},
        host=found.host,
        managed=found.managed,
        at=found.at,
        seconds_per_step=round(time.step, 4) if ours else 0.0,
        tokens_per_second=round(time.tokens_per_second, 2) if ours else 0.0,
    )


def _refusal(job: Workload, limits: Limits, memory: MemorySpec, machine: Machine) -> UserError:
    setting, least = least_account(job, limits, memory)
    missing = least.peak - limits.budget
    what = f"{'an example' if job.method == 'sft' else 'a pair'} of {job.longest:,} tokens"
    if setting.tokens > job.longest:
        what = f"a micro-batch of {setting.tokens:,} tokens"
    host = least_host(job, limits, memory)
    if missing > 0 or host is None:
        parts = sorted(((n, name) for name, n in least.as_dict().items() if name != "peak"), reverse=True)[:3]
        message = (
            f"{machine.name}: {in_words(missing)} are missing. The most frugal plan for {what} takes {in_words(least.peak)} "
            "of the card's memory ("
            + ", ".join(f"{name} {in_words(n)}" for n, name in parts)
            + f"); {in_words(limits.budget)} can be counted on of {in_words(limits.device)} free."
        )
    else:
        message = (
            f"{machine.name}: {what} fits only with {in_words(host)} in main memory, and {in_words(limits.host)} of it may "
            "be taken."
        )
    found = cures(job, limits, memory)
    if not found:
        return UserError(message, "No single change would do.")
    first = "This would do" if len(found) == 1 else "Any one of these would do"
    return UserError(message, f"{first}: {'; '.join(found)}.")


def scratch_bytes(config: Any, dtype: torch.dtype, mode: ScratchMode) -> int:
    """Of the dequantized weights of one decoder layer (``memory.scratch_elements``)."""
    return dtype.itemsize * scratch_widths(Shape.of(config), mode)


def kept_bytes(config: Any, dtype: torch.dtype, keep: Keep, *, ranks: int = 0) -> int:
    """Bytes a token that the decoder layers leave for the backward pass, exactly.

    Args:
        config: the Hugging Face configuration.
        dtype: of the hidden states.
        keep: the policy.
        ranks: the sum of the ranks of all adapters on all projections of a layer.
    """
    narrow, wide = kept_widths(Shape.of(config), keep, ranks)
    return config.num_hidden_layers * (narrow * dtype.itemsize + wide * max(4, dtype.itemsize))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return main_memory()


def cap_allocator(device: torch.device, memory: MemorySpec) -> None:
    """Under WSL2, refuse PyTorch's allocator more than the plan was made for. The driver there moves what does not fit to main
    memory, and the run would be ten times slower, where an allocation that fails lets it go on under a smaller plan."""
    if device.type != "cuda" or not is_wsl():
        return
    free = free_memory(device)
    if memory.vram is not None:
        free = min(free, parse_size(memory.vram, "memory.vram") - CONTEXT_BYTES)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (free + torch.cuda.memory_allocated(device)) / total), device)


def keep_freed_pages() -> bool:
    """Let glibc keep what a step frees for the next one: given back to the system, it costs a CPU run a twentieth of its
    time to get every page again. Returns whether it was told to; there is nothing to tell elsewhere."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # not Linux, or another C library
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))
