"""The console, and the options that several commands have."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, BadParameter, Option

from ..monitor.console import Console

console = Console()


def json_object(text: str) -> dict[str, Any]:
    """Parse an option's JSON object; raises BadParameter."""
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise BadParameter('expected a JSON object, such as {"enable_thinking": false}.')


def say_all(lines: Iterable[str]) -> None:
    for line in lines:
        console.say(line)


def next_lines(*commands: Sequence[str]) -> str:
    """What to type next, a command a line.

    Args:
        commands: their words, without the program's name.
    """
    called = sys.argv[0]
    # as after `make demo`, whose environment is not activated
    only_by_path = Path(called).name == "zephyr-lite" and shutil.which("zephyr-lite") is None
    program = called if only_by_path else "zephyr-lite"
    return "Next: " + "\n      ".join(shlex.join([program, *words]) for words in commands)


def name_of_words(words: list[str], default: str) -> tuple[str, list[str]]:
    """The first word if it is no ``key=value`` and no option, else the default; and the other words."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        return words[0], words[1:]
    return default, words


StageConfig = Annotated[
    str | None, Option("--config", "-c", help="A YAML file, or a preset such as zephyr-7b/overnight-sft.")
]
# of `data chat` and `data pairs`
NewFolder = Annotated[Path, Option("--out", help="The folder to make.")]
FileFormat = Annotated[Literal["parquet", "jsonl"], Option("--format", help="File format.")]
NumProc = Annotated[int | None, Option(min=1, help="Number of processes; the result is the same.")]
Replace = Annotated[bool, Option("--overwrite", help="Replace an earlier result.")]
# of jobs that ask models
JobConfig = Annotated[str | None, Option("--config", "-c", help="A YAML file, or a preset; options take precedence.")]
JobOut = Annotated[Path | None, Option("--out", help="Output folder; reuse it to resume.")]
JobSeed = Annotated[int | None, Option("--seed", help="Random seed [42].")]
MaxRequests = Annotated[int | None, Option(help="Maximum requests, retries and restarts included.")]
MaxTokens = Annotated[int | None, Option(help="Maximum tokens, prompts included.")]
JobDryRun = Annotated[bool, Option("--dry-run", help="Show the maximum cost; send nothing.")]
# of commands that take a trained model
Source = Annotated[
    Path | None,
    Argument(help="runs/NAME, runs/NAME/STAGE, or a model's folder \\[the newest run's last complete stage]."),
]
StageName = Annotated[str | None, Option(help="The run's stage \\[the last complete one].")]
Adapters = Annotated[
    list[str] | None, Option("--adapter", help="PEFT adapter, instead of a run; repeat it, from the bottom up.")
]
AdapterBase = Annotated[str | None, Option(help="Base model for --adapter, or of a run whose base was moved.")]
ChatTemplateOption = Annotated[
    str | None, Option(help="auto, zephyr, chatml, llama3, or a .jinja file \\[the folder's own].")
]
TemplateKwargs = Annotated[
    dict[str, Any] | None,
    Option(
        "--chat-template-kwargs",
        parser=json_object,
        metavar="JSON",
        help="Its variables: '{\"enable_thinking\": true}'.",
    ),
]
EvalOut = Annotated[Path | None, Option("--out", help="Results folder \\[eval/ in the stage's, or MODEL-eval].")]
