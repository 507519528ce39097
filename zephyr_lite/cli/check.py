"""``zephyr-lite check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..monitor.console import Console
from .options import Verbose

console = Console()


def check(
    adapter: Annotated[str, typer.Argument(help="A PEFT adapter of any tool (folder or hub id), or a stage's folder.")],
    base: Annotated[
        str | None, typer.Option("--base", help="Base model, instead of the one that the adapter names.")
    ] = None,
    below: Annotated[
        list[str] | None, typer.Option("--below", help="Adapter below it; repeat for the next one up.")
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", help="Adapter that it was continued from, and therefore contains.")
    ] = None,
    reference: Annotated[
        str,
        typer.Option("--reference", help="DPO's reference: start (what it started from), base, or an adapter."),
    ] = "start",
    rows: Annotated[
        str | None, typer.Option("--rows", help="Conversations for the measurements: a file or hub id.")
    ] = None,
    pairs: Annotated[
        str | None, typer.Option("--pairs", help="Preference pairs, to measure DPO's loss at step 0.")
    ] = None,
    beta: Annotated[float | None, typer.Option("--beta", min=0, help="DPO's \\[its own, or 0.1].")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", help="Chat template, instead of the saved one.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Number of rows, and of pairs.")] = 16,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--4bit/--16bit", help="Precision of the base \\[as in training; else 4 bits].")
    ] = None,
    files_only: Annotated[bool, typer.Option("--files-only", help="Check the files only; load no model.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the findings as JSON.")] = None,
    verbose: Verbose = False,
) -> None:
    """Audit an adapter: what belongs below it, its reference, BOS, the end token, its template. Exit code 2: wrong."""
    from ..audit.run import audit
    from ..audit.subject import Request
    from ..audit.verdict import Level
    from ..errors import UserError
    from ..evaluate.results import claim_folder
    from ..io.atomic import write_json

    if out is not None:  # before anything is measured
        if out.is_dir():
            raise UserError(f"--out {out}: is a folder.", "Name a file, such as check.json.")
        claim_folder(out.parent)
    request = Request(
        adapter, base, below or [], start, reference, rows, pairs, beta, chat_template, limit, load_in_4bit, files_only
    )
    found = audit(request)
    signs = {Level.right: "ok", Level.note: "note", Level.doubtful: "DOUBTFUL", Level.wrong: "WRONG"}
    console.heading(f"{found.adapter}: by {found.tool}, {found.method or 'method unknown'}")
    for finding in found.findings:
        console.say(f"{signs[finding.level]:>8}  {finding.topic}: {finding.text}")
        for line in finding.evidence:
            console.say(f"{'':>10}{line}")
        if finding.advice:
            console.say(f"{'':>10}→ {finding.advice}")
    console.say(f"verdict: {found.verdict()}")
    if out is not None:
        write_json(out, found.as_dict())
        console.say(f"written: {out}")
    if found.level == Level.wrong:
        worst = next(finding for finding in found.findings if finding.level == Level.wrong)
        raise UserError(f"{found.adapter}: {worst.text.rstrip('.')}.", worst.advice)
