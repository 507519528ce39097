"""Execution settings that fit into the memory of a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from ..config.load import MemorySpec
from ..model.dequant_buffer import ScratchMode
from ..model.execution import ExecutionConfig, Keep, Reference
from .estimate import MemoryBreakdown, estimate
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

Found = tuple[ExecutionConfig, MemoryBreakdown]


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


def feasible(job: Workload, machine: Machine, memory: MemorySpec) -> bool:
    """Whether any settings fit."""
    return next(fitting(job, machine, memory, least=True), None) is not None
