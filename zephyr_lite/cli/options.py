"""Options that several commands have, with the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..io.text import place


def nameable(value: Path | None) -> Path | None:
    """Check the name of a folder or file to be created, as ``output_dir`` is checked; raises BadParameter."""
    if value is not None:
        try:
            place(str(value))
        except ValueError as error:
            raise typer.BadParameter(f"{str(value)!r} {error}.") from None
    return value


Verbose = Annotated[bool, typer.Option("--verbose", help="Show the traceback of an error.")]
StageConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a preset such as zephyr-7b/overnight-sft.")
]
# of jobs that ask models
JobConfig = Annotated[
    str | None, typer.Option("--config", "-c", help="A YAML file, or a preset; options take precedence.")
]
JobOut = Annotated[Path | None, typer.Option("--out", callback=nameable, help="Output folder; reuse it to resume.")]
JobSeed = Annotated[int | None, typer.Option("--seed", help="Random seed [42].")]
MaxRequests = Annotated[
    int | None, typer.Option("--max-requests", help="Maximum requests, retries and restarts included.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Maximum tokens, prompts included.")]
JobDryRun = Annotated[bool, typer.Option("--dry-run", help="Show the maximum cost; send nothing.")]
# of commands that take a trained model
Source = Annotated[
    Path | None,
    typer.Argument(help="runs/NAME, runs/NAME/STAGE, or a model's folder \\[the newest run's last complete stage]."),
]
StageName = Annotated[str | None, typer.Option("--stage", help="The run's stage \\[the last complete one].")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="PEFT adapter, instead of a run; repeat it, from the bottom up.")
]
AdapterBase = Annotated[
    str | None, typer.Option("--base", help="Base model for --adapter, or of a run whose base was moved.")
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option("--chat-template", help="auto, zephyr, chatml, llama3, or a .jinja file \\[the folder's own]."),
]
EvalOut = Annotated[
    Path | None,
    typer.Option("--out", callback=nameable, help="Results folder \\[eval/ in the stage's, or MODEL-eval]."),
]
