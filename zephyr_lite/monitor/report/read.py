"""What a stage's folder says. Files of runs that go on, were killed, or are older than a file's newest keys are all read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from ...config.load import DPO_DEFAULTS, RunConfig, read_dumped
from ...errors import UserError
from ...io.redact import redact
from ...io.run_dir import STAGE_FILE, StageDir, newest_run, read_json, stages_of
from ...io.stage_info import checked

REPORT = "report.html"
LENGTHS = "lengths.json"
Points = tuple[list[int], list[float]]


@dataclass
class StageRecord:
    """One stage of a run, as its files say. Secrets of this process's environment are hidden already.

    Attributes:
        folder: where it lies; name, run: the names of both folders.
        method: sft or dpo.
        info: stage.json; config: config.yaml ({}: there is none).
        history: metrics.jsonl: step → what was logged of it, evaluations (``eval_…``) among it.
        samples: samples.jsonl; left_out: left_out.jsonl; lengths: lengths.json ({}: there is none).
        results: kind → what ``eval`` found.
        own: sha256 of the own adapters of the run's finished stages, by name.
    """

    folder: Path
    name: str
    run: str
    method: str
    info: dict[str, Any]
    config: dict[str, Any]
    history: dict[int, dict[str, Any]]
    samples: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    lengths: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.info.get("status") == "complete"

    @property
    def on_cpu(self) -> bool:
        return self.part("machine").get("device") == "cpu"

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max(self.history, default=0)

    @cached_property
    def columns(self) -> dict[str, Points]:
        """Every number of the history: name → (steps, values); a value may be no finite number."""
        found: dict[str, Points] = {}
        for step, line in self.history.items():
            for key, value in line.items():
                if is_number(value):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(float(value))
        return found

    def points(self, key: str) -> Points:
        """(steps, values) of what was logged under a name."""
        return self.columns.get(key, ([], []))

    def last(self, key: str) -> float | None:
        values = self.points(key)[1]
        return values[-1] if values else None

    def part(self, key: str) -> dict[str, Any]:
        """An object of stage.json."""
        return as_dict(self.info.get(key))

    def total(self) -> int | None:
        """Steps in all; None: nobody knows."""
        if self.complete and isinstance(steps := self.part("result").get("steps"), int):
            return steps
        rows, batch = self.part("data").get("rows"), self.config.get("batch_size")
        epochs, most = self.config.get("num_train_epochs"), self.config.get("max_steps")
        if isinstance(most, int):
            return most
        if not (is_number(rows) and is_number(batch) and is_number(epochs) and batch):
            return None
        return max(1, math.ceil(epochs * math.ceil(rows / batch)))  # as ``train.steps.step_schedule``

    def recipe(self) -> dict[str, Any]:
        """The published recipe's keys for this method."""
        return RunConfig.model_validate(DPO_DEFAULTS if self.method == "dpo" else {}).model_dump(mode="json")


def read_stage(folder: Path) -> StageRecord:
    """Everything that a report says of a stage.

    Raises:
        UserError: there is no stage, or its stage.json or config.yaml is broken.
    """
    stage = StageDir(folder)
    info = stage.info()
    if info is None:
        raise UserError(
            f"{folder}: is no stage of a run (it has no {STAGE_FILE}).", "Give runs/NAME or runs/NAME/STAGE."
        )
    checked(info, folder / STAGE_FILE)
    config = read_dumped(stage.config) if stage.config.is_file() else {}
    history: dict[int, dict[str, Any]] = {}
    for line in json_lines(stage.metrics):
        if isinstance(step := line.get("step"), int) and not isinstance(step, bool):
            history.setdefault(step, {}).update(line)
    whole = folder.absolute()
    record = StageRecord(
        folder,
        whole.name,
        whole.parent.name,
        str(info.get("method", "sft")),
        _hidden(info),
        _hidden(config),
        dict(sorted(history.items())),
        json_lines(stage.samples),
        json_lines(folder / "left_out.jsonl"),
        _optional(folder / LENGTHS),
    )
    for path in sorted((folder / "eval").glob("*.json")):
        told = _optional(path)
        if isinstance(told.get("models"), dict) and not path.stem.endswith("-partial"):
            record.results[path.stem] = told
    for other in stages_of(whole.parent):
        found = as_dict(as_dict(_optional(other.path / STAGE_FILE)).get("own")).get("sha256")
        if isinstance(found, str):
            record.own[other.path.name] = found
    return record


def read_source(source: Path | None) -> list[StageRecord]:
    """The stages of a run's folder, in the order in which they were trained, or the one whose folder it is.

    Args:
        source: None: the newest run under ``runs/``.

    Raises:
        UserError: there is none there.
    """
    path = newest_run(Path("runs")) if source is None else source.expanduser()
    if path is None:
        raise UserError("there is no run under runs/.", "Run `zephyr-lite sft` first, or name a run's folder.")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder.", "Give a run's folder (runs/NAME) or a stage's (runs/NAME/STAGE).")
    if (path / STAGE_FILE).is_file():
        return [read_stage(path)]
    found = [read_stage(stage.path) for stage in stages_of(path)]
    if not found:
        raise UserError(
            f"{path}: is neither a run's folder nor a stage's (no {STAGE_FILE} in it or one below).",
            "Give runs/NAME or runs/NAME/STAGE.",
        )
    # a stage that stands on more adapters came later; by time where that says nothing
    return sorted(found, key=lambda r: (len(as_list(r.info.get("adapters"))), str(r.info.get("created")), r.name))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a line that is torn, or no object, is passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in redact(text).split("\n"):
        try:
            told = json.loads(line, parse_int=_whole) if line.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(told, dict):
            found.append(told)
    return found


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _optional(path: Path) -> dict[str, Any]:
    """A JSON object that the report can do without."""
    try:
        return _hidden(read_json(path) or {})
    except UserError:
        return {}


def _hidden(value: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(redact(json.dumps(value)), parse_int=_whole))


def _whole(digits: str) -> int | float:
    """A whole number; one that no float can hold, which nothing here could be computed with, is infinite."""
    return int(digits) if len(digits) < 300 else float(digits)
