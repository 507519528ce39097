"""Jobs that ask models: their configuration, their folder, and tasks in order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ..config.load import find_config
from ..config.strict_yaml import dump_yaml, read_yaml
from ..errors import UserError
from ..io.atomic import make_folder, refuse_others, sweep, write_text
from ..io.interrupts import pythons_ctrl_c
from ..io.redact import refuse_secrets
from .client import BudgetSpent, ModelClient, RequestFailed
from .endpoints import EndpointSpec, validated

T = TypeVar("T")
R = TypeVar("R")
Settings = TypeVar("Settings", bound="JobConfig")
NotBlank = Annotated[str, StringConstraints(pattern=r"\S")]
CONFIG = "config.yaml"
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

    def endpoints(self) -> dict[str, EndpointSpec]:
        """{name: endpoint}, every endpoint of the configuration once."""
        values = [value for _, field in self for value in (field if isinstance(field, list) else [field])]
        return {value.name: value for value in values if isinstance(value, EndpointSpec)}

    def client(self) -> ModelClient:
        """The client of a job that runs in ``out``."""
        return ModelClient(
            list(self.endpoints().values()),
            Path(self.out),
            max_requests=self.budget.requests,
            max_tokens=self.budget.tokens,
        )


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
    missing = [key for key, field in kind.model_fields.items() if field.is_required() and key not in values]
    if missing:
        option = "model" if missing[0] == "models" else missing[0]
        hint = f"Give --{option}, or {missing[0]}: in the file of --config."
        raise UserError(f"{where}: {', '.join(missing)} missing.", hint)
    try:
        return validated(kind, values, where)
    except UserError as error:  # of an endpoint's word, which knows no file
        message = error.message if error.message.startswith(where) else f"{where}: {error.message}"
        raise UserError(message, error.hint) from None


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


def run_job(main: Coroutine[Any, Any, R]) -> R:
    """``asyncio.run``; Ctrl-C cancels ``main``, which waits for its replies in flight, and a second one does not wait.

    Raises:
        KeyboardInterrupt: after an interrupt.
    """
    with pythons_ctrl_c():
        return asyncio.run(main)
