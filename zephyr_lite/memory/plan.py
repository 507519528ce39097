"""The plan of a run: the fastest execution settings that fit, chosen before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from ..config.load import MemorySpec
from ..errors import UserError
from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep, Reference
from .estimate import (
    CONTEXT_BYTES,
    GIB,
    Device,
    MemoryBreakdown,
    bounds,
    estimate,
    in_words,
    kept_per_token,
    layer_counts,
)
from .gpus import PROCESSOR, Gpu
from .machine import Machine, parse_size
from .speed import step_time, time_of_layers
from .workload import Workload

KEEPS: tuple[Keep, ...] = ("all", "attention", "input")
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


@dataclass(frozen=True)
class Plan(ExecutionConfig):
    """Execution settings with their predicted numbers; part of stage.json, so that a resumed run makes the same sums.

    Attributes:
        bytes_per_token: of what all layers keep, on the device or on the host.
        free_bytes: free memory less base, adapters, gradients and optimizer.
        account: bytes of the device's memory by name, at the peak; the last entry is their sum.
        host: bytes of main memory that are locked, by name.
        managed: bytes of optimizer states that CUDA keeps on the host where the device is full.
        at: the moment of the peak.
        seconds_per_step, tokens_per_second: predicted speed; 0: unknown.
    """

    bytes_per_token: int = 0
    free_bytes: int = 0
    account: dict[str, int] = field(default_factory=dict, hash=False)
    host: dict[str, int] = field(default_factory=dict, hash=False)
    managed: int = 0
    at: str = ""
    seconds_per_step: float = 0.0
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
        said = [
            f"{self.micro_tokens:,} tokens at once, {self.bytes_per_token / 2**20:.2f} MiB kept a token: "
            f"{kept_in_words(self.keep)}"
        ]
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


_WORDS: dict[Keep, str] = {
    "all": "everything that a matrix product computed",
    "attention": "layer inputs and the attention's output, the rest is recomputed",
    "input": "layer inputs, the rest is recomputed",
}


def kept_in_words(keep: Sequence[Keep]) -> str:
    first, last = keep[0], keep[-1]
    if first == last:
        return _WORDS[first]
    count = keep.count(first)
    return f"{_WORDS[first]} (layers 1 to {count}); {_WORDS[last]} (the last {len(keep) - count})"


@dataclass(frozen=True)
class Limits:
    """Memory and speed of the machine, as far as a run may use it.

    Attributes:
        free: bytes of the device's memory that the run may take, ``device.context`` included.
        host: bytes of main memory that may be locked.
        card: its speed.
        device: how it allocates.
        exact: the allocations are counted: the fused engine on a card. Then a plan uses all memory but ``MARGIN`` and a run
            that does not fit is refused; else it uses ``SHARE``, and takes the smallest settings if nothing fits.
    """

    free: int
    host: int
    card: Gpu
    device: Device
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

    def suffice(self, peak: Any, host: Any) -> Any:
        """Whether there is memory for so many bytes on the device and on the host (numbers, or arrays of them)."""
        there = peak if self.device.cuda else peak + host
        return (there <= self.budget) & (host <= self.host)


# -- candidates --------------------------------------------------------------------------------------------------------


def candidates(
    job: Workload, limits: Limits, memory: MemorySpec, *, least: bool = False, fitting: bool = False
) -> Iterator[ExecutionConfig]:
    """Execution settings by predicted speed, the fastest first.

    Args:
        memory: what the user fixed is the same in all of them.
        least: only settings with the smallest peaks; if any setting fits, one of these does.
        fitting: without most of those that do not fit (see ``bounds``).
    """
    fused, layers = job.engine == "fused", job.shape.layers
    streams = (False, True) if memory.stream is None and limits.exact else (bool(memory.stream) and fused,)
    references: tuple[Reference, ...] = ("together", "own") if job.live_reference else ("together",)
    scratches: tuple[ScratchMode, ...] = ("layer",) if job.storage == "dense" else ("layer", "small")
    if least:
        references, scratches = references[-1:], scratches[-1:]
    threads = torch.get_num_threads()
    settings = [
        ExecutionConfig(tokens, (), 0, stream, tile, scratch, reference, threads)
        for tokens, stream, scratch, reference in product(
            _tokens(job, limits, memory, least), streams, scratches, references
        )
        for tile in (None, *(t for t in TILES if fused and t < max(tokens, job.longest)))
    ]
    offloads = _offloads(job, limits, memory)
    if least:
        fillings = [((memory.keep or "input",) * layers, n) for n in offloads]
    else:
        fillings = list(_fillings(job, offloads, memory, mixed=limits.exact))
    counts, last = layer_counts(fillings)
    offload = np.array([n for _, n in fillings])
    # a CPU's order does not depend on how busy it was while it was measured: the same run is split alike every time
    card = limits.card if limits.device.cuda else PROCESSOR
    costs = np.empty((len(settings), len(fillings)))
    for row, setting in zip(costs, settings):
        host = np.sign(offload) + setting.stream
        extra = setting.micro_tokens / WANTED_TOKENS + (setting.tile is not None) + offload / layers
        time = time_of_layers(job, setting, card, counts)
        row[:] = (1 + WORTH_THE_HOST * host + TIE * extra) / time.tokens_per_second
        if fitting:
            row[~limits.suffice(*bounds(job, setting, limits.device, counts, last))] = np.inf
    for place in np.argsort(costs, axis=None, kind="stable").tolist():
        setting, (keep, leaves) = settings[place // len(fillings)], fillings[place % len(fillings)]
        if np.isinf(costs.flat[place]):
            return
        yield replace(setting, keep=keep, offload=leaves)


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


def _offloads(job: Workload, limits: Limits, memory: MemorySpec) -> Sequence[int]:
    """Numbers of layers whose kept activations go to the host."""
    if memory.offload is None and limits.exact and limits.host:
        return range(job.shape.layers + 1)
    return (job.shape.layers if memory.offload and job.engine == "fused" else 0,)


def _fillings(
    job: Workload, offloads: Sequence[int], memory: MemorySpec, *, mixed: bool
) -> Iterator[tuple[tuple[Keep, ...], int]]:
    """(what each layer keeps, layers that offload it)."""
    layers = job.shape.layers
    yield from product([(keep,) * layers for keep in (KEEPS if memory.keep is None else (memory.keep,))], offloads)
    if memory.keep is None and mixed and not memory.offload:
        for more, less in MIXTURES:
            for n in range(1, layers):
                yield (less,) * n + (more,) * (layers - n), 0  # the last layers' are there for a shorter time
                if n in offloads:
                    yield (more,) * n + (less,) * (layers - n), n


def fits(job: Workload, execution: ExecutionConfig, limits: Limits) -> MemoryBreakdown | None:
    """The predicted memory, if device and host have that much."""
    found = estimate(job, execution, limits.device)
    return found if limits.suffice(found.peak, sum(found.host.values())) else None


def feasible(job: Workload, limits: Limits, memory: MemorySpec) -> bool:
    """Whether any settings fit."""
    return any(fits(job, execution, limits) for execution in candidates(job, limits, memory, least=True))


def make_plan(job: Workload, machine: Machine, memory: MemorySpec) -> Plan:
    """The fastest plan that fits.

    Args:
        memory: the user's settings; ``host`` replaces the machine's.

    Raises:
        UserError: nothing fits; tells how much is missing, and what would help. (Only memory.host is refused on a CPU and for
            other engines.)
    """
    limits = Limits.of(job, machine, memory)
    for execution in candidates(job, limits, memory, fitting=True):
        if fits(job, execution, limits):
            return _plan(job, execution, limits)
    if limits.exact:
        raise _refusal(job, limits, memory, machine.name)
    least = [(estimate(job, e, limits.device), e) for e in candidates(job, limits, memory, least=True)]
    allowed = [(found.peak, n, e) for n, (found, e) in enumerate(least) if sum(found.host.values()) <= limits.host]
    if not allowed:
        raise _refusal(job, limits, memory, machine.name)
    return _plan(job, min(allowed)[2], limits)


def smaller(
    plan: Plan, job: Workload, limits: Limits, memory: MemorySpec, *, tokens: int, several: bool, training: bool
) -> Plan | None:
    """The next smaller plan after one that ran out of memory: of the same list, the fastest that takes clearly less.

    Args:
        tokens: of the micro-batch that failed.
        several: it had more than one example.
        training: a backward pass follows.

    Returns:
        None where nothing is left to try.
    """
    failed = replace(plan, micro_tokens=min(plan.micro_tokens, tokens))
    now = estimate(job, failed, limits.device, training=training)
    enough = now.peak - SAVING * sum(now.transient.values())
    best: tuple[int, ExecutionConfig] | None = None
    for execution in candidates(job, limits, memory):
        if execution.micro_tokens > max(failed.micro_tokens, job.longest) or execution.stream < plan.stream:
            continue  # a streamed base does not come back
        found = estimate(job, execution, limits.device, training=training)
        if sum(found.host.values()) > limits.host:
            continue
        if found.peak <= enough:
            return _plan(job, execution, limits)
        if found.peak < (now.peak if best is None else best[0]):
            best = found.peak, execution
    if best is not None:
        return _plan(job, best[1], limits)
    return replace(plan, micro_tokens=1) if several and plan.micro_tokens > 1 else None


def _plan(job: Workload, execution: ExecutionConfig, limits: Limits) -> Plan:
    found, time = estimate(job, execution, limits.device), step_time(job, execution, limits.card)
    fused = job.engine == "fused"
    return Plan(
        **vars(execution),
        bytes_per_token=kept_per_token(job, execution.keep),
        free_bytes=max(0, limits.free - sum(found.resident.values()) - 4 * job.parameters),
        account=found.as_dict() if fused else {},
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
        longer = job.at(longest=tokens, segment=segment, step_tokens=None, step_most=None)
        low, high = (middle, high) if feasible(longer, limits, memory) else (low, middle - 1)
    return low * step


def _least_host(job: Workload, limits: Limits, memory: MemorySpec) -> int | None:
    """Bytes of main memory with which it would fit; None: the device is too small with any."""
    anything = replace(limits, host=2**62)
    found = (fits(job, execution, anything) for execution in candidates(job, anything, memory, least=True))
    return min((sum(each.host.values()) for each in found if each is not None), default=None)


def _refusal(job: Workload, limits: Limits, memory: MemorySpec, name: str) -> UserError:
    least = [(estimate(job, e, limits.device), e.micro_tokens) for e in candidates(job, limits, memory, least=True)]
    found, tokens = min(least, key=lambda pair: pair[0].peak)
    what = f"{'an example' if job.method == 'sft' else 'a pair'} of {job.longest:,} tokens"
    if tokens > job.longest:
        what = f"a micro-batch of {tokens:,} tokens"
    missing, host = found.peak - limits.budget, _least_host(job, limits, memory)
    if host is None:
        parts = sorted(((n, part) for part, n in found.as_dict().items() if part != "peak"), reverse=True)[:3]
        message = (
            f"{name}: {in_words(missing)} are missing. The smallest plan for {what} takes {in_words(found.peak)} of the "
            f"card's memory ({', '.join(f'{part} {in_words(n)}' for n, part in parts)}); {in_words(limits.budget)} can be "
            f"counted on of {in_words(limits.free)} free."
        )
    else:
        message = (
            f"{name}: {what} fits only with {in_words(host)} in main memory, and the run may take {in_words(limits.host)} "
            "of it."
        )
    helpful = suggestions(job, limits, memory)
    if not helpful:
        return UserError(message, "No single change is enough.")
    first = "This is enough" if len(helpful) == 1 else "Any one of these is enough"
    return UserError(message, f"{first}: {'; '.join(helpful)}.")


def suggestions(job: Workload, limits: Limits, memory: MemorySpec) -> list[str]:
    """Single changes with which it fits."""
    fixed = {key for key, value in memory if value is not None} - {"vram", "host"}
    free = {key: memory.model_copy(update={key: None}) for key in sorted(fixed)}
    found = [f"memory.{key} left to the plan" for key, spec in free.items() if feasible(job, limits, spec)]
    host = _least_host(job, limits, memory)
    if host is not None and host > limits.host:
        found.append(f"memory.host={-(-host // GIB)}GiB (a machine with that much main memory to spare)")

    def first(changes: dict[str, Workload]) -> list[str]:
        return [word for word, changed in changes.items() if feasible(changed, limits, memory)][:1]

    if job.optim in ("adamw_torch", "paged_adamw_32bit"):
        found += first({f"optim={name}": job.at(optim=name) for name in ("adamw_8bit", "paged_adamw_8bit")})
    if job.storage == "dense":
        found += first({"load_in_4bit=true": job.at(storage="nf4 nested")})
    rank = max((r for a in job.adapters if a.trained for layer in a.ranks for r in layer.values()), default=1)
    found += first({f"lora_r={r}": with_rank(job, r) for r in _powers_below(rank, 4)})
    per_example = 1 if job.method == "sft" else 2
    lengths = _powers_below(-(-job.longest // per_example), 64)
    found += first({f"max_length={n}": job.at(longest=n * per_example) for n in lengths})
    context = limits.device.context or CONTEXT_BYTES
    for size in SIZES:
        larger = replace(limits, free=size * GIB, device=replace(limits.device, context=context))
        if limits.exact and larger.free > limits.free and feasible(job, larger, memory):
            return [*found, f"a card of {size} GB"]
    return found


def _powers_below(value: int, least: int) -> list[int]:
    """The powers of two below `value`, the largest first."""
    return [1 << k for k in range(value.bit_length(), 1, -1) if least <= 1 << k < value]


def with_rank(job: Workload, r: int) -> Workload:
    """The same workload with the trained adapter at another rank."""
    return job.at(adapters=tuple(a.with_rank(r) if a.trained else a for a in job.adapters))
