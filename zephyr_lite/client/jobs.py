"""Jobs that ask models: their configuration, their folder, and tasks in order."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress

from ..config.load import find_config
from ..config.strict_yaml import dump_yaml, read_yaml
from ..errors import UserError
from ..io.atomic import make_folder, refuse_others, sweep, write_text
from ..io.interrupts import pythons_ctrl_c
from ..io.redact import refuse_secrets
from ..io.text import duration
from .client import BudgetSpent, ModelClient, RequestFailed
from .endpoints import EndpointSpec, validated
from .request_log import Totals

if TYPE_CHECKING:
    from .local_model import Weights

T = TypeVar("T")
R = TypeVar("R")
Settings = TypeVar("Settings", bound="JobConfig")
NotBlank = Annotated[str, StringConstraints(pattern=r"\S")]
CONFIG = "config.yaml"
PIPE_SECONDS = 30.0  # between two lines where the output is no terminal
CONTINUES = "The same command with a larger budget continues the job and sends no answered request again."


class Budget(BaseModel):
    """What a job may spend over all its starts; None: no limit."""

    model_config = ConfigDict(extra="forbid")

    requests: int | None = Field(None, ge=1)
    tokens: int | None = Field(None, ge=1)


class JobConfig(BaseModel):
    """The keys that all jobs have."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    out: str
    seed: int = Field(42, ge=0, lt=2**31)
    budget: Budget = Budget()

    def endpoints(self) -> list[EndpointSpec]:
        """Every endpoint of the configuration once."""
        values = [value for _, field in self for value in (field if isinstance(field, list) else [field])]
        return list({value.name: value for value in values if isinstance(value, EndpointSpec)}.values())


def load_settings(kind: type[Settings], file: str | None, options: dict[str, Any]) -> Settings:
    """A job's configuration: a YAML file with the options of the command line over it.

    Args:
        file: a path, or the name of a shipped file.
        options: ``{"key": value}`` or ``{"key.nested": value}``; None leaves the file's value.
    """
    path = find_config(file, "feedback") if file else None
    where = str(path or "the command line")
    values = read_yaml(path) if path else {}
    for key, value in options.items():
        head, _, nested = key.partition(".")
        if value is not None and nested:
            inner = values.get(head) or {}
            inner = dict(inner) if isinstance(inner, dict) else {"path": inner}
            if nested == "path" and inner.get("path") != value:  # another set's split and limit do not apply to it
                inner = {}
            value = {**inner, nested: value}
        if value is not None:
            values[head] = value
    return validated(kind, values, where, "Keys are options (--judge), or keys in the file of --config (judge: …).")


def distinct_name(spec: EndpointSpec, others: Sequence[EndpointSpec], role: str) -> EndpointSpec:
    """An endpoint under a name that no other has: the other endpoint itself if both are equal, else "NAME (ROLE)"."""
    if spec in others or all(other.name != spec.name for other in others):
        return spec
    return spec.model_copy(update={"name": f"{spec.name} ({role})"})


def refuse_equal_names(specs: Iterable[EndpointSpec]) -> None:
    """Raise a UserError if two models have one name."""
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two models are called {twice[0]!r}.", "Name each once, or add a name: …,name=OTHER.")


def claim_folder(out: Path, command: str, config: BaseModel) -> None:
    """Create a job's folder with its config.yaml, or continue the job that is in it."""
    first_line = f"# zephyr-lite {command}\n"
    values = config.model_dump(mode="json", exclude_unset=True)
    refuse_secrets(values, "the job's configuration")
    make_folder(out)
    sweep(out)
    file = out / CONFIG
    ours = file.is_file() and file.read_text(encoding="utf-8", errors="replace").startswith(first_line)
    refuse_others(out, ours, f"a job of zephyr-lite {command}")
    write_text(file, first_line + dump_yaml(values))


def nothing_made(out: Path, what: str, reasons: Iterable[str]) -> UserError:
    """The error of a job without any row; empty reasons are left out."""
    return UserError(
        f"{out}: no {what}: {'; '.join(filter(None, reasons))}",
        "The same command, with a larger budget if need be, continues the job: all replies so far are kept.",
    )


def json_line(row: dict[str, Any]) -> str:
    """A row of a JSONL file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


async def in_order(
    items: Iterable[T], work: Callable[[T], Awaitable[R]], window: int
) -> AsyncIterator[tuple[T, R | RequestFailed | BudgetSpent]]:
    """(item, result) in the items' order, with up to ``window`` items in progress; RequestFailed and BudgetSpent are results."""
    slots = asyncio.Semaphore(window)

    async def limited(item: T) -> R | RequestFailed | BudgetSpent:
        async with slots:
            try:
                return await work(item)
            except (RequestFailed, BudgetSpent) as error:
                return error

    tasks = [(item, asyncio.ensure_future(limited(item))) for item in items]
    try:
        for item, task in tasks:
            yield item, await task
    finally:
        for _, task in tasks:
            task.cancel()
        await asyncio.gather(*(task for _, task in tasks), return_exceptions=True)


def run_job(
    config: JobConfig,
    command: str,
    work: Callable[[ModelClient], Awaitable[R]],
    meter: Meter,
    folder: Path | None = None,
    endpoints: Sequence[EndpointSpec] | None = None,
    weights: Weights | None = None,
) -> R:
    """What ``work`` returns, with a client whose request log is in the job's folder.

    Ctrl-C cancels it, waits for the replies in flight, and raises KeyboardInterrupt; a second one does not wait.

    Args:
        command: that makes the folder: "feedback".
        folder, endpoints: instead of the configuration's ``out`` and endpoints.
        weights: see ``ModelClient``.
    """
    folder = folder or Path(config.out)
    claim_folder(folder, command, config)

    async def main() -> R:
        async with ModelClient(
            endpoints or config.endpoints(),
            folder,
            weights=weights,
            max_requests=config.budget.requests,
            max_tokens=config.budget.tokens,
        ) as client:
            meter.totals = client.totals
            return await work(client)

    with pythons_ctrl_c():
        return asyncio.run(main())


class Meter(Progress):
    """Items done, requests, tokens, dollars and the time left: a bar in a terminal, a line now and then in a pipe.

    Args:
        total: number of items.
        unit: their name: "prompts".

    Attributes:
        totals: what is shown as spent; of the job's ``ModelClient``.
    """

    def __init__(self, console: Console, total: int, unit: str) -> None:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[spent]}")
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.totals, self._last_line = Totals(), time.monotonic()
        self.add_task(unit, total=total, spent="")

    def count_one(self) -> None:
        """Count one more item as done, and show ``412 requests  98,313 tokens  $0.0421  12 min left``."""
        totals, task = self.totals, self.tasks[0]
        parts = [f"{totals.requests:,} requests", f"{totals.tokens - totals.held:,} tokens"]
        if dollars := totals.dollars + totals.lost_dollars:
            parts.append(f"${dollars:,.4f}")
        if left := task.time_remaining:
            parts.append(f"{duration(left)} left")
        spent = "  ".join(parts)
        self.update(task.id, advance=1, spent=spent)
        if not self.console.is_terminal and time.monotonic() - self._last_line >= PIPE_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{task.description} {task.completed:,.0f}/{task.total:,.0f}  {spent}")
