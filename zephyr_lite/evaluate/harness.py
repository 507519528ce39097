"""Benchmarks by EleutherAI's lm-evaluation-harness, on the live stack or a model's folder: one loaded base, a task at a time.

The paper's four tasks with the shots and metrics of the first Open LLM Leaderboard (Tunstall et al. 2023, arXiv 2310.16944,
table 2). Every finished task of a model is written at once; the same command goes on with the others.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import io
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..io.run_dir import read_json, text_sha256
from ..io.text import duration, short
from ..model.loaded import LoadedModel, Say

# task → shots and the metric that was published
PAPER: dict[str, tuple[int, str]] = {
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
    "mmlu": (5, "acc"),
    "truthfulqa_mc2": (0, "acc"),
}
_METRICS = ("acc_norm", "exact_match", "acc")  # the first that a task has, where nothing was published


@dataclass(frozen=True)
class TaskSpec:
    """A task of the harness.

    Attributes:
        name: a task's, or a group's.
        shots: examples before each question; None: the task's own number.
    """

    name: str
    shots: int | None = None

    @property
    def key(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


@dataclass(frozen=True)
class HarnessSettings:
    """What changes the numbers, besides model and task.

    Attributes:
        limit: so many questions of each task; None: all.
        chat: questions as a user's turns through the chat template, which the paper did not do.
        batch_size: None: the harness finds one on a GPU, and takes 1 on a CPU.
        include: a folder with task files of the user's own.
    """

    limit: int | None = None
    chat: bool = False
    batch_size: int | None = None
    include: Path | None = None

    @property
    def kind(self) -> str:
        """The result's name: a trial with a limit does not lie where the complete result lies."""
        return "harness" + ("-chat" if self.chat else "") + (f"-limit-{self.limit}" if self.limit else "")


@dataclass
class HarnessResult:
    """Of some models.

    Attributes:
        tasks: the tasks that were asked for.
        models: model → {"identity", "tasks": {task's key: what it came to}}.
    """

    tasks: list[TaskSpec]
    settings: HarnessSettings
    models: dict[str, dict[str, Any]] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """For ``results.write_result``."""
        settings = {"limit": self.settings.limit, "apply_chat_template": self.settings.chat}
        return {"settings": {**settings, "lm_eval": version("lm_eval")}, "models": self.models}

    def header(self) -> list[str]:
        return ["model", *(task.key for task in self.tasks), "mean"]

    def rows(self, roles: dict[str, str]) -> list[list[str]]:
        """Under ``header``; percent, with the harness's standard error."""
        rows = []
        for name, found in self.models.items():
            entries = [found["tasks"].get(task.key) for task in self.tasks]
            cells = ["-" if entry is None else _cell(entry) for entry in entries]
            values = [entry["value"] for entry in entries if entry is not None]
            whole = len(values) == len(self.tasks)
            rows.append([roles.get(name, name), *cells, f"{100 * sum(values) / len(values):.2f}" if whole else "-"])
        return rows

    def metrics(self) -> str:
        """``arc_challenge acc_norm, mmlu acc``."""
        named = {key: entry["metric"] for found in self.models.values() for key, entry in found["tasks"].items()}
        return ", ".join(f"{task.key} {named[task.key]}" for task in self.tasks if task.key in named)


def read_tasks(words: Sequence[str]) -> list[TaskSpec]:
    """``NAME`` or ``NAME:SHOTS``, apart by commas or one a word; none: the paper's. A task of the paper's without a number
    of shots gets the paper's.

    Raises:
        UserError: a number of shots is none; a task stands there twice.
    """
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    tasks = []
    for name in names or PAPER:
        plain, colon, shots = name.rpartition(":")
        if not colon:
            tasks.append(TaskSpec(name, PAPER[name][0] if name in PAPER else None))
        elif shots.isascii() and shots.isdigit() and len(shots) < 4:
            tasks.append(TaskSpec(plain, int(shots)))
        else:
            raise UserError(f"--tasks: {short(name)}: {short(shots)} is no number of shots.", "Write NAME or NAME:5.")
    twice = [task.key for place, task in enumerate(tasks) if task in tasks[:place]]
    if twice:
        raise UserError(f"--tasks: {twice[0]} stands there twice.", "Name it once.")
    return tasks


def open_harness(tasks: Sequence[TaskSpec], include: Path | None = None) -> Any:
    """The harness's index of tasks; cheap, and knows whether all of them are there.

    Raises:
        UserError: lm-eval is not installed; there is no such task or folder.
    """
    if include is not None and not include.is_dir():
        raise UserError(f"--include-path {include}: no such folder.", "Give a folder with task files (YAML).")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"the harness is not installed ({error}).", 'Install it: pip install "zephyr-lite[harness]"'
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    names = {task.name for task in tasks}
    if include is not None:
        # alone, if that is enough: reading the harness's own thousands of files takes seconds
        manager = TaskManager(include_path=str(include), include_defaults=False)
        if names <= set(manager.all_tasks):
            return manager
        manager = TaskManager(include_path=str(include))
    else:
        manager = _own_tasks()
    known = list(manager.all_tasks)
    for task in tasks:
        if task.name not in known:
            near = difflib.get_close_matches(task.name, known, 3)
            raise UserError(
                f"--tasks: the harness has no task {short(task.name)}.",
                f"Near it: {', '.join(near)}." if near else "See lm-eval's own list: lm-eval ls tasks.",
            )
    return manager


@lru_cache(maxsize=1)
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def evaluate_harness(
    live: LoadedModel,
    tasks: Sequence[TaskSpec],
    settings: HarnessSettings,
    manager: Any,
    *,
    models: Sequence[str],
    earlier: Path | None = None,
    on_task: Callable[[HarnessResult], None] = lambda result: None,
    say: Say = lambda line: None,
) -> HarnessResult:
    """Run every task on every model, but for what an earlier result of the same models and settings has.

    Args:
        manager: of ``open_harness``.
        models: names in ``live.models``.
        earlier: the file that an earlier start wrote.
        on_task: told after each task, with all that is there.

    Raises:
        UserError: a task's data cannot be loaded; ``earlier`` is not readable.
    """
    result = HarnessResult(list(tasks), settings)
    kept = (read_json(earlier) or {}).get("models", {}) if earlier is not None else {}
    for name in live.models:
        identity = _identity(live, name, settings)
        known = kept.get(name) or {}
        same = known.get("identity") == identity
        if name in models or same:
            result.models[name] = {"identity": identity, "tasks": dict(known["tasks"]) if same else {}}
    device = live.stack.base.get_input_embeddings().weight.device
    batch = settings.batch_size or ("auto" if device.type == "cuda" else 1)
    for name in (name for name in live.models if name in models):
        done = result.models[name]["tasks"]
        for task in tasks:
            if task.key in done:
                say(f"{name}, {task.key}: kept from {done[task.key]['finished']}")
                continue
            say(f"{name}, {task.key} …")
            start = time.monotonic()
            with live.stack.only(live.models[name]), torch.inference_mode(), _bars_in_terminals_only():
                loaded = _load(manager, task)
                found = _run(live, loaded, settings, batch)
            done[task.key] = _entry(task, found, time.monotonic() - start)
            say(f"{name}, {task.key}: {_cell(done[task.key])} in {duration(done[task.key]['seconds'])}")
            on_task(result)
    return result


def _load(manager: Any, task: TaskSpec) -> Any:
    """A task, or a group's tasks, with its rows and shots, as the harness's own command sets them."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    try:
        loaded = manager.load([task.name])
    except Exception as error:  # the hub's, the data sets' and a task's own code: anything
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"task {task.name}: cannot be loaded: {what[:300]}",
            "Rows of the harness's own tasks come from the hub the first time: connect, or take the hub's cache (HF_HOME) "
            "along from where there is a connection.",
        ) from error
    for each in loaded["tasks"].values():
        own = each.get_config("num_fewshot")
        if own != 0:  # a 0 belongs to the task: its prompt has examples of its own
            each.set_config(key="num_fewshot", value=task.shots if task.shots is not None else own or 0)
        each.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _run(live: LoadedModel, loaded: Any, settings: HarnessSettings, batch: int | str) -> Any:
    """What ``lm_eval.simple_evaluate`` does, without its survey of the machine."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    # a tokenizer of its own: it sets the padding
    tokenizer = copy.deepcopy(live.template.tokenizer)
    return evaluate(
        lm=HFLM(pretrained=live.stack.base, tokenizer=tokenizer, backend="causal", batch_size=batch),
        task_dict=loaded,
        limit=settings.limit,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=settings.chat,
        log_samples=False,
    )


@contextmanager
def _bars_in_terminals_only() -> Iterator[None]:
    """The harness draws progress bars; in a log file they are noise."""
    if sys.stderr.isatty():
        yield
    else:
        with redirect_stderr(io.StringIO()):
            yield


def _entry(task: TaskSpec, found: Any, seconds: float) -> dict[str, Any]:
    results = found["results"][task.name] if task.name in found["results"] else found["groups"][task.name]
    # "acc_norm,none": the metric and the filter of the answers that it was computed after
    numbers = {key: value for key, value in results.items() if isinstance(value, int | float) and "," in key}
    metrics = [key for key in numbers if "_stderr," not in key]
    if not metrics:
        raise UserError(f"task {task.name}: gives no number.", "Choose another task.")
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
    """What the numbers depend on: other weights, another template or other task files, and none is kept."""
    parts = [live.base.fingerprint, str(live.base.load_in_4bit), str(live.dtype)]
    if live.chain is not None:
        parts += [adapter.sha256 for adapter in live.chain.adapters[: len(live.models[model])]]
    if settings.chat:
        parts.append(live.template.text)
    if settings.include is not None:
        for path in sorted(p for p in settings.include.rglob("*") if p.suffix in (".yaml", ".py", ".json", ".jsonl")):
            parts.append(f"{path.relative_to(settings.include)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return text_sha256("\n".join([*parts, version("lm_eval")]))
