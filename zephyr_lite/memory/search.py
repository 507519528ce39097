"""Which setting is the fastest that fits; and where none does, what is missing and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..config.load import MemorySpec
from ..model.dequant_buffer import ScratchMode
from ..model.layer_spec import Keep
from .account import GIB, Device, MemoryBreakdown, Setting, account
from .gpus import Gpu
from .speed import Time, step_time
from .workload import AdapterSpec, Workload

# Enough for matrix products at full speed; more at once only takes room.
WANTED_TOKENS = 16384
# Tokens that the MLP takes at a time; a longer tile is the faster one.
TILES = (8192, 4096, 2048, 1024, 512)
KEEPS: tuple[Keep, ...] = ("all", "attention", "input")
LEAST: Keep = "input"
RICHEST: Keep = "all"
# (first layers, last layers): the last layers' kept activations are there for a shorter time, but for as many bytes
MIXTURES: tuple[tuple[Keep, Keep], ...] = (("attention", "all"), ("input", "all"), ("input", "attention"))
# Of the free memory that a plan leaves alone: the prediction is to be right to 5 %.
MARGIN = 0.03
# Settings whose speeds differ by no more than this are equally fast: the cost model is not exact to that.
TIE = 0.002
# What a setting must be faster by to be worth locking main memory for: that costs the machine something, and the cost model
# is from data sheets until a card was measured.
WORTH_THE_HOST = 0.04
SIZES = (6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141)


@dataclass(frozen=True)
class Limits:
    """What there is.

    Attributes:
        device: bytes of the device's memory that the run may take, `Device.context` included.
        host: bytes of main memory that may be locked.
        card: whose speed counts.
        kind: how the device computes.
    """

    device: int
    host: int
    card: Gpu
    kind: Device

    @property
    def budget(self) -> int:
        return int(self.device * (1 - MARGIN))


@dataclass(frozen=True)
class Found:
    """A setting with what it takes."""

    setting: Setting
    account: MemoryBreakdown
    time: Time


def micro_batches(job: Workload, tokens: int) -> int:
    """Of a step, at least."""
    return 2 if job.step_most is None or job.step_most > tokens else 1


def on_device(job: Workload, setting: Setting, limits: Limits) -> MemoryBreakdown | None:
    """What it takes, where the device has that much."""
    key = (setting, limits.kind)
    if key not in job.memo:
        job.memo[key] = account(job, setting, limits.kind, micro_batches=micro_batches(job, setting.tokens))
    found = job.memo[key]
    return found if found.peak <= limits.budget else None


def fits(job: Workload, setting: Setting, limits: Limits) -> MemoryBreakdown | None:
    """What it takes, where device and host have that much."""
    found = on_device(job, setting, limits)
    return None if found is None or sum(found.host.values()) > limits.host else found


def search(job: Workload, limits: Limits, memory: MemorySpec) -> Found | None:
    """The fastest setting that fits, of those that leave alone what the user fixed; None where none fits."""
    best: Found | None = None

    def consider(setting: Setting) -> None:
        nonlocal best
        time = step_time(job, setting, limits.card)
        if best is not None and time.step >= _cost(best, limits):
            return
        found = fits(job, setting, limits)
        if found is not None:
            candidate = Found(setting, found, time)
            if best is None or _cost(candidate, limits) < _cost(best, limits):
                best = candidate

    for setting in _frugal_fits(job, limits, memory):
        consider(setting)
    if best is None:
        return None  # as ``feasible`` says
    starts = [
        (step_time(job, replace(s, keep=(RICHEST,) * len(s.keep)), limits.card).step, s) for s in _starts(job, memory)
    ]
    # the most promising first; one that could not win with all of it kept on the device cannot win at all
    for least, start in sorted(starts, key=lambda pair: pair[0]):
        if memory.keep is None and least >= _cost(best, limits):
            break
        for setting in _fillings(job, start, limits, memory):
            consider(setting)
    return best


def _cost(found: Found, limits: Limits) -> float:
    """Seconds; among settings that are equally fast, the simpler one."""
    setting = found.setting
    extra = (setting.offload > 0) + setting.stream
    simple = 0.5 * (setting.tile is not None) + found.account.peak / limits.budget
    return found.time.step * (1 + WORTH_THE_HOST * extra + TIE * simple / 1.5)


def _starts(job: Workload, memory: MemorySpec) -> Iterator[Setting]:
    """Everything but what is kept where: the simplest first, so that of equally fast ones it is taken."""
    layers = job.shape.layers
    together = (True, False) if job.live_reference else (True,)
    scratches: tuple[ScratchMode, ...] = ("layer",) if job.storage == "dense" else ("layer", "small")
    for stream in (False, True) if memory.stream is None else (memory.stream,):
        for both in together:
            for scratch in scratches:
                for tokens in _tokens(job, memory):
                    for tile in (None, *(t for t in TILES if t < tokens)):
                        yield Setting(tokens, (LEAST,) * layers, 0, stream, tile, scratch, both)


def fixed_tokens(job: Workload, micro_tokens: int) -> int:
    """What `micro_tokens` comes to: one example at least, and no more than a step has."""
    return max(job.longest, min(micro_tokens, job.step_most or micro_tokens))


def _tokens(job: Workload, memory: MemorySpec) -> list[int]:
    """How many may run at once: the longest example at least."""
    if memory.micro_tokens is not None:
        return [fixed_tokens(job, memory.micro_tokens)]
    most = min(WANTED_TOKENS, job.step_most or job.step_tokens or WANTED_TOKENS)
    some = [*(1 << k for k in range(8, 15)), *(job.longest * n for n in range(2, 9))]
    return sorted({job.longest, max(job.longest, most), *(n for n in some if job.longest < n <= most)}, reverse=True)


def _fillings(job: Workload, start: Setting, limits: Limits, memory: MemorySpec) -> Iterator[Setting]:
    """What is kept, and how much of it goes to the host: of each kind the one that moves or recomputes least."""
    layers = job.shape.layers

    for keep in KEEPS if memory.keep is None else (memory.keep,):
        uniform = replace(start, keep=(keep,) * layers)
        if memory.offload is not None:
            yield replace(uniform, offload=layers if memory.offload else 0)
        elif (least := _least_offload(job, uniform, limits)) is not None:
            yield replace(uniform, offload=least)
    if memory.keep is not None or memory.offload:
        return
    for poor, rich in MIXTURES:
        # the last layers' kept activations stay, and are more
        mixed = [replace(start, keep=(poor,) * n + (rich,) * (layers - n)) for n in range(layers + 1)]
        least = _least(lambda n, of=mixed: on_device(job, of[n], limits) is not None, layers)  # type: ignore[misc]
        if least is not None and 0 < least < layers:
            yield mixed[least]
        if memory.offload is None and limits.host and layers > 1:
            yield from _offloaded(job, mixed[1:-1], limits)
            # the first layers' are more, and leave for the host
            others = [replace(start, keep=(rich,) * n + (poor,) * (layers - n)) for n in range(layers - 1, 0, -1)]
            yield from _offloaded(job, others, limits)


def _offloaded(job: Workload, mixtures: Sequence[Setting], limits: Limits) -> Iterator[Setting]:
    """Of mixtures of ever fewer kept activations, each with the fewest layers on the host that the device asks for, the
    first that the host takes."""

    def with_host(setting: Setting) -> Setting | None:
        offload = _least_offload(job, setting, limits)
        found = None if offload is None else replace(setting, offload=offload)
        return None if found is None or fits(job, found, limits) is None else found

    least = _least(lambda n: with_host(mixtures[n]) is not None, len(mixtures) - 1)
    if least is not None and (found := with_host(mixtures[least])) is not None:
        yield found


def _least_offload(job: Workload, setting: Setting, limits: Limits) -> int | None:
    """How many layers' kept activations must at least go to the host for the device's sake; whether the host takes them is
    another question (the more layers, the less)."""
    return _least(lambda n: on_device(job, replace(setting, offload=n), limits) is not None, job.shape.layers)


def _least(fits: Callable[[int], bool], most: int) -> int | None:
    """The least n of 0 … most that fits, where more fits better."""
    if fits(0):
        return 0
    if not fits(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


# -- where nothing fits ------------------------------------------------------------------------------------------------


def _frugal(job: Workload, memory: MemorySpec) -> Iterator[Setting]:
    """The settings that take least of the device, but for what is offloaded."""
    layers = job.shape.layers
    if memory.micro_tokens is not None:
        lengths = [fixed_tokens(job, memory.micro_tokens)]
    else:
        lengths = [job.longest]
        if job.step_most is not None and job.longest < job.step_most < 2 * job.longest:
            lengths.append(job.step_most)  # a step in one piece: its gradients come while activations go
    keep: Keep = memory.keep or LEAST
    scratch: ScratchMode = "layer" if job.storage == "dense" else "small"
    for stream in (False, True) if memory.stream is None else (memory.stream,):
        for tokens in lengths:
            for tile in (None, *(t for t in (2048, 512) if t < tokens)):
                yield Setting(tokens, (keep,) * layers, 0, stream, tile, scratch, False)


def _frugal_on_device(job: Workload, limits: Limits, memory: MemorySpec) -> Iterator[Setting]:
    """Those that the device takes, with as little on the host as it asks for."""
    for setting in _frugal(job, memory):
        if memory.offload is not None:
            offload: int | None = job.shape.layers if memory.offload else 0
            if on_device(job, replace(setting, offload=offload or 0), limits) is None:
                continue
        else:
            offload = _least_offload(job, setting, limits)
        if offload is not None:
            yield replace(setting, offload=offload)


def _frugal_fits(job: Workload, limits: Limits, memory: MemorySpec) -> Iterator[Setting]:
    return (s for s in _frugal_on_device(job, limits, memory) if fits(job, s, limits))


def feasible(job: Workload, limits: Limits, memory: MemorySpec) -> bool:
    """Whether ``search`` finds a setting."""
    return next(_frugal_fits(job, limits, memory), None) is not None


def least_host(job: Workload, limits: Limits, memory: MemorySpec) -> int | None:
    """Bytes of main memory with which it would fit; None: the device does not take it with any."""
    found = _frugal_on_device(job, limits, memory)
    return min((sum(account(job, s, limits.kind).host.values()) for s in found), default=None)


def longest_context(job: Workload, limits: Limits, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""
    low, high = 0, most // step
    while high - low > 0:
        middle = (low + high + 1) // 2
        tokens = middle * step
        segment = min(job.segment or tokens, tokens)
        ok = feasible(job.at(longest=tokens, segment=segment, step_tokens=None, step_most=None), limits, memory)
        low, high = (middle, high) if ok else (low, middle - 1)
    return low * step


def least_account(job: Workload, limits: Limits, memory: MemorySpec) -> tuple[Setting, MemoryBreakdown]:
    """The setting that takes least of the device, whatever it takes of the host."""
    layers = job.shape.layers
    offloads = (0, layers) if memory.offload is None else (layers if memory.offload else 0,)
    settings = [replace(s, offload=n) for s in _frugal(job, memory) for n in offloads]
    found = [(s, account(job, s, limits.kind, micro_batches=micro_batches(job, s.tokens))) for s in settings]
    return min(found, key=lambda pair: pair[1].peak)


def cures(job: Workload, limits: Limits, memory: MemorySpec) -> list[str]:
    """Changes of one key each under which it would fit, tried one by one."""
    said = []

    def helps(changed: Workload, spec: MemorySpec = memory, there: Limits = limits) -> bool:
        return feasible(changed, there, spec)

    for key, value in memory.model_dump().items():
        if value is not None and key not in ("vram", "host"):
            freed = memory.model_copy(update={key: None})
            if helps(job, freed):
                said.append(f"memory.{key} left to the plan")
    host = least_host(job, limits, memory)
    if host is not None and host > limits.host:
        said.append(f"memory.host={-(-host // GIB)}GiB (a machine with that much main memory to spare)")
    if job.optim in ("adamw_torch", "paged_adamw_32bit"):
        said += [f"optim={o}" for o in ("adamw_8bit", "paged_adamw_8bit") if helps(job.at(optim=o))][:1]
    if job.storage == "dense" and helps(job.at(storage="nf4 nested")):
        said.append("load_in_4bit=true")
    ranks = [r for a in job.adapters if a.trained for layer in a.ranks for _, r in layer]
    said += _first(max(ranks, default=0), 4, lambda r: helps(with_rank(job, r)), "lora_r={}")
    length = job.longest if job.method == "sft" else (job.longest + 1) // 2
    per = 1 if job.method == "sft" else 2
    said += _first(length, 64, lambda n: helps(job.at(longest=n * per)), "max_length={}")
    if (size := smallest_card(job, limits, memory)) is not None:
        said.append(f"a card of {size} GB")
    return said


def _first(value: int, least: int, helps: Callable[[int], bool], words: str) -> list[str]:
    """The first half, quarter … of a value that helps, as a power of two where the value is not one."""
    if not value:
        return []
    n = 1 << (value - 1).bit_length() - 1 if value > 1 else 1
    while n >= least:
        if helps(n):
            return [words.format(n)]
        n //= 2
    return []


def smallest_card(job: Workload, limits: Limits, memory: MemorySpec) -> int | None:
    """GB of the smallest card on which it fits."""
    free = memory.model_copy(update={"vram": None})
    for size in SIZES:
        there = replace(
            limits, device=int(size * GIB), kind=replace(limits.kind, context=limits.kind.context or 3 * GIB // 4)
        )
        if there.device > limits.device and feasible(job, there, free):
            return size
    return None


def with_rank(job: Workload, r: int) -> Workload:
    """The same job with the trained adapter at another rank."""
    adapters: list[AdapterSpec] = []
    for a in job.adapters:
        ranks: Any = tuple(tuple((name, r) for name, _ in layer) for layer in a.ranks)
        adapters.append(replace(a, ranks=ranks) if a.trained else a)
    return job.at(adapters=tuple(adapters))
