"""A plan in words and numbers: what takes how much, what was chosen and why, what it takes in time and money.

At most 80 columns, plain text: the same lines from ``zephyr-lite plan``, before a run, and in a dry run.
"""

from __future__ import annotations

from dataclasses import replace

from ..config.load import RunConfig
from ..io.text import duration
from .account import PAGED, Setting, in_words
from .machine import Machine
from .plan import Plan, kept_in_words
from .search import LEAST
from .speed import step_time
from .workload import Workload

GIB, GB = 2**30, 1e9
WIDTH = 78
_LABELS = {
    "decoder layers": "base: decoder layers",
    "two layers' buffers": "base: two layers at a time",
    "embedding": "base: embedding",
    "output head": "base: output head",
    "norms": "base: norms",
    "dequantized weights": "one layer's weights, dequantized",
    "adapters": "adapters (float32)",
    "optimizer's state": "optimizer's state",
    "matrix products' workspace": "matrix products' workspace",
    "CUDA context": "CUDA context (estimate)",
    "process": "this process: Python, libraries, rows",
    "gradients": "gradients (float32)",
    "kept activations": "activations kept for the backward pass",
    "inputs": "inputs of a micro-batch",
    "reference's hidden states": "the reference's hidden states",
    "a layer at work": "a layer at work",
    "the head at work": "the output head at work",
    "allocator's slack": "allocator's slack (estimate)",
}


def forecast_lines(
    job: Workload, machine: Machine, plan: Plan, config: RunConfig, *, price: float | None = None
) -> list[str]:
    """The plan of a job on a machine.

    Args:
        price: US dollars an hour; None: the card's usual one, where it has one.
    """
    storage = {"dense": str(job.dtype).removeprefix("torch."), "nf4": "NF4", "nf4 nested": "NF4, scales in 8 bits"}
    here = machine.kind == "cpu" or not machine.context
    free = machine.free - (machine.context if here else 0)
    where = f"{machine.name}, {free / GIB:.1f} GiB" + (" free" if here else "")
    unit, its_name = (GIB, "GiB") if plan.peak >= GIB / 2 else (2**20, "MiB")
    lines = [
        f"plan of {job.method} on {where}",
        f"  {config.model_name_or_path} ({storage[job.storage]}), rank {config.lora_r}, {config.optim}",
        f"  longest {'row' if job.method == 'sft' else 'pair'} {job.longest:,} tokens"
        + (f", {job.step_tokens:,} tokens a step" if job.step_tokens else ""),
        "",
        _row("memory at its fullest", its_name),
    ]
    resident = [name for name in plan.account if name != "peak"]
    for name in resident:
        lines.append(_row(f"  {_LABELS[name]}", f"{plan.account[name] / unit:.2f}"))
    lines.append(_row("  together", f"{plan.peak / unit:.2f}") + f"  of {machine.free / unit:,.2f}")
    lines += [f"  fullest in the {plan.at}", ""]
    lines += ["what was chosen, and why", *_wrapped(_reasons(job, machine, plan)), ""]
    lines += _elsewhere(machine, plan)
    lines += _time(job, machine, plan, price)
    if machine.kind == "cpu":
        lines.append("no GPU here; `zephyr-lite plan --gpu 3060` plans for a card")
    return [part for line in lines for part in (_wrap(line, "", "    ") if len(line) > WIDTH else [line])]


def _row(name: str, value: str) -> str:
    return f"{name:<48}{value:>9}"


def _reasons(job: Workload, machine: Machine, plan: Plan) -> list[str]:
    setting = Setting(
        max(plan.micro_tokens, job.longest),
        plan.keep,
        plan.offload,
        plan.stream,
        plan.tile,
        plan.scratch,
        plan.reference == "together",
    )
    layers, card = len(plan.keep), machine.kind == "cuda"
    step = step_time(job, setting, machine.card).step

    def slower(other: Setting) -> float:
        return step_time(job, other, machine.card).step / step

    said = [f"{plan.micro_tokens:,} tokens at once."]
    if plan.micro_tokens < job.longest:
        unit = "row" if job.method == "sft" else "pair"
        said = [
            f"{plan.micro_tokens:,} tokens at once, as memory.micro_tokens says; a {unit} runs whole, so up to "
            f"{job.longest:,} do."
        ]
    recomputed = slower(replace(setting, keep=(LEAST,) * layers, offload=0))
    kept = f"A layer keeps {kept_in_words(plan.keep)}: {plan.bytes_per_token / 2**20:.2f} MiB a token in all"
    said.append(
        kept + (f"; keeping inputs only would take {recomputed:.2f} times as long." if recomputed > 1.005 else ".")
    )
    if plan.offload:
        which = "All of that" if plan.offload == layers else f"Of the first {plan.offload} layers that"
        lies = f"{which} lies in main memory between the two passes"
        waits = step_time(job, setting, machine.card).waiting / step
        cost = "the copies are hidden behind computing"
        if waits >= 0.005:
            cost = f"waiting for the copies takes {waits:.0%} of a step"
        said.append(f"{lies}; {cost}." if card else f"{lies}, as memory.offload says.")
    if plan.stream and not card:
        said.append("The base's layers are copied one ahead, as memory.stream says.")
    elif plan.stream:
        extra = 1 / slower(replace(setting, stream=False))
        said.append(
            "The base lies in main memory and comes to the card one layer ahead: the room is worth more for other things"
            + (
                f" (if it fitted, a step would be {extra - 1:.0%} faster)."
                if extra > 1.005
                else "; the copies are hidden."
            )
        )
    if plan.tile is not None:
        said.append(f"The MLP takes {plan.tile:,} tokens at a time.")
    if plan.scratch == "small":
        said.append("Gate and up are dequantized twice, in a smaller buffer.")
    if job.live_reference:
        said.append(
            "The reference runs in the policy's pass: no weights, nothing kept."
            if plan.reference == "together"
            else "The reference runs in a pass of its own, for room: no weights, nothing kept."
        )
    return said


def _elsewhere(machine: Machine, plan: Plan) -> list[str]:
    locked = {name: n for name, n in plan.host.items() if name != PAGED}
    parts = [f"{name} {in_words(n)}" for name, n in locked.items()]
    if machine.kind == "cpu":
        parts = [f"{name} {in_words(n)}" for name, n in plan.host.items()]
        lines = [f"beside that, in the same memory: {', '.join(parts)}"] if parts else []
    else:
        lines = [f"main memory, locked: {', '.join(parts) if parts else 'nothing'}"]
        if PAGED in plan.host:
            lines.append(f"main memory, not locked: {PAGED} {in_words(plan.host[PAGED])}")
    if plan.managed:
        lines.append(f"optimizer states that move to main memory when the card is full: {in_words(plan.managed)}")
    return [part for line in lines for part in _wrap(line, "", "  ")]


def _time(job: Workload, machine: Machine, plan: Plan, price: float | None) -> list[str]:
    here = "CPU" if machine.kind == "cpu" else "card"
    basis = f"from a short measurement of this {here}" if machine.card.measured else "from data sheets, not measured"
    lines = [f"speed: about {plan.tokens_per_second:,.0f} tokens/s ({basis})"]
    if job.run_tokens:
        seconds = job.run_tokens / max(plan.tokens_per_second, 1e-9)
        price = machine.card.price if price is None else price
        money = f", ${seconds / 3600 * price:,.2f} at ${price:.2f} an hour" if price is not None else ""
        many = f"{job.run_tokens / 1e6:,.1f} M" if job.run_tokens >= 1e6 else f"{job.run_tokens:,}"
        left_out = (
            "without evaluations"
            if job.method == "sft" or job.live_reference
            else ("without evaluations and the reference's pass before the first step")
        )
        lines.append(f"this recipe: {many} tokens, about {duration(seconds)} of steps ({left_out}){money}")
    return [part for line in lines for part in _wrap(line, "", "  ")]


def _wrapped(sentences: list[str]) -> list[str]:
    return [line for sentence in sentences for line in _wrap(sentence, "  ", "    ")]


def _wrap(text: str, first: str, later: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later)
