"""``zephyr-lite merge``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..monitor.console import Console
from .options import Verbose, nameable

console = Console()


class Onto(StrEnum):
    """What the adapters are merged onto."""

    base = "base"
    nf4 = "nf4"


def merge(
    out: Annotated[Path, typer.Option("--out", callback=nameable, help="Model folder to write.")],
    run: Annotated[Path | None, typer.Option("--run", help="A run's folder; the newest one by default.")] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="The run's stage; the last complete one by default.")
    ] = None,
    onto: Annotated[
        Onto, typer.Option("--onto", help="base: the 16-bit weights. nf4: the 4-bit weights of training, dequantized.")
    ] = Onto.base,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="PEFT adapter, instead of a run; repeat it, from the bottom up."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Base model for --adapter, or of a run whose base was moved.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the chain as one PEFT adapter instead of a model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier merge in the folder.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Compare the merged model with the live stack on a few rows."),
    ] = True,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure both ways, --onto base and nf4, on more held-out rows.")
    ] = False,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Held-out rows to compare on \\[8; 64 with --measure].")
    ] = None,
    model_card: Annotated[bool, typer.Option("--card/--no-card", help="Write a model card, README.md.")] = True,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="OWNER/NAME: upload the folder to the hub at the end.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push-to-hub: a private repository.")] = False,
    verbose: Verbose = False,
) -> None:
    """Merge the adapters of a run into one model folder that plain transformers loads."""
    from ..export.model_card import CARD, write_card
    from ..export.push import check_repo, prepare
    from ..export.push import push as upload
    from ..io.redact import refuse_secrets
    from ..merge.command import run_merge
    from ..merge.weights import MARK

    if push_to_hub is not None:
        check_repo(push_to_hub)  # before hours of work
    elif private:
        raise UserError("--private goes with --push-to-hub.", "Say where to: --push-to-hub OWNER/NAME --private")

    # where a model comes from is written into its files
    given = {"--out": str(out), "--run": str(run or ""), "--adapter": adapter or [], "--base": base or ""}
    refuse_secrets(given, "the command line")
    run_merge(
        out,
        run=run,
        stage=stage,
        adapters=adapter or [],
        base=base,
        onto=onto.value,
        as_adapter=adapter_only,
        overwrite=overwrite,
        check=check,
        both=measure,
        rows=rows,
    )
    if model_card and not _is_newer(out / CARD, out / MARK):
        console.say(f"model card: {write_card(out)}")
    if push_to_hub is not None:
        chosen = prepare(out, push_to_hub)
        for line in chosen.lines():
            console.say(line)
        upload(chosen, private=private)


def _is_newer(file: Path, than: Path) -> bool:
    return file.is_file() and file.stat().st_mtime_ns >= than.stat().st_mtime_ns
