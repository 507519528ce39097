"""What to change where nothing fits: the refusal of a run, and single changes with which it would fit."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from ..config.load import MemorySpec
from ..errors import UserError
from .device import CONTEXT_BYTES, GIB, in_words
from .fitting import budget, feasible, fitting, is_exact
from .machine import Machine
from .workload import AdapterSpec, Workload

SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141)

Planned = tuple[Workload, Machine, MemorySpec]


def longest_context(job: Workload, machine: Machine, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""

    def too_long(n: int) -> bool:
        tokens = (n + 1) * step
        segment = min(job.segment or tokens, tokens)
        longer = replace(job, longest=tokens, segment=segment, step_tokens=None, step_most=None)
        return not feasible(longer, machine, memory)

    return step * bisect_left(range(most // step), True, key=too_long)


def refusal(job: Workload, machine: Machine, memory: MemorySpec) -> UserError:
    anything = fitting(job, replace(machine, host=2**62), memory, most=math.inf, least=True)
    execution, found = min(anything, key=lambda pair: pair[1].peak)
    what = f"{'an example' if job.method == 'sft' else 'a pair'} of {job.longest:,} tokens"
    if execution.micro_tokens > job.longest:
        what = f"a micro-batch of {execution.micro_tokens:,} tokens"
    host = _least_host(job, machine, memory)
    if host is None:
        parts = sorted(((n, part) for part, n in (found.resident | found.transient).items()), reverse=True)[:3]
        message = (
            f"{machine.name}: {in_words(found.peak - budget(job, machine))} are missing. The smallest plan for {what} takes "
            f"{in_words(found.peak)} of the card's memory ({', '.join(f'{part} {in_words(n)}' for n, part in parts)}); "
            f"{in_words(budget(job, machine))} can be counted on of {in_words(machine.free)} free."
        )
    else:
        message = (
            f"{machine.name}: {what} fits only with {in_words(host)} in main memory, and the run may take "
            f"{in_words(machine.host)} of it."
        )
    helpful = suggestions(job, machine, memory)
    if host is not None:
        helpful.append(f"memory.host={-(-host // GIB)}GiB (a machine with that much main memory to spare)")
    hint = f"Any one of these is enough: {'; '.join(helpful)}." if helpful else "No single change is enough."
    return UserError(message, hint)


def _least_host(job: Workload, machine: Machine, memory: MemorySpec) -> int | None:
    """Bytes of main memory with which it would fit; None: the device is too small with any."""
    found = fitting(job, replace(machine, host=2**62), memory, least=True)
    return min((sum(account.host.values()) for _, account in found), default=None)


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


def suggestions(*planned: *Planned) -> list[str]:
    """Single changes with which it fits, each tried: of every kind the smallest that is enough, and every fixed setting."""
    found: dict[str, str] = {}
    for kind, text, changed in single_changes(*planned):
        name = text if kind == "memory" else kind
        if name not in found and feasible(*changed):
            found[name] = text
    return list(found.values())


def with_rank(job: Workload, r: int) -> Workload:
    """The same workload with the trained adapter at another rank."""

    def at_rank(adapter: AdapterSpec) -> AdapterSpec:
        return replace(adapter, ranks=tuple(dict.fromkeys(layer, r) for layer in adapter.ranks))

    return replace(job, adapters=tuple(at_rank(a) if a.trained else a for a in job.adapters))
