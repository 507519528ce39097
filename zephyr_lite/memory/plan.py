"""The plan of a run: the fastest execution settings that fit, chosen before anything is loaded."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from ..config.load import MemorySpec, RunConfig
from ..errors import UserError
from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep, Reference
from ..ops.int8 import CAPABILITY
from .activations import kept_per_token
from .device import CONTEXT_BYTES, GIB, in_words
from .estimate import NF4_BLOCK, MemoryBreakdown, estimate
from .gpus import PROCESSOR
from .machine import Machine, earlier_runs
from .speed import step_time
from .workload import AdapterSpec, Workload

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
# By rough estimate the other engines train at these shares of the fused engine's speed: TRL reached 0.4 to 0.6 on a CPU
# (bench/results/compare-cpu.json).
OTHER_ENGINES = {"fused": 1.0, "trl": 0.5, "unsloth": 1.0}
# Settings whose speeds differ by no more than this are equally fast: the simpler one comes first.
TIE = 0.002
# How much faster a setting must be to be worth locking main memory: that slows the rest of the machine, and the cost model is
# from data sheets until a card was measured.
WORTH_THE_HOST = 0.04
# How much shorter a run must become for a cached reference: a live one rounds as its policy does.
WORTH_CACHING = 0.02
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
    # measured over predicted speed of so many earlier runs on this machine, with which the two above are corrected
    speed_ratio: float = 1.0
    earlier_runs: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))  # a list in JSON

    @property
    def recomputes(self) -> bool:
        """Whether any layer's matrix products are computed again in the backward pass."""
        return set(self.keep) != {"all"}

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
        if self.int8:
            said.append("products with the base in int8")
        return said


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
    job: Workload,
    machine: Machine,
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
        most: bytes on the device at the peak; None: ``budget``.
        least: only settings with the smallest peaks; if any setting fits, one of these does.
        training: a backward pass follows.
    """
    fused, layers, exact = job.engine == "fused", job.shape.layers, is_exact(job, machine)
    most = budget(job, machine) if most is None else most
    streams = (False, True) if memory.stream is None and exact else (bool(memory.stream) and fused,)
    references: tuple[Reference, ...] = ("together", "own") if job.live_reference else ("together",)
    scratches: tuple[ScratchMode, ...] = ("layer",) if job.storage == "dense" else ("layer", "small")
    keeps: tuple[Keep, ...] = ("all", "attention", "input") if fused else ("all", "input")
    if least:
        keeps, references, scratches = keeps[-1:], references[-1:], scratches[-1:]
    if memory.keep is not None:
        keeps = (memory.keep,)
    # (what the first n layers keep, what the others keep, whether the first n offload it, the fewest n, the most)
    splits: list[tuple[Keep, Keep, bool, int, int]] = []
    any_offload = memory.offload is None and exact and machine.host > 0
    fixed_offload = layers if memory.offload and fused else 0
    for keep in keeps:
        splits.append(
            (keep, keep, True, 0, layers) if any_offload else (keep, keep, True, fixed_offload, fixed_offload)
        )
    if memory.keep is None and exact and not memory.offload and not least:
        for more, less in MIXTURES:
            splits.append((less, more, False, 1, layers - 1))  # the last layers' are there for a shorter time
            if any_offload:
                splits.append((more, less, True, 1, layers - 1))
    threads = torch.get_num_threads()

    def found(setting: ExecutionConfig, first: Keep, last: Keep, offloads: bool, n: int) -> tuple[Found, bool, int]:
        """(settings whose first n layers are different, and their memory; whether the device has that; bytes on the host)."""
        setting = replace(setting, keep=(first,) * n + (last,) * (layers - n), offload=n * offloads)
        taken = estimate(job, setting, machine.device, training=training)
        host = sum(taken.host.values())
        # main memory that offloaded bytes take is a CPU's own
        return (setting, taken), taken.peak + (0 if machine.device.cuda else host) <= most, host

    tokens = _tokens(job, machine, memory, least)
    tiles = (None, *TILES) if fused else (None,)
    for count, stream, scratch, reference, tile in product(tokens, streams, scratches, references, tiles):
        if tile is not None and tile >= max(count, job.longest):
            continue
        setting = ExecutionConfig(count, (), 0, stream, tile, scratch, reference, threads, job.int8)
        for first, last, offloads, fewest, many in splits:
            # more layers take less of the device and more of the host
            of = partial(found, setting, first, last, offloads)
            low, low_fits, low_host = of(fewest)
            if low_host > machine.host:
                continue
            if many > fewest:
                high, high_fits, high_host = of(many)
                if high_host > machine.host:
                    many = fewest + (machine.host - low_host) * (many - fewest) // (high_host - low_host)
                    high, high_fits, _ = of(many)
                if not high_fits:
                    continue
                if not low_fits:
                    too_few, fewest = fewest, many
                    while fewest - too_few > 1:
                        middle = (too_few + fewest) // 2
                        too_few, fewest = (too_few, middle) if of(middle)[1] else (middle, fewest)
                    low, low_fits, _ = of(fewest)
                if many > fewest:
                    yield high
            if low_fits:
                yield low


def _tokens(job: Workload, machine: Machine, memory: MemorySpec, least: bool) -> list[int]:
    """Sizes of a micro-batch, largest first: the longest example at least, a whole step at most."""
    if memory.micro_tokens is not None:
        return [min(memory.micro_tokens, max(job.longest, job.step_most or memory.micro_tokens))]
    if job.engine != "fused" and job.method == "sft":
        return [job.longest]  # TRL gets one row at a time
    if least:
        # a step in one piece has its gradients come while activations go
        whole = job.step_most is not None and job.longest < job.step_most < 2 * job.longest
        return [job.longest, job.step_most] if whole and job.step_most else [job.longest]
    wanted = WANTED_TOKENS if machine.device.cuda else CPU_TOKENS
    most = max(job.longest, min(wanted, job.step_most or job.step_tokens or wanted))
    sizes = {job.longest, most}
    sizes |= {256, 512, 1024, 2048, 4096, 8192, 16384}
    for n in (2, 3, 4, 6, 8):
        sizes.add(n * job.longest)
    return sorted(sizes.intersection(range(job.longest, most + 1)), reverse=True)


def _cost(job: Workload, execution: ExecutionConfig, machine: Machine) -> float:
    """Predicted seconds a token, with what makes the simpler of two settings the better one."""
    # a CPU's order does not depend on how busy it was while it was measured: the same run is split alike every time
    card = machine.card if machine.device.cuda else PROCESSOR
    host = (execution.offload > 0) + execution.stream
    extra = execution.micro_tokens / WANTED_TOKENS + (execution.tile is not None)
    extra += execution.offload / job.shape.layers
    return (1 + WORTH_THE_HOST * host + TIE * extra) / step_time(job, execution, card)[1]


def feasible(job: Workload, machine: Machine, memory: MemorySpec) -> bool:
    """Whether any settings fit."""
    return next(fitting(job, machine, memory, least=True), None) is not None


def make_plan(job: Workload, machine: Machine, memory: MemorySpec) -> Plan:
    """The fastest plan that fits.

    Args:
        memory: the user's settings.

    Raises:
        UserError: nothing fits; tells how much is missing, and what would help. (Only memory.host is refused on a CPU and for
            other engines.)
    """
    if job.int8:
        _check_int8(job, machine)
    fastest = min(fitting(job, machine, memory), key=lambda found: _cost(job, found[0], machine), default=None)
    if fastest is None and not is_exact(job, machine):
        smallest = fitting(job, machine, memory, most=math.inf, least=True)
        fastest = min(smallest, key=lambda found: found[1].peak, default=None)
    if fastest is None:
        raise _refusal(job, machine, memory)
    return _plan(job, *fastest, machine)


def plan_run(job: Workload, machine: Machine, memory: MemorySpec, config: RunConfig) -> tuple[Workload, Plan, str]:
    """The plan of a run; with ``precompute_ref_log_probs: auto`` the shorter one of a run with a live reference and of one that
    computes it before the first step.

    Returns:
        the workload that was planned, with either reference; its plan; why it is that reference.
    """
    plan = make_plan(job, machine, memory)
    choose = config.precompute_ref_log_probs == "auto" and job.live_reference and job.engine == "fused"
    if not choose or not job.epochs:
        return job, plan, ""
    cached = replace(job, live_reference=False, cached_reference=True)
    cached_plan = make_plan(cached, machine, memory)
    saved = 1 - run_seconds(cached, cached_plan, machine) / run_seconds(job, plan, machine)
    once = "once, before the first step"
    if saved < WORTH_CACHING:
        return job, plan, f"the reference is computed in every step: computing it {once}, would not save time"
    why = f"the reference is computed {once}: that makes {job.epochs:.3g} epochs {saved:.0%} shorter"
    return cached, cached_plan, why


def run_seconds(job: Workload, plan: Plan, machine: Machine) -> float:
    """Predicted seconds of all steps, and of the pass that computes a cached reference before them."""
    assert job.run_tokens is not None
    _, speed, no_gradients = step_time(job, plan, machine.card)
    passes = speed / no_gradients / job.epochs if job.cached_reference and job.epochs else 0.0  # a step being 1
    return job.run_tokens / max(plan.tokens_per_second, 1e-9) * (1 + passes)


def _check_int8(job: Workload, machine: Machine) -> None:
    """Refuse a run in int8 that the kernels do not serve."""
    uneven = [f"{name} {width}" for name, (_, width) in job.shape.matrices.items() if width % NF4_BLOCK]
    if job.storage == "dense":
        what = "the base is not in 4 bits"
    elif machine.device.cuda and machine.card.capability < CAPABILITY:
        what = f"{machine.name} has compute capability {'.'.join(map(str, machine.card.capability))}; int8 needs 8.0"
    elif uneven:
        what = f"inputs of this base are no multiple of {NF4_BLOCK} channels wide ({', '.join(uneven)})"
    else:
        return
    raise UserError(f"memory.compute=int8: {what}.", "Set memory.compute=16bit.")


def smaller(
    plan: Plan, job: Workload, machine: Machine, memory: MemorySpec, *, tokens: int, several: bool, training: bool
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
    now = estimate(job, failed, machine.device, training=training)
    longest = max(failed.micro_tokens, job.longest)
    for most, least in ((now.peak - SAVING * sum(now.transient.values()), False), (now.peak - 1, True)):
        found = [
            (execution, account)
            for execution, account in fitting(job, machine, memory, most=most, least=least, training=training)
            # a streamed base does not come back
            if execution.micro_tokens <= longest and execution.stream >= plan.stream
        ]
        if found:
            key = (lambda f: f[1].peak) if least else (lambda f: _cost(job, f[0], machine))
            execution, _ = min(found, key=key)
            found_plan = _plan(job, execution, estimate(job, execution, machine.device), machine)
            # its speed was not measured again
            return replace(found_plan, seconds_per_step=0.0, tokens_per_second=0.0)
    return replace(plan, micro_tokens=1) if several and plan.micro_tokens > 1 else None


def _plan(job: Workload, execution: ExecutionConfig, found: MemoryBreakdown, machine: Machine) -> Plan:
    seconds, tokens_per_second, _ = step_time(job, execution, machine.card)
    ratios = earlier_runs(machine.name, job) if machine.card.measured else []
    ratio = statistics.median(ratios) if ratios else 1.0
    share = OTHER_ENGINES[job.engine] * ratio
    return Plan(
        **vars(execution),
        bytes_per_token=kept_per_token(job, execution.keep),
        free_bytes=max(0, machine.free - sum(found.resident.values())),
        account={**found.resident, **found.transient, "peak": found.peak},
        host=found.host,
        managed=found.managed,
        at=found.at,
        seconds_per_step=round(seconds / share, 4),
        tokens_per_second=round(tokens_per_second * share, 2),
        speed_ratio=ratio,
        earlier_runs=len(ratios),
    )


# -- where nothing fits ------------------------------------------------------------------------------------------------


def longest_context(job: Workload, machine: Machine, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""

    def too_long(n: int) -> bool:
        tokens = (n + 1) * step
        segment = min(job.segment or tokens, tokens)
        longer = replace(job, longest=tokens, segment=segment, step_tokens=None, step_most=None)
        return not feasible(longer, machine, memory)

    return step * bisect_left(range(most // step), True, key=too_long)


def _refusal(job: Workload, machine: Machine, memory: MemorySpec) -> UserError:
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


def _changes(job: Workload, machine: Machine, memory: MemorySpec) -> Iterator[tuple[str, str, Planned]]:
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
    for kind, text, changed in _changes(*planned):
        name = text if kind == "memory" else kind
        if name not in found and feasible(*changed):
            found[name] = text
    return list(found.values())


def fastest_change(*planned: *Planned) -> tuple[float, str]:
    """(tokens a second, text) of the change of a setting or the optimizer that makes a run the fastest; (0, "") without one."""
    tried = []
    for kind, text, changed in _changes(*planned):
        if kind in ("memory", "optim"):
            with suppress(UserError):  # it does not fit
                tried.append((make_plan(*changed).tokens_per_second, text))
    return max(tried, default=(0.0, ""))


def with_rank(job: Workload, r: int) -> Workload:
    """The same workload with the trained adapter at another rank."""

    def at_rank(adapter: AdapterSpec) -> AdapterSpec:
        return replace(adapter, ranks=tuple(dict.fromkeys(layer, r) for layer in adapter.ranks))

    return replace(job, adapters=tuple(at_rank(a) if a.trained else a for a in job.adapters))
