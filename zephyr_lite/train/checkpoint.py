"""Checkpoints (safetensors, JSON and a manifest of both; complete or absent) and the logs of JSON lines beside them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..io.atomic import (
    MANIFEST,
    append_line,
    file_aside,
    folder_aside,
    manifest_fault,
    remove_folder,
    sync_file,
    write_json,
    write_manifest,
)
from ..io.redact import redact
from ..io.run_dir import StageDir, read_json
from ..io.safetensors import DTYPE_NAMES, tensor_bytes, write_stream
from .distributed import world
from .optim import restore_state, state_of

if TYPE_CHECKING:
    from .loop import TrainState
    from .monitors import DpoCollapseMonitor
    from .stage import Metrics

logger = logging.getLogger(__name__)

TENSORS = "state.safetensors"
STATE = "state.json"


def write_checkpoint(state: TrainState, extra: dict[str, Any]) -> Path:
    """Write ``checkpoint-STEP``, tensor by tensor, with these keys more in its ``state.json``: all that a run needs to resume
    bit for bit. Dropout and the order of rows are functions of seed and step, so there is no generator's state to keep."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, parameter in state.parameters.items():
        tensors[f"adapter.{name}"] = parameter.detach()
        for key, value in state_of(state.optimizer, parameter).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{key}.{name}"] = value.detach()
            else:
                plain.setdefault(key, {})[name] = value
    # the largest items first, so that every tensor is aligned to its own
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    header = {name: (DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}

    def put(name: str, out: BinaryIO) -> None:
        out.write(tensor_bytes(tensors[name].cpu()))

    target = state.stage.dir.path / f"checkpoint-{state.step}"
    with folder_aside(target) as folder:
        write_stream(folder / TENSORS, header, put)
        content = {
            "step": state.step,
            **extra,
            "optimizer": {"plain": plain, "param_groups": state.optimizer.state_dict()["param_groups"]},
            "scheduler": state.scheduler.state_dict(),
            "scaler": state.scaler.state_dict(),
        }
        write_json(folder / STATE, content)
        write_manifest(folder)
    return target


def read_checkpoint(state: TrainState, folder: Path) -> dict[str, Any]:
    """Restore adapter, optimizer, schedule and scaler from a checkpoint; returns its ``state.json``."""
    content = read_json(folder / STATE)
    assert content is not None
    tensors = load_file(folder / TENSORS)
    _load_adapter(state.parameters, tensors)
    states: dict[nn.Parameter, dict[str, Any]] = {parameter: {} for parameter in state.parameters.values()}
    plain = content["optimizer"]["plain"]
    found = {f"optimizer.{key}.{name}": value for key, values in plain.items() for name, value in values.items()}
    for place, value in {**found, **tensors}.items():
        kind, key, name = place.split(".", 2)
        if kind == "adapter":
            continue
        # older versions wrote bitsandbytes' nested state as outer/key
        states[state.parameters[name]][key.rsplit("/", 1)[-1]] = value
    try:
        restore_state(state.optimizer, states, content["optimizer"]["param_groups"])
    except ValueError as error:
        raise UserError(
            f"{folder}: holds another optimizer's state than this run's ({error}).",
            "Resume with the optim and on the kind of device that the run was started with, or choose another output_dir.",
        ) from None
    state.scheduler.load_state_dict(content["scheduler"])
    if content["scaler"]:
        state.scaler.load_state_dict(content["scaler"])
    return content


@torch.no_grad()
def _load_adapter(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        assert tensors[f"adapter.{name}"].shape == parameter.shape, name
        parameter.copy_(tensors[f"adapter.{name}"])


def save(state: TrainState, *, pending: bool = False) -> None:
    """Write a checkpoint (``pending``: this step's evaluation was not finished), then delete older ones. The logs are on the
    disk before it is."""
    if not state.stage.writes:
        return
    for log in (state.log, state.skipped.log, state.sample_log):
        log.flush()
    write_checkpoint(
        state,
        {
            "best": state.best,
            "stale": state.stale,
            "total": state.total,
            "pending": pending,
            "finite": state.skipped.state(),
            "warnings": state.warnings,
        },
    )
    prune(state)
    if state.stage.mirror is not None:
        state.stage.mirror.changed(state.best[1] if state.best else None)


def prune(state: TrainState) -> None:
    """Delete the oldest checkpoints beyond ``save_total_limit``; never the last, the best, the one from before skipped steps, or
    one that is being copied."""
    mirror, paths = state.stage.mirror, state.stage.dir.checkpoints()
    spare = len(paths) - state.stage.config.save_total_limit
    kept = {f"checkpoint-{state.before_skips}", f"checkpoint-{state.best and state.best[1]}"}
    kept |= mirror.busy() if mirror is not None else set()
    for path in paths[:-1]:
        if spare > 0 and path.name not in kept:
            remove_folder(path)
            spare -= 1


def resume(state: TrainState) -> bool:
    """Restore the newest checkpoint, if there is one, and what was logged up to it; returns whether its evaluation is due."""
    found, forget_best = world().broadcast(lambda: (resume_point(state.stage.dir), state.stage.forget_best))
    content: dict[str, Any] = {}
    if found is not None:
        content = read_checkpoint(state, found)
        assert content["total"] == state.total, f"{found}: of a run of {content['total']} steps, not {state.total}"
        state.step = content["step"]
        if not forget_best:
            state.best = tuple(content["best"]) if content["best"] else None
            state.stale = content["stale"]
        state.skipped.load(content.get("finite") or {})
        if state.skipped.in_a_row:  # it was stopped among skipped steps
            state.before_skips = state.step
        state.warnings = list(content.get("warnings") or [])
        logger.info(f"going on from {found.name}")
        if state.stage.writes:
            prune(state)  # the last process may have been killed between a checkpoint and this
    pending = bool(content.get("pending"))
    state.skipped.log.truncate(state.step)
    for record in state.sample_log.truncate(state.step):
        state.sampled.add(record["step"])
    records = state.log.truncate(state.step, pending=pending)
    state.evaluations, state.metrics = replay(records, state.objective.collapse)
    return pending


def replay(records: list[Metrics], collapse: DpoCollapseMonitor | None) -> tuple[list[Metrics], Metrics]:
    """The evaluations among logged records, and the metrics of the last step; ``collapse`` sees the steps again."""
    steps = [record for record in records if "loss" in record]
    if collapse is not None:
        for record in steps:
            collapse.saw(int(record["step"]), record)
    last = {key: value for key, value in steps[-1].items() if key != "step"} if steps else {}
    return [record for record in records if "eval_loss" in record], last


def restore_best(state: TrainState) -> None:
    """Take the adapter of the best checkpoint, if it is undamaged."""
    assert state.best is not None
    folder = state.stage.dir.path / f"checkpoint-{state.best[1]}"
    if (fault := manifest_fault(folder)) is not None:  # a finished run is not lost for it
        state.warnings.append(f"{folder.name}, the best, is damaged ({fault}); the adapter is the last step's.")
        logger.warning(state.warnings[-1])
        return
    _load_adapter(state.parameters, load_file(folder / TENSORS))
    logger.info(f"took the adapter of step {state.best[1]}, eval_loss {state.best[0]:.4f}")


def resume_point(stage: StageDir) -> Path | None:
    """The newest undamaged checkpoint, or None where there is none; damaged ones that are newer are deleted. One without a
    manifest, as early versions wrote them, is taken as it is.

    Raises:
        UserError: all are damaged; a run never starts from the beginning by itself.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(stage.checkpoints()):
        if (path / MANIFEST).is_file() and (fault := manifest_fault(path)) is not None:
            damaged[path] = fault
            continue
        for other, fault in damaged.items():
            logger.warning(f"{other.name}: {fault}; using {path.name}")
            remove_folder(other)
        return path
    if damaged:
        raise UserError(
            f"{stage.path}: all of its checkpoints are damaged: "
            f"{'; '.join(f'{path.name}: {fault}' for path, fault in damaged.items())}.",
            "Restore one of them from a copy, or delete them to train the stage from its beginning.",
        )
    return None


class MetricsLog:
    """``metrics.jsonl``: one JSON object per logged step; ``writes``: False in processes other than rank 0."""

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, record: dict[str, Any]) -> None:
        """Add a record: one line, one write. JSON has no NaN and no infinity: they become words."""
        if self.writes:
            record = dict(record)
            for key, value in record.items():
                if isinstance(value, float) and not math.isfinite(value):
                    record[key] = str(value)
            append_line(self.path, redact(json.dumps(record)))

    def flush(self) -> None:
        """Write the records to the disk, so that a checkpoint written next knows of no step that the log may lose."""
        if self.writes and self.path.exists():
            sync_file(self.path)

    def truncate(self, step: int, *, pending: bool = False) -> list[dict[str, Any]]:
        """Keep the records up to this step, and return them; a resumed run repeats the rest, and with ``pending`` this step's
        evaluation."""
        if not self.path.exists():
            return []
        kept: list[tuple[str, dict[str, Any]]] = []
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                if record["step"] < step or (record["step"] == step and not (pending and "eval_loss" in record)):
                    kept.append((line.decode(), record))
            except (ValueError, KeyError, TypeError):
                continue  # the torn last line of a killed run, or of a power failure
        if self.writes:
            with file_aside(self.path) as file:
                file.writelines(f"{line}\n" for line, _ in kept)
        return [record for _, record in kept]
