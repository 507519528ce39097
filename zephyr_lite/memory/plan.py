"""The plan of a run: the fastest execution settings that fit, chosen before anything is loaded."""

from __future__ import annotations

import math
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..config.load import MemorySpec, RunConfig
from ..errors import UserError
from ..model.execution import ExecutionConfig, Keep
from ..ops.int8 import CAPABILITY
from .activations import kept_per_token
from .estimate import NF4_BLOCK, MemoryBreakdown, estimate
from .fitting import WANTED_TOKENS, fitting, is_exact, least, refusal, single_changes
from .gpus import PROCESSOR
from .machine import Machine, earlier_runs
from .speed import step_time
from .workload import Workload

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


def _cost(job: Workload, execution: ExecutionConfig, machine: Machine) -> float:
    """Predicted seconds a token, with what makes the simpler of two settings the better one."""
    # a CPU's order does not depend on how busy it was while it was measured: the same run is split alike every time
    card = machine.card if machine.device.cuda else PROCESSOR
    host = (execution.offload > 0) + execution.stream
    extra = execution.micro_tokens / WANTED_TOKENS + (execution.tile is not None)
    extra += execution.offload / job.shape.layers
    return (1 + WORTH_THE_HOST * host + TIE * extra) / step_time(job, execution, card)[1]


def make_plan(job: Workload, machine: Machine, memory: MemorySpec) -> Plan:
    """The fastest plan that fits.

    Args:
        memory: the user's settings.

    Raises:
        UserError: nothing fits; tells how much is missing, and what would help. (Only memory.host is refused on a CPU and for
            other engines.)
    """
    if job.int8:
        check_int8(job, machine)
    fastest = min(fitting(job, machine, memory), key=lambda found: _cost(job, found[0], machine), default=None)
    if fastest is None and not is_exact(job, machine):
        smallest = fitting(job, machine, least(job, memory), most=math.inf)
        fastest = min(smallest, key=lambda found: found[1].peak, default=None)
    if fastest is None:
        raise refusal(job, machine, memory)
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
    saved = 1 - _seconds_per_token(cached, cached_plan, machine) / _seconds_per_token(job, plan, machine)
    if saved < WORTH_CACHING:
        return (
            job,
            plan,
            "the reference is computed in every step: computing it once before the first would not save time",
        )
    run = f"{job.epochs:.3g} epochs" if round(job.epochs, 2) > 1 else "the run"
    why = f"the reference is computed once, before the first step: that makes {run} {saved:.0%} shorter"
    return cached, cached_plan, why


def run_seconds(job: Workload, plan: Plan, machine: Machine) -> float:
    """Predicted seconds of all steps, and of the pass that computes a cached reference before them."""
    assert job.run_tokens is not None
    return job.run_tokens * _seconds_per_token(job, plan, machine)


def _seconds_per_token(job: Workload, plan: Plan, machine: Machine) -> float:
    _, speed, no_gradients = step_time(job, plan, machine.card)
    passes = speed / no_gradients / job.epochs if job.cached_reference and job.epochs else 0.0  # a step being 1
    return (1 + passes) / max(plan.tokens_per_second, 1e-9)


def check_int8(job: Workload, machine: Machine) -> None:
    """Refuse a run in int8 that the kernels do not serve: the backward pass sums over the outputs."""
    uneven = [
        f"{name} {out} × {width}" for name, (out, width) in job.shape.matrices.items() if out % 16 or width % NF4_BLOCK
    ]
    if machine.device.cuda and machine.card.capability < CAPABILITY:
        what = f"{machine.name} has compute capability {'.'.join(map(str, machine.card.capability))}; int8 needs 8.0"
    elif uneven:
        what = f"matrices of this base are no multiples of 16 × {NF4_BLOCK} ({', '.join(uneven)})"
    else:
        return
    hint = "Set memory.compute=16bit; a stage that began in int8 stays in int8, so give another output_dir, too."
    raise UserError(f"memory.compute=int8: {what}.", hint)


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
    for most, last in ((now.peak - SAVING * sum(now.transient.values()), False), (now.peak - 1, True)):
        settings = fitting(job, machine, least(job, memory) if last else memory, most=most, training=training)
        # a streamed base does not come back
        found = [each for each in settings if each[0].micro_tokens <= longest and each[0].stream >= plan.stream]
        if found:
            execution, _ = min(found, key=lambda f: f[1].peak if last else _cost(job, f[0], machine))
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


def fastest_change(plan: Plan, job: Workload, machine: Machine, memory: MemorySpec) -> tuple[float, str]:
    """(how many times as fast, text) of the change of a setting, the optimizer or the products that makes a run the fastest;
    (0, "") without one."""
    changes = [(text, to) for kind, text, to in single_changes(job, machine, memory) if kind in ("memory", "optim")]
    if job.storage != "dense":
        compute = f"by estimate, memory.compute={'16bit' if job.int8 else 'int8'}"
        changes.append((compute, (replace(job, int8=not job.int8), machine, memory)))
    tried = []
    for text, changed in changes:
        with suppress(UserError):  # it does not fit, or cannot run in int8
            found = make_plan(*changed)
            # both as predicted: earlier runs correct only those of the same products
            times = found.tokens_per_second / found.speed_ratio / (plan.tokens_per_second / plan.speed_ratio)
            tried.append((times, text))
    return max(tried, default=(0.0, ""))
