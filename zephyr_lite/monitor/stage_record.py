"""A stage's files as the report reads them: of finished, running and killed runs, and of older versions. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from ..config.load import DPO_DEFAULTS, RunConfig
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.redact import redact
from ..io.run_dir import STAGE_FILE, StageDir, checked, newest_run, read_json, stages_of

LENGTHS = "lengths.json"
Points = tuple[list[int], list[float]]


@dataclass
class StageRecord:
    """The files of one stage, with secrets of this process's environment removed.

    Attributes:
        folder: its path; name, run: the names of the stage's and of the run's folder.
        method: sft or dpo.
        info: stage.json; config: config.yaml, {} if there is none.
        history: metrics.jsonl: step → what was logged of it, evaluations (``eval_…``) included.
        samples: samples.jsonl; left_out: left_out.jsonl; lengths: lengths.json, {} if there is none.
        results: kind → the result file of ``zephyr-lite eval``.
        own: stage of the run → sha256 of its own adapter.
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
        """The last logged step."""
        return max(self.history, default=0)

    @property
    def planned(self) -> dict[str, float]:
        """The plan's memory by part, in bytes; ``peak`` is the whole."""
        return self.part("plan").get("account") or {}

    @cached_property
    def columns(self) -> dict[str, Points]:
        """Every logged metric: name → (steps, values)."""
        found: dict[str, Points] = {}
        for step, line in self.history.items():
            for key, value in line.items():
                if is_number(value):
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(float(value))
        return found

    def points(self, key: str) -> Points:
        """(steps, values) of a metric."""
        return self.columns.get(key, ([], []))

    def last(self, key: str) -> float | None:
        values = self.points(key)[1]
        return values[-1] if values else None

    def part(self, key: str) -> dict[str, Any]:
        """An object of stage.json; {} if there is none."""
        return self.info.get(key) or {}

    def data_part(self, key: str) -> dict[str, Any]:
        """An object of the data report."""
        return self.part("data").get(key) or {}

    @property
    def links(self) -> list[dict[str, Any]]:
        """The adapters below (path, sha256)."""
        return self.info.get("adapters") or []

    @property
    def base(self) -> dict[str, Any]:
        """The base, with ``label``: its hub id, or the name of a local folder."""
        base = self.part("base")
        name = str(base.get("name_or_path", "–"))
        if Path(name).is_absolute() or name.startswith(("~", ".")):
            return {**base, "label": f"{Path(name).name} (a local folder)"}
        return {**base, "label": f"{name} ({base.get('revision', 'main')})"}

    def adapter_state(self, link: dict[str, Any]) -> str:
        """Whether an adapter below is the one that the run's folder has now."""
        own = self.own.get(str(link.get("path", "")).split("/")[0])
        if own is None:
            return ""
        return (
            ", unchanged in this run"
            if own == link.get("sha256")
            else (": NOT the adapter that is there now; it was trained or replaced since")
        )

    def total(self) -> int | None:
        """Number of steps of the whole stage; None if unknown."""
        if self.complete and "steps" in self.part("result"):
            return self.part("result")["steps"]
        if most := self.config.get("max_steps"):
            return most
        rows, batch, epochs = self.part("data").get("rows"), *map(self.config.get, ("batch_size", "num_train_epochs"))
        if not (rows and batch and epochs):
            return None
        return max(1, math.ceil(epochs * math.ceil(rows / batch)))

    def recipe(self) -> dict[str, Any]:
        """The published recipe's configuration for this method."""
        return RunConfig.model_validate(DPO_DEFAULTS if self.method == "dpo" else {}).model_dump(mode="json")


def read_stage(folder: Path) -> StageRecord:
    """Read a stage's folder.

    Raises:
        UserError: it is no stage, or its stage.json or config.yaml is broken.
    """
    stage = StageDir(folder)
    info = stage.info()
    if info is None:
        raise UserError(f"{folder}: is not a stage of a run (no {STAGE_FILE}).", "Give runs/NAME or runs/NAME/STAGE.")
    checked(info, folder / STAGE_FILE)
    history: dict[int, dict[str, Any]] = {}
    for line in json_lines(stage.metrics):
        if isinstance(step := line.get("step"), int):
            history.setdefault(step, {}).update(line)
    whole = folder.absolute()
    record = StageRecord(
        folder,
        whole.name,
        whole.parent.name,
        str(info.get("method", "sft")),
        _redacted(info),
        _redacted(read_yaml(stage.config)) if stage.config.is_file() else {},
        dict(sorted(history.items())),
        json_lines(stage.samples),
        json_lines(folder / "left_out.jsonl"),
        _redacted(read_json(folder / LENGTHS) or {}),
    )
    for path in sorted((folder / "eval").glob("*.json")):
        result = _redacted(read_json(path) or {})
        if "models" in result and not path.stem.endswith("-partial"):
            record.results[path.stem] = result
    for other in stages_of(whole.parent):
        own = (other.info() or {}).get("own")
        if own is not None:
            record.own[other.path.name] = own["sha256"]
    return record


def read_source(source: Path | None) -> list[StageRecord]:
    """The stages of a run's folder in the order of training, or the one stage whose folder it is.

    Args:
        source: None: the newest run under ``runs/``.

    Raises:
        UserError: there is none.
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
            f"{path}: is neither a run's folder nor a stage's (no {STAGE_FILE} in it or in a subfolder).",
            "Give runs/NAME or runs/NAME/STAGE.",
        )
    # a stage on top of more adapters was trained later
    return sorted(found, key=lambda r: (len(r.links), str(r.info.get("created")), r.name))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; torn lines are skipped."""
    if not path.is_file():
        return []
    found = []
    for line in redact(path.read_text(encoding="utf-8", errors="replace")).split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _redacted(value: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(redact(json.dumps(value))))
