"""The plan of a run: the fastest execution settings that fit, chosen before anything is loaded."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from ..config.load import MemorySpec
from ..errors import UserError
from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep, Reference
from .estimate import CONTEXT_BYTES, GIB, Device, MemoryBreakdown, estimate, in_words, kept_per_token
from .gpus import PROCESSOR, Gpu
from .machine import Machine, parse_size
from .speed import step_time
from .workload import Workload

# (more, less): what layers keep where they do not keep alike
MIXTURES: tuple[tuple[Keep, Keep], ...] = (("all", "attention"), ("all", "input"), ("attention", "input"))
# Tokens of a micro-batch: enough for matrix products at full speed; on a CPU few enough for its caches.
WANTED_TOKENS, CPU_TOKENS = 16384, 2048
# Tokens that the MLP takes at a time; a longer tile is the faster one.
TILES = (8192, 2048, 512)
# Share of the free memory that a plan leaves alone: the prediction is meant to be right to 5 %.
MARGIN = 0.03
# Share of the free memory that is planned with on a CPU and for other engines, whose allocations are not counted exactly.
SHARE = 0.7
# Settings whose speeds differ by no more than this are equally fast: the simpler one comes first.
TIE = 0.002
# How much faster a setting must be to be worth locking main memory: that slows the rest of the machine, and the cost model is
# from data sheets until a card was measured.
WORTH_THE_HOST = 0.04
# A smaller plan saves at least this share of the transient bytes of the one that did not fit.
SAVING = 0.1
SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141)


_WORDS: dict[Keep, str] = {
    "all": "everything that a matrix product computed",
    "attention": "layer inputs and the attention's output, the rest is recomputed",
    "input": "layer inputs, the rest is recomputed",
}


@dataclass(frozen=True)
class Plan(ExecutionConfig):
    """Execution settings with their predicted numbers; part of stage.json, so that a resumed run makes the same sums."""

    bytes_per_token: int = 0  # of what all layers keep, on the device or on the host
    free_bytes: int = 0  # free memory less base, adapters, gradients and optimizer
    # bytes of the device's memory by name, at the peak; the last entry is their sum
    account: dict[str, int] = field(default_factory=dict, hash=False)
    host: dict[str, int] = field(default_factory=dict, hash=False)  # bytes of main memory that are locked, by name
    managed: int = 0  # bytes of optimizer states that CUDA keeps on the host where the device is full
    at: str = ""  # the moment of the peak
    seconds_per_step: float = 0.0  # predicted speed; 0: unknown
    tokens_per_second: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))  # a list in JSON

    @property
    def recomputes(self) -> bool:
        """Whether any layer's matrix products are computed again in the backward pass."""
        return any(keep != "all" for keep in self.keep)

    @property
    def peak(self) -> int:
        """Bytes of the device's memory at the peak; 0: unknown."""
        return self.account.get("peak", 0)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}

    def lines(self) -> list[str]:
        """The settings in words."""
        kept, last = _WORDS[self.keep[0]], self.keep[-1]
        if (count := self.keep.count(self.keep[0])) < len(self.keep):
            kept += f" (layers 1 to {count}); {_WORDS[last]} (the last {len(self.keep) - count})"
        said = [f"{self.micro_tokens:,} tokens at once, {self.bytes_per_token / 2**20:.2f} MiB kept a token: {kept}"]
        if self.offload:
            which = "all layers" if self.offload == len(self.keep) else f"the first {self.offload} layers"
            said.append(f"activations of {which} are in main memory between the two passes")
        if self.stream:
            said.append("the base is in main memory and is copied one layer ahead")
        if self.tile is not None:
            said.append(f"the MLP takes {self.tile:,} tokens at a time")
        if self.scratch == "small":
            said.append("gate and up are dequantized twice, in a smaller buffer")
        if self.reference == "own":
            said.append("the reference runs in a pass of its own")
        return said


@dataclass(frozen=True)
class Limits:
    """Memory and speed of the machine, as far as a run may use it."""

    free: int  # bytes of the device's memory that the run may take, ``device.context`` included
    host: int  # bytes of main memory that may be locked
    card: Gpu  # its speed
    device: Device  # how it allocates
    # the allocations are counted: the fused engine on a card. Then a plan uses all memory but ``MARGIN`` and a run
    # that does not fit is refused; else it uses ``SHARE``, and takes the smallest settings if nothing fits
    exact: bool = True

    @classmethod
    def of(cls, job: Workload, machine: Machine, memory: MemorySpec) -> Limits:
        host = machine.host if memory.host is None else parse_size(memory.host, "memory.host")
        device = machine.device(job.dtype)
        if not device.cuda and memory.host is None:
            host = machine.free  # offloaded bytes are in the memory that is planned with
        return cls(machine.free, host, machine.card, device, device.cuda and job.engine == "fused")

    @property
    def budget(self) -> int:
        """Bytes of the device's memory that a plan may take."""
        if self.exact:
            return int(self.free * (1 - MARGIN))
        return self.device.context + int((self.free - self.device.context) * SHARE)


Found = tuple[ExecutionConfig, MemoryBreakdown]


def fitting(
    job: Workload,
    limits: Limits,
    memory: MemorySpec,
    *,
    most: float | None = None,
    least: bool = False,
    training: bool = True,
) -> Iterator[Found]:
    """Execution settings that fit, and their memory. Of settings that differ only in how many layers offload, or keep less,
    the fewest and the most layers that fit: time is a linear function of their number.

    Args:
        memory: what the user fixed is the same in all of them.
        most: bytes on the device at the peak; None: the budget.
        least: only settings with the smallest peaks; if any setting fits, one of these does.
        training: a backward pass follows.
    """
    fused, layers = job.engine == "fused", job.shape.layers
    most = limits.budget if most is None else most
    streams = (False, True) if memory.stream is None and limits.exact else (bool(memory.stream) and fused,)
    references: tuple[Reference, ...] = ("together", "own") if job.live_reference else ("together",)
    scratches: tuple[ScratchMode, ...] = ("layer",) if job.storage == "dense" else ("layer", "small")
    if least:
        references, scratches = references[-1:], scratches[-1:]
    keeps: tuple[Keep, ...] = ("input",) if least else ("all", "attention", "input")
    if memory.keep is not None:
        keeps = (memory.keep,)
    any_offload = memory.offload is None and limits.exact and limits.host > 0
    fixed_offload = layers if memory.offload and fused else 0
    # (what the first n layers keep, what the others keep, whether the first n offload it, the fewest n, the most)
    splits = [
        (keep, keep, True, 0, layers) if any_offload else (keep, keep, True, fixed_offload, fixed_offload)
        for keep in keeps
    ]
    if memory.keep is None and limits.exact and not memory.offload and not least:
        for more, less in MIXTURES:
            splits.append((less, more, False, 1, layers - 1))  # the last layers' are there for a shorter time
            if any_offload:
                splits.append((more, less, True, 1, layers - 1))
    threads = torch.get_num_threads()
    for tokens, stream, scratch, reference in product(
        _tokens(job, limits, memory, least), streams, scratches, references
    ):
        for tile in (None, *(t for t in TILES if fused and t < max(tokens, job.longest))):
            setting = ExecutionConfig(tokens, (), 0, stream, tile, scratch, reference, threads)
            for first, last, offloads, fewest, many in splits:
                yield from _ends(job, limits, setting, first, last, offloads, fewest, many, most, training)


def _ends(
    job: Workload,
    limits: Limits,
    setting: ExecutionConfig,
    first: Keep,
    last: Keep,
    offloads: bool,
    fewest: int,
    many: int,
    most: float,
    training: bool,
) -> Iterator[Found]:
    """Of the numbers of first layers (see ``fitting``), the least and the largest that fit: more layers take less of the device
    and more of the host."""
    layers = job.shape.layers

    def split(n: int) -> tuple[Found, bool, int]:
        """(settings and memory, whether the device has that much, bytes on the host)."""
        execution = replace(setting, keep=(first,) * n + (last,) * (layers - n), offload=n * offloads)
        found = estimate(job, execution, limits.device, training=training)
        host = sum(found.host.values())
        return (execution, found), found.peak + (0 if limits.device.cuda else host) <= most, host

    low, low_fits, low_host = split(fewest)
    if low_host > limits.host:
        return
    if many > fewest:
        high, high_fits, high_host = split(many)
        if high_host > limits.host:
            many = fewest + (limits.host - low_host) * (many - fewest) // (high_host - low_host)
            high, high_fits, _ = split(many)
        if not high_fits:
            return
        if not low_fits:
            fewest = bisect_left(range(many), True, lo=fewest + 1, key=lambda n: split(n)[1])
            low, low_fits, _ = split(fewest)
        if many > fewest:
            yield high
    if low_fits:
        yield low


def _tokens(job: Workload, limits: Limits, memory: MemorySpec, least: bool) -> list[int]:
    """Sizes of a micro-batch: the longest example at least, a whole step at most."""
    if memory.micro_tokens is not None:
        return [min(memory.micro_tokens, max(job.longest, job.step_most or memory.micro_tokens))]
    if least:
        # a step in one piece has its gradients come while activations go
        whole = job.step_most if job.step_most is not None and job.longest < job.step_most < 2 * job.longest else None
        return [job.longest] if whole is None else [job.longest, whole]
    wanted = WANTED_TOKENS if limits.device.cuda else CPU_TOKENS
    most = max(job.longest, min(wanted, job.step_most or job.step_tokens or wanted))
    sizes = (*(1 << k for k in range(8, 15)), *(job.longest * n for n in (2, 3, 4, 6, 8)))
    return sorted({job.longest, most, *(n for n in sizes if job.longest < n <= most)}, reverse=True)


def _cost(job: Workload, execution: ExecutionConfig, limits: Limits) -> float:
    """Predicted seconds a token, with what makes the simpler of two settings the better one."""
    # a CPU's order does not depend on how busy it was while it was measured: the same run is split alike every time
    card = limits.card if limits.device.cuda else PROCESSOR
    host = (execution.offload > 0) + execution.stream
    extra = execution.micro_tokens / WANTED_TOKENS + (execution.tile is not None)
    extra += execution.offload / job.shape.layers
    return (1 + WORTH_THE_HOST * host + TIE * extra) / step_time(job, execution, card).tokens_per_second


def feasible(job: Workload, limits: Limits, memory: MemorySpec) -> bool:
    """Whether any settings fit."""
    return any(True for _ in fitting(job, limits, memory, least=True))


def make_plan(job: Workload, machine: Machine, memory: MemorySpec) -> Plan:
    """The fastest plan that fits.

    Args:
        memory: the user's settings; ``host`` replaces the machine's.

    Raises:
        UserError: nothing fits; tells how much is missing, and what would help. (Only memory.host is refused on a CPU and for
            other engines.)
    """
    limits = Limits.of(job, machine, memory)
    fastest = min(fitting(job, limits, memory), key=lambda found: _cost(job, found[0], limits), default=None)
    if fastest is None and not limits.exact:
        smallest = fitting(job, limits, memory, most=math.inf, least=True)
        fastest = min(smallest, key=lambda found: found[1].peak, default=None)
    if fastest is None:
        raise _refusal(job, limits, memory, machine.name)
    return _plan(job, *fastest, limits)


def smaller(
    plan: Plan, job: Workload, limits: Limits, memory: MemorySpec, *, tokens: int, several: bool, training: bool
) -> Plan | None:
    """The next smaller plan after one that ran out of memory: the fastest that takes clearly less.

    Args:
        tokens: of the micro-batch that failed.
        several: it had more than one example.
        training: a backward pass follows.

    Returns:
        None where nothing is left to try.
    """
    failed = replace(plan, micro_tokens=min(plan.micro_tokens, tokens))
    now = estimate(job, failed, limits.device, training=training)
    longest = max(failed.micro_tokens, job.longest)
    for most, least in ((now.peak - SAVING * sum(now.transient.values()), False), (now.peak - 1, True)):
        found = [
            (execution, account)
            for execution, account in fitting(job, limits, memory, most=most, least=least, training=training)
            # a streamed base does not come back
            if execution.micro_tokens <= longest and execution.stream >= plan.stream
        ]
        if found:
            key = (lambda f: f[1].peak) if least else (lambda f: _cost(job, f[0], limits))
            execution, _ = min(found, key=key)
            return _plan(job, execution, estimate(job, execution, limits.device), limits)
    return replace(plan, micro_tokens=1) if several and plan.micro_tokens > 1 else None


def _plan(job: Workload, execution: ExecutionConfig, found: MemoryBreakdown, limits: Limits) -> Plan:
    time, fused = step_time(job, execution, limits.card), job.engine == "fused"
    return Plan(
        **vars(execution),
        bytes_per_token=kept_per_token(job, execution.keep),
        free_bytes=max(0, limits.free - sum(found.resident.values()) - 4 * job.parameters),
        account={**found.resident, **found.transient, "peak": found.peak} if fused else {},
        host=found.host,
        managed=found.managed,
        at=found.at,
        seconds_per_step=round(time.step, 4) if fused else 0.0,
        tokens_per_second=round(time.tokens_per_second, 2) if fused else 0.0,
    )


# -- where nothing fits ------------------------------------------------------------------------------------------------


def longest_context(job: Workload, limits: Limits, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""
    low, high = 0, most // step
    while low < high:
        middle = (low + high + 1) // 2
        tokens = middle * step
        segment = min(job.segment or tokens, tokens)
        longer = replace(job, longest=tokens, segment=segment, step_tokens=None, step_most=None)
        low, high = (middle, high) if feasible(longer, limits, memory) else (low, middle - 1)
    return low * step


def _refusal(job: Workload, limits: Limits, memory: MemorySpec, name: str) -> UserError:
    anything = list(fitting(job, replace(limits, host=2**62), memory, most=math.inf, least=True))
    execution, found = min(anything, key=lambda pair: pair[1].peak)
    what = f"{'an example' if job.method == 'sft' else 'a pair'} of {job.longest:,} tokens"
    if execution.micro_tokens > job.longest:
        what = f"a micro-batch of {execution.micro_tokens:,} tokens"
    host = _least_host(job, limits, memory)
    if host is None:
        parts = sorted(((n, part) for part, n in (found.resident | found.transient).items()), reverse=True)[:3]
        message = (
            f"{name}: {in_words(found.peak - limits.budget)} are missing. The smallest plan for {what} takes "
            f"{in_words(found.peak)} of the card's memory ({', '.join(f'{part} {in_words(n)}' for n, part in parts)}); "
            f"{in_words(limits.budget)} can be counted on of {in_words(limits.free)} free."
        )
    else:
        message = (
            f"{name}: {what} fits only with {in_words(host)} in main memory, and the run may take {in_words(limits.host)} "
            "of it."
        )
    helpful = suggestions(job, limits, memory)
    hint = f"Any one of these is enough: {'; '.join(helpful)}." if helpful else "No single change is enough."
    return UserError(message, hint)


def _least_host(job: Workload, limits: Limits, memory: MemorySpec) -> int | None:
    """Bytes of main memory with which it would fit; None: the device is too small with any."""
    found = fitting(job, replace(limits, host=2**62), memory, least=True)
    return min((sum(account.host.values()) for _, account in found), default=None)


def suggestions(job: Workload, limits: Limits, memory: MemorySpec) -> list[str]:
    """Single changes with which it fits, each tried."""
    same, per_example = (limits, memory), 1 if job.method == "sft" else 2
    rank = max((r for a in job.adapters if a.trained for layer in a.ranks for r in layer.values()), default=1)
    context = limits.device.context or CONTEXT_BYTES
    # of each group the first change that is enough
    groups: list[list[tuple[str, Workload, Limits, MemorySpec]]] = [
        [(f"memory.{key} left to the plan", job, limits, memory.model_copy(update={key: None}))]
        for key, value in memory
        if value is not None and key not in ("vram", "host")
    ]
    if job.optim in ("adamw_torch", "paged_adamw_32bit"):
        groups.append([(f"optim={o}", replace(job, optim=o), *same) for o in ("adamw_8bit", "paged_adamw_8bit")])
    if job.storage == "dense":
        groups.append([("load_in_4bit=true", replace(job, storage="nf4 nested"), *same)])
    powers = [1 << k for k in range(20, 1, -1)]
    groups.append([(f"lora_r={r}", with_rank(job, r), *same) for r in powers if r < rank])
    lengths = [n for n in powers if 64 <= n < job.longest / per_example]
    groups.append([(f"max_length={n}", replace(job, longest=n * per_example), *same) for n in lengths])
    cards = [size for size in SIZES if limits.exact and size * GIB > limits.free]
    larger = replace(limits, device=replace(limits.device, context=context))
    groups.append([(f"a card of {size} GB", job, replace(larger, free=size * GIB), memory) for size in cards])
    found = []
    for group in groups:
        found += next(([text] for text, changed, limited, spec in group if feasible(changed, limited, spec)), [])
    host = _least_host(job, limits, memory)
    if host is not None and host > limits.host:
        found.append(f"memory.host={-(-host // GIB)}GiB (a machine with that much main memory to spare)")
    return found


def with_rank(job: Workload, r: int) -> Workload:
    """The same workload with the trained adapter at another rank."""
    ranks = [tuple(dict.fromkeys(layer, r) for layer in a.ranks) if a.trained else a.ranks for a in job.adapters]
    return replace(job, adapters=tuple(replace(a, ranks=new) for a, new in zip(job.adapters, ranks)))
