"""Benchmarks by EleutherAI's lm-evaluation-harness, on the live stack or a model's folder.

The paper's four tasks with the shots and metrics of the first Open LLM Leaderboard (Tunstall et al. 2023, arXiv 2310.16944,
table 2). Every finished task of a model is written at once; the same command continues with the others.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, optional
from ..io.run_dir import read_json, text_sha256
from ..io.text import duration, short
from ..model.loaded import LoadedModel
from .results import head_of, write_result

logger = logging.getLogger(__name__)

Models = dict[str, dict[str, Any]]  # model → {"identity", "tasks": {task's key: its result}}
# task → shots and the metric that was published
PAPER: dict[str, tuple[int, str]] = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
}
_METRICS = ("acc_norm", "exact_match", "acc")  # of other tasks the first that they have


@dataclass(frozen=True)
class TaskSpec:
    """A task, or a group of tasks, of the harness; ``shots``: examples before each question; None: the task's own number."""

    name: str
    shots: int | None = None

    @property
    def key(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


@dataclass(frozen=True)
class HarnessSettings:
    """What changes the numbers, besides model and task."""

    limit: int | None = None  # number of questions of each task
    chat: bool = False  # ask through the chat template, which the paper did not
    batch_size: int | None = None  # None: the harness finds one on a GPU, and takes 1 on a CPU
    include: Path | None = None  # a folder with the user's own task files

    @property
    def kind(self) -> str:
        """The result's name; a part of the questions does not replace the complete result."""
        return "harness" + ("-chat" if self.chat else "") + (f"-limit-{self.limit}" if self.limit else "")


def table(tasks: Sequence[TaskSpec], models: Models, roles: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: percent, with the harness's standard error."""
    metrics = {key: entry["metric"] for found in models.values() for key, entry in found["tasks"].items()}
    rows = []
    for name, found in models.items():
        entries = [found["tasks"].get(task.key) for task in tasks]
        cells = ["-" if entry is None else _cell(entry) for entry in entries]
        mean = "-" if None in entries else f"{100 * sum(e['value'] for e in entries) / len(entries):.2f}"
        rows.append([roles[name], *cells, mean])
    return ["model", *(f"{task.key} {metrics[task.key]}" for task in tasks), "mean"], rows


def read_tasks(words: Sequence[str]) -> list[TaskSpec]:
    """Tasks from ``NAME`` or ``NAME:SHOTS``, separated by commas; none: the paper's. The paper's tasks have its shots
    unless given."""
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    tasks: list[TaskSpec] = []
    for name in names or PAPER:
        plain, colon, shots = name.rpartition(":")
        if colon and not shots.isdecimal():
            message = f"--tasks: {short(name)}: {short(shots)} is not a number of shots."
            raise UserError(message, "Write NAME or NAME:5.")
        tasks.append(TaskSpec(plain, int(shots)) if colon else TaskSpec(name, PAPER.get(name, (None, ""))[0]))
    return list(dict.fromkeys(tasks))


def open_harness(tasks: Sequence[TaskSpec], include: Path | None = None) -> Any:
    """The harness's index of tasks (``TaskManager``), without loading their data."""
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder.", "Give a folder with task files (YAML).")
    with optional("harness"):
        from lm_eval.tasks import TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    for task in tasks:
        if task.name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(task.name, manager.all_tasks, 3))
            hint = f"Did you mean {near}?" if near else "See lm-eval's own list: lm-eval ls tasks."
            raise UserError(f"--tasks: the harness has no task {short(task.name)}.", hint)
    return manager


def evaluate_harness(
    live: LoadedModel,
    tasks: Sequence[TaskSpec],
    settings: HarnessSettings,
    manager: Any,
    *,
    models: Sequence[str],
    folder: Path,
) -> Models:
    """Run every task on every model, except those in an earlier result of the same models and settings. The result,
    ``folder/KIND.json``, is written after each task.

    Args:
        manager: of ``open_harness``.
        models: names in ``live.models``.
    """
    kept = (read_json(folder / f"{settings.kind}.json") or {}).get("models", {})
    result: Models = {}
    for name in live.models:
        identity, known = _identity(live, name, settings), kept.get(name) or {}
        same = known.get("identity") == identity
        if name in models or same:
            result[name] = {"identity": identity, "tasks": dict(known["tasks"]) if same else {}}
    told = {"limit": settings.limit, "apply_chat_template": settings.chat, "lm_eval": version("lm_eval")}
    for name, task in product((name for name in live.models if name in models), tasks):
        done = result[name]["tasks"]
        if task.key in done:
            logger.info(f"{name}, {task.key}: kept from {done[task.key]['finished']}")
            continue
        logger.info(f"{name}, {task.key} …")
        start = time.monotonic()
        with live.stack.only(live.models[name]), torch.inference_mode():
            found = _run(live, manager, task, settings)
        done[task.key] = _entry(task, found, time.monotonic() - start)
        logger.info(f"{name}, {task.key}: {_cell(done[task.key])} in {duration(done[task.key]['seconds'])}")
        write_result(folder, settings.kind, {"settings": told, "models": result}, head_of(live))
    return result


def _run(live: LoadedModel, manager: Any, task: TaskSpec, settings: HarnessSettings) -> Any:
    """``lm_eval.simple_evaluate`` of a task, or a group's tasks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    base = live.stack.base
    batch = settings.batch_size or ("auto" if base.get_input_embeddings().weight.device.type == "cuda" else 1)
    tokenizer = copy.deepcopy(live.template.tokenizer)  # the harness changes its padding
    try:
        return simple_evaluate(
            HFLM(pretrained=base, tokenizer=tokenizer, backend="causal", batch_size=batch),
            tasks=[task.name],
            num_fewshot=task.shots,
            task_manager=manager,
            limit=settings.limit,
            apply_chat_template=settings.chat,
            fewshot_as_multiturn=settings.chat,
            log_samples=False,
        )
    except OSError as error:  # of the hub or the data sets
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"task {task.name}: cannot be loaded: {what[:300]}",
            "The harness downloads its tasks' rows from the hub: connect, or copy the hub's cache (HF_HOME) from another machine.",
        ) from error


def _entry(task: TaskSpec, found: Any, seconds: float) -> dict[str, Any]:
    results = {**found.get("groups", {}), **found["results"]}[task.name]
    # "acc_norm,none": the metric and the filter of the answers that it was computed after
    numbers = {key: value for key, value in results.items() if isinstance(value, int | float) and "," in key}
    metrics = [key for key in numbers if "_stderr," not in key]
    wanted = [PAPER[task.name][1]] if task.name in PAPER else list(_METRICS)
    chosen = next((key for name in wanted for key in metrics if key.partition(",")[0] == name), metrics[0])
    metric, _, filtered = chosen.partition(",")
    return {
        "metric": metric,
        "value": numbers[chosen],
        "stderr": numbers.get(f"{metric}_stderr,{filtered}"),
        "shots": task.shots if task.shots is not None else found.get("n-shot", {}).get(task.name),
        "questions": sum(count["effective"] for count in found.get("n-samples", {}).values()),
        "all": numbers,
        "task_version": found.get("versions", {}).get(task.name),
        "seconds": round(seconds, 1),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
    }


def _cell(entry: dict[str, Any]) -> str:
    error = "" if entry["stderr"] is None else f" ± {100 * entry['stderr']:.2f}"
    return f"{100 * entry['value']:.2f}{error}"


def _identity(live: LoadedModel, model: str, settings: HarnessSettings) -> str:
    """Hash of everything that the numbers depend on: weights, template, task files."""
    parts = [live.base.fingerprint, str(live.base.load_in_4bit), str(live.base.dtype)]
    if live.chain is not None:
        parts += [adapter.sha256 for adapter in live.chain.adapters[: len(live.models[model])]]
    if settings.chat:
        parts.append(live.template.text)
    if settings.include is not None:
        for path in sorted(p for p in settings.include.rglob("*") if p.suffix in (".yaml", ".py", ".json", ".jsonl")):
            parts.append(f"{path.relative_to(settings.include)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return text_sha256("\n".join([*parts, version("lm_eval")]))
