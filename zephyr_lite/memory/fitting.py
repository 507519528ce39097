"""Execution settings that fit into the memory of a device, and what to change where none do."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import product

import torch

from ..config.load import MemorySpec
from ..errors import UserError
from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep, Reference
from .estimate import MemoryBreakdown, estimate
from .gpus import CONTEXT_BYTES, GIB, in_words
from .machine import Machine
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
# GB of the cards that a refusal may name
SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141)

Found = tuple[ExecutionConfig, MemoryBreakdown]
Planned = tuple[Workload, Machine, MemorySpec]


def is_exact(job: Workload, machine: Machine) -> bool:
    """Whether the allocations are counted: the fused engine on a card. Then a plan uses all memory but ``MARGIN`` and a run
    that does not fit is refused; else it uses ``SHARE``, and takes the smallest settings if nothing fits."""
    return job.engine == "fused" and machine.device.cuda


def budget(job: Workload, machine: Machine) -> int:
    """Bytes of the device's memory that a plan may take."""
    if is_exact(job, machine):
        return int(machine.free * (1 - MARGIN))
    return machine.device.context + int((machine.free - machine.device.context) * SHARE)


def fitting(
    job: Workload, machine: Machine, memory: MemorySpec, *, most: float | None = None, training: bool = True
) -> Iterator[Found]:
    """Execution settings that fit, and their memory. Of settings that differ only in how many layers offload, or keep less,
    the fewest and the most layers that fit: time is a linear function of their number.

    Args:
        memory: what the user fixed is the same in all of them.
        most: bytes on the device at the peak; None: ``budget``.
        training: a backward pass follows.
    """
    fused, layers, exact = job.engine == "fused", job.shape.layers, is_exact(job, machine)
    most = budget(job, machine) if most is None else most
    streams = (False, True) if memory.stream is None and exact else (bool(memory.stream) and fused,)
    references: tuple[Reference, ...] = ("together", "own") if job.live_reference else ("together",)
    scratches: tuple[ScratchMode, ...] = ("layer",) if job.storage == "dense" else ("layer", "small")
    keeps: tuple[Keep, ...] = ("all", "attention", "input") if fused else ("all", "input")
    if memory.keep is not None:
        keeps = (memory.keep,)
    # (what the first n layers keep, what the others keep, whether the first n offload it, the numbers n to choose from)
    splits: list[tuple[Keep, Keep, bool, range]] = []
    any_offload = memory.offload is None and exact and machine.host > 0
    fixed_offload = layers if memory.offload and fused else 0
    for keep in keeps:
        splits.append((keep, keep, True, range(layers + 1) if any_offload else range(fixed_offload, fixed_offload + 1)))
    if memory.keep is None and exact and not memory.offload:
        for more, less in MIXTURES:
            splits.append((less, more, False, range(1, layers)))  # the last layers' are there for a shorter time
            if any_offload:
                splits.append((more, less, True, range(1, layers)))
    threads = torch.get_num_threads()

    def found(setting: ExecutionConfig, first: Keep, last: Keep, offloads: bool, n: int) -> tuple[Found, bool, int]:
        """(settings whose first n layers are different, and their memory; whether the device has that; bytes on the host)."""
        setting = replace(setting, keep=(first,) * n + (last,) * (layers - n), offload=n * offloads)
        taken = estimate(job, setting, machine.device, training=training)
        host = sum(taken.host.values())
        # main memory that offloaded bytes take is a CPU's own
        return (setting, taken), taken.peak + (0 if machine.device.cuda else host) <= most, host

    tokens = _tokens(job, machine, memory)
    tiles = (None, *TILES) if fused else (None,)
    for count, stream, scratch, reference, tile in product(tokens, streams, scratches, references, tiles):
        if tile is None or tile < max(count, job.longest):
            setting = ExecutionConfig(count, (), 0, stream, tile, scratch, reference, threads, job.int8)
            for first, last, offloads, numbers in splits:
                yield from _ends(numbers, cache(partial(found, setting, first, last, offloads)), machine.host)


def _ends(numbers: range, of: Callable[[int], tuple[Found, bool, int]], host: int) -> Iterator[Found]:
    """Of numbers of layers the most and the fewest that fit: more layers take more of the host and less of the device."""
    if of(numbers[-1])[2] > host:
        numbers = numbers[: bisect_right(numbers, host, key=lambda n: of(n)[2])]
    if numbers and of(numbers[-1])[1]:
        yield of(numbers[-1])[0]
        fewest = bisect_left(numbers, True, key=lambda n: of(n)[1]) if not of(numbers[0])[1] else 0
        if len(numbers) - fewest > 1:
            yield of(numbers[fewest])[0]


def _tokens(job: Workload, machine: Machine, memory: MemorySpec) -> list[int]:
    """Sizes of a micro-batch, largest first: the longest example at least, a whole step at most."""
    if memory.micro_tokens is not None:
        return [min(memory.micro_tokens, max(job.longest, job.step_most or memory.micro_tokens))]
    if job.engine != "fused" and job.method == "sft":
        return [job.longest]  # TRL gets one row at a time
    wanted = WANTED_TOKENS if machine.device.cuda else CPU_TOKENS
    most = max(job.longest, min(wanted, job.step_most or job.step_tokens or wanted))
    sizes = {256, 512, 1024, 2048, 4096, 8192, 16384, most, *(n * job.longest for n in (1, 2, 3, 4, 6, 8))}
    return sorted(sizes.intersection(range(job.longest, most + 1)), reverse=True)


def least(job: Workload, memory: MemorySpec) -> MemorySpec:
    """Only the settings with the smallest peaks; if any setting fits, one of these does."""
    return memory.model_copy(
        update={"keep": memory.keep or "input", "micro_tokens": memory.micro_tokens or job.longest}
    )


def feasible(job: Workload, machine: Machine, memory: MemorySpec) -> bool:
    """Whether any settings fit."""
    return next(fitting(job, machine, least(job, memory)), None) is not None


def longest_context(job: Workload, machine: Machine, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""

    def too_long(n: int) -> bool:
        tokens = (n + 1) * step
        segment = min(job.segment or tokens, tokens)
        longer = replace(job, longest=tokens, segment=segment, step_tokens=None, step_most=None)
        return not feasible(longer, machine, memory)

    return step * bisect_left(range(most // step), True, key=too_long)


def refusal(job: Workload, machine: Machine, memory: MemorySpec) -> UserError:
    """Why nothing fits, and each single change that is enough: of every kind the smallest, and every fixed setting."""
    helpful: dict[str, str] = {}
    for kind, text, changed in single_changes(job, machine, memory):
        name = text if kind == "memory" else kind
        if name not in helpful and feasible(*changed):
            helpful[name] = text
    what = f"{'an example' if job.method == 'sft' else 'a pair'} of {job.longest:,} tokens"
    anywhere, memory, most = replace(machine, host=2**62), least(job, memory), budget(job, machine)
    host = min((sum(taken.host.values()) for _, taken in fitting(job, anywhere, memory)), default=None)
    if host is not None:
        message = (
            f"fits only with {in_words(host)} in main memory, and the run may take {in_words(machine.host)} of it."
        )
        helpful["host"] = f"memory.host={-(-host // GIB)}GiB (a machine with that much main memory to spare)"
    else:
        smallest = min(
            (taken for _, taken in fitting(job, anywhere, memory, most=math.inf)), key=lambda taken: taken.peak
        )
        parts = sorted(((n, part) for part, n in (smallest.resident | smallest.transient).items()), reverse=True)[:3]
        message = (
            f"{in_words(smallest.peak - most)} are missing. The smallest plan takes {in_words(smallest.peak)} of the card's memory "
            f"({', '.join(f'{part} {in_words(n)}' for n, part in parts)}); {in_words(most)} can be counted on of "
            f"{in_words(machine.free)} free."
        )
    hint = f"Any one of these is enough: {'; '.join(helpful.values())}." if helpful else "No single change is enough."
    return UserError(f"{machine.name}, {what}: {message}", hint)


def single_changes(job: Workload, machine: Machine, memory: MemorySpec) -> Iterator[tuple[str, str, Planned]]:
    """Single changes: kind, text and what ``make_plan`` takes; of a kind the smallest change first."""
    for key in ("keep", "micro_tokens", "offload", "stream"):
        if getattr(memory, key) is not None:
            yield "memory", f"memory.{key} left to the plan", (job, machine, memory.model_copy(update={key: None}))
    if job.optim in ("adamw_torch", "paged_adamw_32bit"):
        for optim in ("adamw_8bit", "paged_adamw_8bit"):
            yield "optim", f"optim={optim}", (replace(job, optim=optim), machine, memory)
    if job.storage == "dense":
        yield "load_in_4bit", "load_in_4bit=true", (replace(job, storage="nf4 nested"), machine, memory)
    rank = max((r for a in job.adapters if a.trained for layer in a.ranks for r in layer.values()), default=1)
    per_example = 1 if job.method == "sft" else 2
    for n in (1 << k for k in range(20, 1, -1)):
        if n < rank:
            yield "lora_r", f"lora_r={n}", (with_rank(job, n), machine, memory)
        if 64 <= n < job.longest / per_example:
            yield "max_length", f"max_length={n}", (replace(job, longest=n * per_example), machine, memory)
    device = replace(machine.device, context=machine.device.context or CONTEXT_BYTES)
    for size in SIZES if is_exact(job, machine) else ():
        if size * GIB > machine.free:
            yield "card", f"a card of {size} GB", (job, replace(machine, device=device, free=size * GIB), memory)


def with_rank(job: Workload, r: int) -> Workload:
    """The same workload with the trained adapter at another rank."""
    *below, own = job.adapters
    return replace(job, adapters=(*below, replace(own, ranks=tuple(dict.fromkeys(layer, r) for layer in own.ranks))))
