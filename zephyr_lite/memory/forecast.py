"""A plan as text: memory by name, the settings with their reasons, time and money.

At most 80 columns of plain text: the same lines from ``zephyr-lite plan``, before a run, and in a dry run.
"""

from __future__ import annotations

import textwrap
from dataclasses import replace

from ..config.load import RunConfig
from ..io.text import duration
from ..model.execution import Keep
from .estimate import GIB, MIB, PAGED, in_words
from .machine import Machine
from .plan import Plan, kept_in_words
from .speed import step_time
from .workload import Workload

WIDTH = 78
_LABELS = {
    "decoder layers": "base: decoder layers",
    "two layers' buffers": "base: two layers at a time",
    "embedding": "base: embedding",
    "output head": "base: output head",
    "norms": "base: norms",
    "dequantized weights": "one layer's weights, dequantized",
    "adapters": "adapters (float32)",
    "CUDA context": "CUDA context (estimate)",
    "process": "this process: Python, libraries, rows",
    "gradients": "gradients (float32)",
    "kept activations": "activations kept for the backward pass",
    "inputs": "inputs of a micro-batch",
    "reference's hidden states": "the reference's hidden states",
    "the head at work": "the output head at work",
    "allocator's slack": "allocator's slack (estimate)",
}


def forecast_lines(
    job: Workload, machine: Machine, plan: Plan, config: RunConfig, *, price: float | None = None
) -> list[str]:
    """The plan of a workload on a machine.

    Args:
        price: US dollars an hour; None: the card's usual one, where it has one.
    """
    storage = {"dense": str(job.dtype).removeprefix("torch."), "nf4": "NF4", "nf4 nested": "NF4, scales in 8 bits"}
    here = machine.kind == "cpu" or not machine.context
    free = machine.free - (machine.context if here else 0)
    unit, unit_name = (GIB, "GiB") if plan.peak >= GIB / 2 else (MIB, "MiB")
    steps = f", {job.step_tokens:,} tokens a step" if job.step_tokens else ""
    lines = [
        f"plan of {job.method} on {machine.name}, {free / GIB:.1f} GiB" + (" free" if here else ""),
        f"  {config.model_name_or_path} ({storage[job.storage]}), rank {config.lora_r}, {config.optim}",
        f"  longest {_example(job)} {job.longest:,} tokens{steps}",
        "",
        _row("memory at the peak", unit_name),
        *(
            _row(f"  {_LABELS.get(name, name)}", f"{n / unit:.2f}")
            for name, n in plan.account.items()
            if name != "peak"
        ),
        _row("  together", f"{plan.peak / unit:.2f}") + f"  of {machine.free / unit:,.2f}",
        f"  the peak is in the {plan.at}",
        "",
        "what was chosen, and why",
        *(line for reason in _reasons(job, machine, plan) for line in _wrap(reason, "  ", "    ")),
        "",
    ]
    for line in (*_elsewhere(machine, plan), *_time(job, machine, plan, price)):
        lines += _wrap(line, "", "  ")
    if machine.kind == "cpu":
        lines.append("no GPU here; `zephyr-lite plan --gpu 3060` plans for a card")
    return [part for line in lines for part in (_wrap(line, "", "    ") if len(line) > WIDTH else [line])]


def _row(name: str, value: str) -> str:
    return f"{name:<48}{value:>9}"


def _wrap(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later)


def _example(job: Workload) -> str:
    return "row" if job.method == "sft" else "pair"


def _reasons(job: Workload, machine: Machine, plan: Plan) -> list[str]:
    layers, card, time = len(plan.keep), machine.kind == "cuda", step_time(job, plan, machine.card)
    said = [f"{plan.micro_tokens:,} tokens at once."]
    if plan.micro_tokens < job.longest:
        said = [
            f"{plan.micro_tokens:,} tokens at once, as memory.micro_tokens says; a {_example(job)} runs whole, so up to "
            f"{job.longest:,} do."
        ]
    least: Keep = "input"
    inputs_only = replace(plan, keep=(least,) * layers, offload=0)
    slower = step_time(job, inputs_only, machine.card).step / time.step
    kept = f"A layer keeps {kept_in_words(plan.keep)}: {plan.bytes_per_token / MIB:.2f} MiB a token in all"
    said.append(kept + (f"; keeping inputs only would take {slower:.2f} times as long." if slower > 1.005 else "."))
    if plan.offload:
        which = "All layers" if plan.offload == layers else f"The first {plan.offload} layers"
        waits = time.waiting / time.step
        cost = f"waiting for the copies takes {waits:.0%} of a step" if waits >= 0.005 else "computing hides the copies"
        why = cost if card else "as memory.offload says"
        said.append(f"{which} keep it in main memory between the two passes; {why}.")
    if plan.stream and not card:
        said.append("The base's layers are copied one ahead, as memory.stream says.")
    elif plan.stream:
        faster = time.step / step_time(job, replace(plan, stream=False), machine.card).step - 1
        cost = f"if it fitted, a step would be {faster:.0%} faster" if faster > 0.005 else "computing hides the copies"
        said.append(f"The base is in main memory and is copied to the card one layer ahead, to make room; {cost}.")
    if plan.tile is not None:
        said.append(f"The MLP takes {plan.tile:,} tokens at a time.")
    if plan.scratch == "small":
        said.append("Gate and up are dequantized twice, in a smaller buffer.")
    if job.live_reference:
        where = "in the policy's pass" if plan.reference == "together" else "in a pass of its own, to make room"
        said.append(f"The reference runs {where}: no weights, nothing kept.")
    return said


def _elsewhere(machine: Machine, plan: Plan) -> list[str]:
    paged = plan.host.get(PAGED, 0) if machine.kind == "cuda" else 0
    parts = ", ".join(f"{name} {in_words(n)}" for name, n in plan.host.items() if not (paged and name == PAGED))
    if machine.kind == "cpu":
        lines = [f"beside that, in the same memory: {parts}"] if parts else []
    else:
        lines = [f"main memory, locked: {parts or 'nothing'}"]
    if paged:
        lines.append(f"main memory, not locked: {PAGED} {in_words(paged)}")
    if plan.managed:
        lines.append(f"optimizer states that move to main memory when the card is full: {in_words(plan.managed)}")
    return lines


def _time(job: Workload, machine: Machine, plan: Plan, price: float | None) -> list[str]:
    here = "CPU" if machine.kind == "cpu" else "card"
    basis = f"from a short measurement of this {here}" if machine.card.measured else "from data sheets, not measured"
    lines = [f"speed: about {plan.tokens_per_second:,.0f} tokens/s ({basis})"]
    if job.run_tokens:
        seconds = job.run_tokens / max(plan.tokens_per_second, 1e-9)
        price = machine.card.price if price is None else price
        money = f", ${seconds / 3600 * price:,.2f} at ${price:.2f} an hour" if price is not None else ""
        many = f"{job.run_tokens / 1e6:,.1f} M" if job.run_tokens >= 1e6 else f"{job.run_tokens:,}"
        without = "evaluations"
        if job.method == "dpo" and not job.live_reference:
            without += " and the reference's pass before the first step"
        lines.append(f"this recipe: {many} tokens, about {duration(seconds)} of steps (without {without}){money}")
    return lines
