"""Checkpoints (safetensors and JSON, complete or not there at all) and the metrics log."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError
from ..model.adapters import AdapterStack
from ..rundir import StageDir, folder_aside, read_json, write_json
from .optim import restore_state

TENSORS = "state.safetensors"
STATE = "state.json"


class Checkpoint:
    """Everything a run needs to go on as if nothing had happened.

    Dropout and the order of rows are functions of (seed, step), so no generator has a state to keep.
    """

    def __init__(
        self,
        stack: AdapterStack,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        scaler: torch.amp.GradScaler,
    ) -> None:
        self.stack, self.parameters, self.optimizer, self.scheduler, self.scaler = (
            stack, parameters, optimizer, scheduler, scaler
        )  # fmt: skip

    def write(self, stage: StageDir, step: int, extra: dict[str, Any]) -> Path:
        """Write ``checkpoint-STEP``; it appears complete or not at all."""
        tensors = {f"adapter.{name}": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        plain: dict[str, dict[str, Any]] = {}
        names = list(self.parameters)
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            for key, value in _flat(state):
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{names[index]}"] = value.detach().cpu().clone().contiguous()
                else:
                    plain.setdefault(key, {})[names[index]] = value
        target = stage.path / f"checkpoint-{step}"
        with folder_aside(target) as folder:
            save_file(tensors, folder / TENSORS)
            write_json(
                folder / STATE,
                {
                    "step": step,
                    **extra,
                    "optimizer": {"plain": plain, "param_groups": optimizer["param_groups"]},
                    "scheduler": self.scheduler.state_dict(),
                    "scaler": self.scaler.state_dict(),
                },
            )
        return target

    def read(self, folder: Path) -> dict[str, Any]:
        """Put a checkpoint's state back; returns its JSON part.

        Raises:
            UserError: it does not belong to this adapter, or cannot be read.
        """
        state = read_json(folder / STATE)
        tensors = _tensors(folder)
        if state is None:
            raise UserError(f"{folder}: holds no {STATE}.", "Delete this checkpoint; the one before it is taken.")
        self._load_adapter(folder, tensors)
        self._load_optimizer(folder, tensors, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state

    def read_adapter(self, folder: Path) -> None:
        """Put back the adapter's weights alone."""
        self._load_adapter(folder, _tensors(folder))

    def _load_optimizer(self, folder: Path, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Into the state that was allocated, wherever that lies."""
        restored: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for full, tensor in tensors.items():
            if full.startswith("optimizer."):
                key, name = full.removeprefix("optimizer.").split(".", 1)
                restored[name][_inner(key)] = tensor
        for key, values in plain["plain"].items():
            for name, value in values.items():
                restored[name][_inner(key)] = value
        try:
            restore_state(self.optimizer, list(restored.values()), plain["param_groups"])
        except ValueError as error:
            raise UserError(
                f"{folder}: holds another optimizer's state than this run's ({error}).",
                "Go on with the optim and on the kind of device that the run was started with, or choose another "
                "output_dir.",
            ) from None

    def _load_adapter(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        found = {name.removeprefix("adapter."): t for name, t in tensors.items() if name.startswith("adapter.")}
        if {n: t.shape for n, t in found.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise UserError(
                f"{folder}: holds an adapter of other modules or another rank than this configuration's.",
                "Go back to the configuration that the run was started with, or choose another output_dir.",
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])


def _flat(state: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """bitsandbytes nests its 8-bit state one level deeper; ``outer/inner`` names such an entry."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _inner(key: str) -> str:
    """The name of such an entry in the live state, which is flat."""
    return key.rsplit("/", 1)[-1]


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / TENSORS}: cannot be read: {error}.", "Delete this checkpoint; the one before it is taken."
        ) from None


def resume_point(stage: StageDir) -> Path | None:
    """The newest checkpoint, or None."""
    found = stage.checkpoints()
    return found[-1] if found else None


def prune(stage: StageDir, *, keep: int, best: int | None) -> None:
    """Delete the oldest checkpoints beyond ``keep``; never the best, never the last."""
    found = stage.checkpoints()
    spare = [p for p in found[:-1] if best is None or p.name != f"checkpoint-{best}"]
    for path in spare[: max(0, len(found) - keep)]:
        doomed = path.with_name(f".old-{path.name}")
        os.replace(path, doomed)  # a half-deleted folder must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)


class MetricsLog:
    """metrics.jsonl: one JSON object a logged step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")

    def truncate(self, step: int) -> list[dict[str, Any]]:
        """Keep what was logged up to this step, and return it; a resumed run repeats the rest."""
        if not self.path.exists():
            return []
        kept, records = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if record["step"] <= step:
                    kept.append(line)
                    records.append(record)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the torn last line of a killed run
        aside = self.path.with_suffix(".writing")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)
        return records


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    return (
        str(value) if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
    )
