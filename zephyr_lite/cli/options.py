"""Options that several commands have, with the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.text import place


def nameable(value: Path | None) -> Path | None:
    """A folder to be made bears a name that the libraries which write into it can take, as ``output_dir`` does.

    Raises:
        BadParameter: it is empty, or holds a control character or bytes that are no UTF-8.
    """
    if value is not None:
        try:
            place(str(value))
        except ValueError as error:
            raise typer.BadParameter(f"{str(value)!r} {error}.") from None
    return value


Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
StageConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a shipped one by name (zephyr-7b/overnight-sft).")
]
# of jobs that ask models
JobConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a shipped one by name; options go over it.")
]
JobOut = Annotated[
    Path | None, typer.Option("--out", callback=nameable, help="The job's folder; the same one goes on.")
]
JobSeed = Annotated[int | None, typer.Option("--seed", help="Of the draws [42].")]
MaxRequests = Annotated[
    int | None, typer.Option("--max-requests", help="The job's budget, over all starts; tries count.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="The same in tokens, prompts included.")]
JobDryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it can cost at most; send nothing.")]
# of commands that take a trained model
Source = Annotated[
    Path | None,
    typer.Argument(help="runs/NAME, runs/NAME/STAGE, or a model's folder \\[the newest run's last complete stage]."),
]
StageName = Annotated[str | None, typer.Option("--stage", help="The run's stage \\[the last complete one].")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="Instead of a run: a PEFT adapter; repeat it, from the bottom up."),
]
AdapterBase = Annotated[
    str | None,
    typer.Option("--base", help="What the --adapter belong on, or where a run's base is now: a hub id or a folder."),
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option("--chat-template", help="auto, zephyr, chatml, llama3, or a .jinja file \\[the folder's own]."),
]
EvalOut = Annotated[
    Path | None,
    typer.Option(
        "--out", callback=nameable, help="The results' folder \\[eval/ in the stage's, NAME-eval beside a model's]."
    ),
]
