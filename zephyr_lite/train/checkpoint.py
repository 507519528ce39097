"""Checkpoints (safetensors, JSON and a manifest of both; complete or absent) and the metrics log."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
    remove_tree,
    sync_file,
    write_json,
    write_manifest,
)
from ..io.redact import redact
from ..io.run_dir import StageDir, read_json
from ..io.safetensors import DTYPE_NAMES, SafetensorsFile, tensor_bytes, write_stream
from .optim import restore_state

logger = logging.getLogger(__name__)

TENSORS = "state.safetensors"
STATE = "state.json"
# prefix of a damaged checkpoint until a new one is written
_TORN = ".torn-"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to resume bit for bit.

    Dropout and the order of rows are functions of (seed, step), so there is no state of a generator to keep.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler

    def write(self, stage: StageDir, step: int, extra: dict[str, Any]) -> Path:
        """Write ``checkpoint-STEP``, tensor by tensor; it appears complete or not at all.

        Args:
            extra: more keys of its ``state.json``.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {f"adapter.{name}": p.detach() for name, p in self.parameters.items()}
        plain: dict[str, dict[str, Any]] = {}
        names = list(self.parameters)
        optimizer = self.optimizer.state_dict()
        for index, state in optimizer["state"].items():
            for key, value in _flat(state):
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{names[index]}"] = value.detach()
                else:
                    plain.setdefault(key, {})[names[index]] = value
        # the largest items first, so that every tensor is aligned to its own
        order = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
        header = {name: (DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in order}

        def put(name: str, out: BinaryIO) -> None:
            out.write(tensor_bytes(tensors[name].cpu()))

        target = stage.path / f"checkpoint-{step}"
        with folder_aside(target) as folder:
            write_stream(folder / TENSORS, header, put)
            state = {
                "step": step,
                **extra,
                "optimizer": {"plain": plain, "param_groups": optimizer["param_groups"]},
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            write_json(folder / STATE, state)
            write_manifest(folder)
        return target

    def read(self, folder: Path) -> dict[str, Any]:
        """Restore a checkpoint that ``resume_point`` has found undamaged; returns its ``state.json``.

        Raises:
            UserError: it holds another optimizer's state.
        """
        state = read_json(folder / STATE)
        assert state is not None
        tensors = load_file(folder / TENSORS)
        self._load_adapter(tensors)
        restored: dict[str, dict[str, Any]] = {name: {} for name in self.parameters}
        for full, tensor in tensors.items():
            if full.startswith("optimizer."):
                key, name = full.removeprefix("optimizer.").split(".", 1)
                restored[name][_inner(key)] = tensor
        for key, values in state["optimizer"]["plain"].items():
            for name, value in values.items():
                restored[name][_inner(key)] = value
        try:
            restore_state(self.optimizer, list(restored.values()), state["optimizer"]["param_groups"])
        except ValueError as error:
            raise UserError(
                f"{folder}: holds another optimizer's state than this run's ({error}).",
                "Resume with the optim and on the kind of device that the run was started with, or choose another "
                "output_dir.",
            ) from None
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state

    def read_adapter(self, folder: Path) -> None:
        """Restore the adapter's weights alone, from a checkpoint without a fault."""
        self._load_adapter(load_file(folder / TENSORS))

    def _load_adapter(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                found = tensors[f"adapter.{name}"]
                assert found.shape == parameter.shape, (
                    f"{name}: {found.shape} in the checkpoint, {parameter.shape} here"
                )
                parameter.copy_(found)


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


def checkpoint_fault(folder: Path, *, deep: bool = True) -> str | None:
    """The damage of a checkpoint, in words that follow its name; None: there is none.

    Args:
        deep: compare every file's hash; False: sizes only.
    """
    if (folder / MANIFEST).exists():
        if (wrong := manifest_fault(folder, deep=deep)) is not None:
            return wrong
    else:  # an earlier version's
        try:
            SafetensorsFile(folder / TENSORS)
            read_json(folder / STATE)
        except (UserError, OSError) as error:
            return str(error).split("\n")[0].removeprefix(f"{folder}/").rstrip(".")
    return None if (folder / STATE).is_file() else f"{STATE} is missing"


def resume_point(stage: StageDir, *, fault: Callable[[Path], str | None] = checkpoint_fault) -> Path | None:
    """The newest undamaged checkpoint, or None where there is no checkpoint. Damaged ones are reported and moved aside.

    Args:
        fault: the damage of a checkpoint (other engines' have other files).

    Raises:
        UserError: all are damaged; a run never starts from the beginning by itself.
    """
    torn: dict[Path, str] = {}
    for path in reversed(stage.checkpoints()):
        if (wrong := fault(path)) is not None:
            torn[path] = wrong
            continue
        if not (path / MANIFEST).exists():
            logger.info(
                f"{path.name}: has no {MANIFEST}, an earlier version wrote it; its files can be read, and are used"
            )
        for other, what in torn.items():
            logger.info(f"{other.name}: {what}; using {path.name}")
            aside = other.with_name(_TORN + other.name)
            remove_tree(aside)
            os.replace(other, aside)  # or it would count as the newest
        return path
    if torn:
        damage = "; ".join(f"{path.name}: {what}" for path, what in torn.items())
        raise UserError(
            f"{stage.path}: all of its checkpoints are damaged: {damage}.",
            "Restore one of them from a copy, or delete them to train the stage from its beginning.",
        )
    return None


def prune(stage: StageDir, *, keep: int, best: int | None, busy: frozenset[str] = frozenset()) -> None:
    """Delete the oldest checkpoints beyond ``keep``, and damaged ones; never the best, the last good one, or one in ``busy``
    (it is being copied). Call it when a new one is complete.

    Raises:
        OSError: one cannot be renamed.
    """
    faults = {path: checkpoint_fault(path, deep=False) for path in stage.checkpoints()}
    good = [path for path, wrong in faults.items() if wrong is None]
    if not good:
        return
    stay = busy | {good[-1].name, f"checkpoint-{best}"}
    spare = [path for path in good if path.name not in stay][: max(0, len(good) - keep)]
    damaged = [path for path, wrong in faults.items() if wrong is not None and path.name not in stay]
    for path in [*spare, *damaged, *stage.path.glob(f"{_TORN}checkpoint-*")]:
        remove_folder(path)


class MetricsLog:
    """``metrics.jsonl``: one JSON object per logged step.

    Args:
        writes: False in processes other than rank 0.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes

    def append(self, record: dict[str, Any]) -> None:
        """Add a record: one line, one write.

        Raises:
            OSError: it cannot be written.
        """
        if self.writes:
            append_line(self.path, redact(json.dumps({k: _finite(v) for k, v in record.items()})))

    def flush(self) -> None:
        """Write the records to the disk, so that a checkpoint written next knows of no step that the log may lose."""
        if self.writes and self.path.exists():
            sync_file(self.path)

    def truncate(self, step: int, *, pending: bool = False) -> list[dict[str, Any]]:
        """Keep the records up to this step, and return them; a resumed run repeats the rest.

        Args:
            pending: this step's evaluation will be repeated, so one that is there is removed.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        kept: list[tuple[str, dict[str, Any]]] = []
        for line in lines:
            try:
                text = line.decode("utf-8")
                record = json.loads(text)
                if record["step"] < step or (record["step"] == step and not (pending and "eval_loss" in record)):
                    kept.append((text, record))
            except (ValueError, KeyError, TypeError):
                continue  # the torn last line of a killed run, or of a power failure
        if lines and self.writes:
            with file_aside(self.path) as file:
                file.writelines(text + "\n" for text, _ in kept)
        return [record for _, record in kept]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
