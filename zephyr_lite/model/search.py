"""Which setting is the fastest that fits; and where none does, what is missing and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..config import MemorySpec
from .account import GIB, Account, Device, Setting, account
from .cards import Card
from .cost import Time, step_time
from .job import AdapterSpec, Job
from .layer_spec import Keep
from .memory import ScratchMode

# Enough for matrix products at full speed; more at once only takes room.
WANTED_TOKENS = 16384
# Tokens that the MLP takes at a time; a longer tile is the faster one.
TILES = (8192, 4096, 2048, 1024, 512)
KEEPS: tuple[Keep, ...] = ("all", "attention", "input")
LEAST: Keep = "input"
# (first layers, last layers): the last layers' kept activations are there for a shorter time, but for as many bytes
MIXTURES: tuple[tuple[Keep, Keep], ...] = (("attention", "all"), ("input", "all"), ("input", "attention"))
# Of the free memory that a plan leaves alone: the prediction is to be right to 5 %.
MARGIN = 0.03
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
    card: Card
    kind: Device

    @property
    def budget(self) -> int:
        return int(self.device * (1 - MARGIN))


@dataclass(frozen=True)
class Found:
    """A setting with what it takes."""

    setting: Setting
    account: Account
    time: Time


def micro_batches(job: Job, tokens: int) -> int:
    """Of a step, at least."""
    return 2 if job.step_most is None or job.step_most > tokens else 1


def fits(job: Job, setting: Setting, limits: Limits) -> Account | None:
    found = account(job, setting, limits.kind, micro_batches=micro_batches(job, setting.tokens))
    if found.peak > limits.budget or sum(found.host.values()) > limits.host:
        return None
    return found


def search(job: Job, limits: Limits, memory: MemorySpec) -> Found | None:
    """The fastest setting that fits, of those that leave alone what the user fixed; None where none fits."""
    best: Found | None = None
    for start in _starts(job, memory):
        for setting in _fillings(job, start, limits, memory):
            found = fits(job, setting, limits)
            if found is None:
                continue
            time = step_time(job, setting, limits.card)
            candidate = Found(setting, found, time)
            if best is None or _cost(candidate, limits) < _cost(best, limits):
                best = candidate
    return best


def _cost(found: Found, limits: Limits) -> float:
    """Seconds, and a little for what can go wrong: the model is not exact to a hundredth, so what uses the host or fills
    the card must be worth that much."""
    setting = found.setting
    extra = (
        (setting.offload > 0) + setting.stream + 0.5 * (setting.tile is not None) + found.account.peak / limits.budget
    )
    return found.time.step * (1 + 0.01 * extra)


def _starts(job: Job, memory: MemorySpec) -> Iterator[Setting]:
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


def _tokens(job: Job, memory: MemorySpec) -> list[int]:
    """How many may run at once: the longest example at least."""
    if memory.micro_tokens is not None:
        return [max(job.longest, memory.micro_tokens)]
    most = min(WANTED_TOKENS, job.step_most or job.step_tokens or WANTED_TOKENS)
    powers = [1 << k for k in range(8, 15)]
    return sorted({job.longest, max(job.longest, most), *(n for n in powers if job.longest < n <= most)}, reverse=True)


def _fillings(job: Job, start: Setting, limits: Limits, memory: MemorySpec) -> Iterator[Setting]:
    """What is kept, and how much of it goes to the host: of each kind the one that moves or recomputes least."""
    layers = job.shape.layers

    for keep in KEEPS if memory.keep is None else (memory.keep,):
        uniform = replace(start, keep=(keep,) * layers)
        if memory.offload is not None:
            yield replace(uniform, offload=layers if memory.offload else 0)
            continue
        least = _least_offload(job, uniform, limits)
        if least is not None:
            yield replace(uniform, offload=least)
    if memory.keep is not None or memory.offload:
        return
    for first, last in MIXTURES:
        mixed = [replace(start, keep=(first,) * n + (last,) * (layers - n)) for n in range(layers + 1)]
        least = _least(lambda n, of=mixed: fits(job, of[n], limits) is not None, layers)  # type: ignore[misc]
        if least is not None and 0 < least < layers:
            yield mixed[least]


def _least_offload(job: Job, setting: Setting, limits: Limits) -> int | None:
    """How many layers' kept activations must at least go to the host."""
    return _least(lambda n: fits(job, replace(setting, offload=n), limits) is not None, job.shape.layers)


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


def _frugal(job: Job, memory: MemorySpec) -> Iterator[Setting]:
    """The settings that take least of the device."""
    layers = job.shape.layers
    tokens = max(job.longest, memory.micro_tokens or 0)
    keep: Keep = memory.keep or "input"
    scratch: ScratchMode = "layer" if job.storage == "dense" else "small"
    for stream in (False, True) if memory.stream is None else (memory.stream,):
        for offload in (0, layers) if memory.offload is None else (layers if memory.offload else 0,):
            for tile in (None, *(t for t in (2048, 512) if t < tokens)):
                yield Setting(tokens, (keep,) * layers, offload, stream, tile, scratch, False)


def feasible(job: Job, limits: Limits, memory: MemorySpec) -> bool:
    """Whether any setting fits."""
    if any(fits(job, setting, limits) for setting in _frugal(job, memory)):
        return True
    if memory.offload is not None:
        return False
    return any(  # all of it may be more than the host has, nothing more than the device has
        _least_offload(job, setting, limits) is not None or _part_fits(job, setting, limits)
        for setting in _frugal(job, memory)
        if setting.offload
    )


def _part_fits(job: Job, setting: Setting, limits: Limits) -> bool:
    """Offloading as many layers as the host takes."""
    full = account(job, setting, limits.kind).host
    each = full.get("kept activations", 0) // job.shape.layers
    room = limits.host - full.get("streamed base", 0)
    n = min(job.shape.layers, room // max(1, each))
    return n > 0 and fits(job, replace(setting, offload=n), limits) is not None


def longest_context(job: Job, limits: Limits, memory: MemorySpec, *, step: int = 1024, most: int = 2**20) -> int:
    """The longest example that fits, in whole `step` tokens; 0: not even one step does."""
    low, high = 0, most // step
    while high - low > 0:
        middle = (low + high + 1) // 2
        tokens = middle * step
        ok = feasible(job.at(longest=tokens, segment=tokens, step_tokens=None), limits, memory)
        low, high = (middle, high) if ok else (low, middle - 1)
    return low * step


def least_account(job: Job, limits: Limits, memory: MemorySpec) -> tuple[Setting, Account]:
    """The setting that takes least of the device, whatever it takes of the host."""
    found = [(s, account(job, s, limits.kind)) for s in _frugal(job, memory)]
    return min(found, key=lambda pair: pair[1].peak)


def cures(job: Job, limits: Limits, memory: MemorySpec) -> list[str]:
    """Changes of one key each under which it would fit, tried one by one."""
    said = []

    def helps(changed: Job, spec: MemorySpec = memory, there: Limits = limits) -> bool:
        return feasible(changed, there, spec)

    for key, value in memory.model_dump().items():
        if value is not None and key not in ("vram", "host"):
            freed = memory.model_copy(update={key: None})
            if helps(job, freed):
                said.append(f"memory.{key} left to the plan")
    if limits.host < 2**40 and helps(job, there=replace(limits, host=2**45)):
        host = min(
            (sum(account(job, s, limits.kind).host.values()) for s in _frugal(job, memory)
             if account(job, s, limits.kind).peak <= limits.budget),
            default=0,
        )  # fmt: skip
        if host:
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


def smallest_card(job: Job, limits: Limits, memory: MemorySpec) -> int | None:
    """GB of the smallest card on which it fits."""
    free = memory.model_copy(update={"vram": None})
    for size in SIZES:
        there = replace(
            limits, device=int(size * GIB), kind=replace(limits.kind, context=limits.kind.context or 3 * GIB // 4)
        )
        if there.device > limits.device and feasible(job, there, free):
            return size
    return None


def with_rank(job: Job, r: int) -> Job:
    """The same job with the trained adapter at another rank."""
    adapters: list[AdapterSpec] = []
    for a in job.adapters:
        ranks: Any = tuple(tuple((name, r) for name, _ in layer) for layer in a.ranks)
        adapters.append(replace(a, ranks=ranks) if a.trained else a)
    return job.at(adapters=tuple(adapters))
