"""The files of a run's stages, finished, running or killed, and of older versions. Imports no torch."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from ..config.load import Method
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.redact import redact
from ..io.run_dir import STAGE_FILE, StageDir, checked, newest_run, read_json, stages_of
from ..io.text import duration
from .charts import is_number, number

LENGTHS = "lengths.json"
# objects and lists of stage.json
_PARTS = ("adapters", "base", "data", "eval_data", "machine", "own", "plan", "result", "resumed", "versions")
Columns = dict[str, tuple[list[int], list[float]]]


class StageRecord:
    """The files of one stage, without the secrets of this process's environment.

    Attributes:
        folder: its path; name, run: the names of the stage's and of the run's folder.
        method: sft or dpo.
        info: stage.json; missing objects and lists are empty.
        complete: the stage is finished.
        config: config.yaml, {} if there is none.
        columns: every number of metrics.jsonl, evaluations (``eval_…``) included: name → (steps, values).
        step: the last logged step; total: number of steps of the whole stage, None if unknown.
        planned: the plan's memory by part, in bytes; ``peak`` is the whole.
        samples: samples.jsonl; left_out: left_out.jsonl; lengths: lengths.json.
        results: kind → the result file of ``zephyr-lite eval``.
        own: stage of the run → sha256 of its own adapter.
        who: prefix of sentences about it, when two runs are compared.

    Raises:
        UserError: it is not a stage, or its stage.json or config.yaml is broken.
    """

    def __init__(self, folder: Path) -> None:
        stage, whole = StageDir(folder), folder.absolute()
        info = stage.info()
        if info is None:
            raise UserError(
                f"{folder}: is not a stage of a run (no {STAGE_FILE}).", "Give runs/NAME or runs/NAME/STAGE."
            )
        files: dict[str, Any] = {
            "info": checked(info, folder / STAGE_FILE),
            "config": read_yaml(stage.config) if stage.config.is_file() else {},
            "metrics": json_lines(stage.metrics),
            "samples": json_lines(stage.samples),
            "left_out": json_lines(folder / "left_out.jsonl"),
            "lengths": read_json(folder / LENGTHS) or {},
            "results": {},
        }
        for path in sorted((folder / "eval").glob("*.json")):
            if "models" in (result := read_json(path) or {}):
                files["results"][path.stem] = result
        files = json.loads(redact(json.dumps(files)))
        self.folder, self.name, self.run, self.who = folder, whole.name, whole.parent.name, ""
        self.info: dict[str, Any] = files["info"]
        for part in _PARTS:
            if self.info.get(part) is None:
                self.info[part] = [] if part in ("adapters", "resumed") else {}
        self.complete = self.info.get("status") == "complete"
        self.method: Method = self.info.get("method", "sft")
        self.planned: dict[str, float] = self.info["plan"].get("account") or {}
        self.config: dict[str, Any] = files["config"]
        self.samples, self.left_out = files["samples"], files["left_out"]
        self.lengths, self.results = files["lengths"], files["results"]
        self.step = 0
        self.columns: Columns = {}
        for line in files["metrics"]:
            if not isinstance(line.get("step"), int):
                continue
            self.step = max(self.step, line["step"])
            for key, value in line.items():
                if is_number(value):
                    steps, values = self.columns.setdefault(key, ([], []))
                    steps.append(line["step"])
                    values.append(float(value))
        self.total = self.info["result"].get("steps") or self.config.get("max_steps")
        rows, batch = self.info["data"].get("rows"), self.config.get("batch_size")
        if not self.total and rows and batch:
            self.total = max(1, math.ceil(self.config["num_train_epochs"] * math.ceil(rows / batch)))
        self.own = {}
        for other in stages_of(whole.parent):
            self.own[other.path.name] = ((other.info() or {}).get("own") or {}).get("sha256")

    def values(self, key: str) -> list[float]:
        """The finite values of a metric."""
        return list(filter(math.isfinite, self.columns.get(key, ((), ()))[1]))

    def facts(self) -> dict[str, str]:
        """The overview: name → value."""
        result, total, facts = self.info["result"], self.total, {}
        running = not self.complete and total is not None
        facts["steps"] = f"{number(self.step)} of {number(total)}" if running else number(self.step)
        held_out, losses = self.columns.get("eval_loss", ([], []))[1], self.values("loss")
        if held_out:
            facts["held-out loss"] = " → ".join(map(number, dict.fromkeys((held_out[0], held_out[-1]))))
        tenth = max(1, len(losses) // 10)
        if losses:
            first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
            facts["training loss, start → end"] = f"{number(first)} → {number(last)}"
        if len(held_out) > 2 and (best := result.get("best")):
            facts["best held-out loss"] = f"{number(best[0])} (step {number(best[1])})"
        for name, key, form in (
            ("preference accuracy", "rewards/accuracies", share),
            ("margin", "rewards/margins", number),
            ("token accuracy", "mean_token_accuracy", share),
        ):
            if values := self.values(f"eval_{key}"):
                facts[f"{name}, held-out"] = form(values[-1])
            elif (values := self.values(key)) and self.method == "dpo":
                facts[name] = form(statistics.fmean(values[-tenth:]))
        if general := result.get("general_loss"):
            facts["general text, before → after"] = f"{number(general['before'])} → {number(general['after'])}"
        for unit in ("tokens", "pairs", "answers"):
            if speeds := self.values(f"{unit}_per_second"):
                facts[f"{unit} a second"] = number(float(f"{statistics.median(speeds):.3g}"))
        if "seconds" in result:
            facts["time, last start" if self.info["resumed"] else "time"] = duration(result["seconds"])
        elif running and (seconds := self.values("seconds")):
            facts["left, at this speed"] = duration(statistics.median(seconds) * max(0, total - self.step))
        peak = result.get("peak_memory_bytes") or max(self.values("peak_memory_gib"), default=0) * 2**30
        planned = self.planned.get("peak")
        if peak:
            facts["memory at the peak"] = gib(peak) + (f", planned {gib(planned)}" if planned else "")
        elif planned:
            facts["memory planned"] = gib(planned)
        if left := result.get("steps_left_out", len(self.left_out)):
            facts["steps left out"] = number(left)
        return facts


def read_source(source: Path | None) -> list[StageRecord]:
    """The stages of a run's folder in the order of training, or the one stage whose folder it is.

    Args:
        source: None: the newest run under ``runs/``.
    """
    path = newest_run(complete=False) if source is None else source.expanduser()
    if path is None:
        raise UserError("there is no run under runs/.", "Run `zephyr-lite sft` first, or name a run's folder.")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder.", "Give a run's folder (runs/NAME) or a stage's (runs/NAME/STAGE).")
    if (path / STAGE_FILE).is_file():
        return [StageRecord(path)]
    found = [StageRecord(stage.path) for stage in stages_of(path)]
    if not found:
        raise UserError(
            f"{path}: is neither a run's folder nor a stage's (no {STAGE_FILE} in it or in a subfolder).",
            "Give runs/NAME or runs/NAME/STAGE.",
        )
    # a stage on top of more adapters was trained later
    return sorted(found, key=lambda record: (len(record.info["adapters"]), str(record.info.get("created"))))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that a process may be appending to; torn lines are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def share(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def gib(value: Any) -> str:
    """Bytes in GiB, or in MiB below 0.5 GiB."""
    if not is_number(value):
        return "–"
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 512 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"
