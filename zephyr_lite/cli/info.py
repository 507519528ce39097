"""``zephyr-lite plan`` and ``zephyr-lite env``."""

from __future__ import annotations

from typing import Annotated

from typer import Context, Option

from .options import StageConfig, console


def plan(
    context: Context,
    config: StageConfig = None,
    gpu: Annotated[str | None, Option(help="A card by name: t4, 3060, 4090, a100-80 …")] = None,
    vram: Annotated[
        str | None, Option(help="Memory of the card, such as 8GiB. Without --gpu: a generic card of that size.")
    ] = None,
    price: Annotated[float | None, Option(help="US dollars an hour for the card.")] = None,
    ladder: Annotated[bool, Option("--ladder", help="A Markdown table of cards from 6 to 24 GB.")] = False,
) -> None:
    """Memory, time and disk that a run takes, on this machine or on any card; needs neither weights nor a GPU."""
    from ..config.resolve import resolve_run
    from ..memory.forecast import ladder_lines, planned_lines, stages_of

    methods, words = stages_of(list(context.args), config)
    if ladder:
        stage = None if words == context.args else context.args[0]
        others = {"--gpu": gpu, "--vram": vram, "--price": price, "--config": config, f"a stage ({stage})": stage}
        console.plan(ladder_lines(words, others))
        return
    for method in methods:
        console.plan(planned_lines(method, resolve_run(method, config, words), gpu=gpu, vram=vram, price=price))


def env() -> None:
    """Show hardware and libraries, what is missing, and how to install it."""
    from .environment import survey

    for finding in survey():
        console.say(finding.line())
