"""Checkpoints (safetensors, JSON and a manifest of both, complete or not there at all) and the metrics log."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError
from ..io.atomic import (
    append_line,
    check_room,
    file_aside,
    folder_aside,
    remove_folder,
    remove_tree,
    rename,
    sync_file,
    write_json,
)
from ..io.manifest import MANIFEST, manifest_fault, write_manifest
from ..io.redact import redact
from ..io.run_dir import StageDir, read_json
from ..io.safetensors import DTYPE_NAMES, SafetensorsFile, tensor_bytes, write_stream
from ..model.adapters import AdapterStack
from .optim import restore_state

TENSORS = "state.safetensors"
STATE = "state.json"
# what a damaged checkpoint is called until a new one is written
_TORN = ".torn-"
# of the disk, beside the tensors
SPARE_BYTES = 16 * 2**20


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
            stack,
            parameters,
            optimizer,
            scheduler,
            scaler,
        )

    def write(self, stage: StageDir, step: int, extra: dict[str, Any]) -> Path:
        """Write ``checkpoint-STEP``, tensor by tensor; it appears complete or not at all.

        Raises:
            UserError: the disk has too little room for it.
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
        size = sum(t.numel() * t.dtype.itemsize for t in tensors.values())
        check_room(stage.path, size + SPARE_BYTES, target.name)
        with folder_aside(target) as folder:
            digest = hashlib.sha256()
            write_stream(folder / TENSORS, header, put, digest=digest)
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
            write_manifest(folder, {TENSORS: digest.hexdigest()})
        return target

    def read(self, folder: Path) -> dict[str, Any]:
        """Put a checkpoint's state back; returns its JSON part. ``resume_point`` has compared its hashes.

        Raises:
            UserError: it does not belong to this adapter, or cannot be read.
        """
        state = read_json(folder / STATE)
        if (wrong := _wrong_state(state)) is not None:
            raise UserError(f"{folder}: {wrong}.", f"{folder.name} is damaged: start the same command again.")
        assert state is not None
        tensors = _tensors(folder)
        self._load_adapter(folder, tensors)
        self._load_optimizer(folder, tensors, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        return state

    def read_adapter(self, folder: Path) -> None:
        """Put back the adapter's weights alone.

        Raises:
            UserError: the checkpoint is damaged, or of another adapter.
        """
        if (wrong := checkpoint_fault(folder)) is not None:
            raise UserError(
                f"{folder}: {wrong}.",
                "Restore it from a copy, or set load_best_model_at_end=false to end with the last step's adapter.",
            )
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
            f"{folder / TENSORS}: cannot be read: {error}.", f"{folder.name} is damaged: start the same command again."
        ) from None


def checkpoint_fault(folder: Path, *, deep: bool = True) -> str | None:
    """What is wrong with a checkpoint, in words that follow its name; None: nothing.

    Args:
        deep: compare every byte's hash; False: sizes, and the shape of state.json.
    """
    if (folder / MANIFEST).exists():
        if (wrong := manifest_fault(folder, deep=deep)) is not None:
            return wrong
    else:  # an earlier version's: as good as can be known
        try:
            SafetensorsFile(folder / TENSORS)
        except UserError as error:
            return error.message.removeprefix(f"{folder}/").rstrip(".")
        except OSError as error:
            return f"{TENSORS} cannot be read ({error.strerror})"
    try:
        return _wrong_state(read_json(folder / STATE))
    except UserError as error:
        return error.message.removeprefix(f"{folder}/").rstrip(".")


def _wrong_state(state: dict[str, Any] | None) -> str | None:
    """What a checkpoint's state.json lacks of what one writes."""
    if state is None:
        return f"{STATE} is missing"
    best, optimizer = state.get("best"), state.get("optimizer")
    right = {
        "step": _count(state.get("step")),
        "total": _count(state.get("total", 0)),
        "stale": _count(state.get("stale", 0)),
        "best": best is None
        or (isinstance(best, list) and len(best) == 2 and isinstance(best[0], int | float) and _count(best[1])),
        "optimizer": isinstance(optimizer, dict)
        and isinstance(groups := optimizer.get("param_groups"), list)
        and all(isinstance(group, dict) for group in groups)
        and isinstance(plain := optimizer.get("plain"), dict)
        and all(isinstance(values, dict) for values in plain.values()),
        "scheduler": isinstance(state.get("scheduler"), dict),
        "scaler": isinstance(state.get("scaler"), dict),
    }
    wrong = [key for key, fits in right.items() if not fits]
    return f"{STATE} has not what a run writes at {wrong[0]}" if wrong else None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def resume_point(
    stage: StageDir, say: Callable[[str], None] = print, *, fault: Callable[[Path], str | None] = checkpoint_fault
) -> Path | None:
    """The newest checkpoint that is as it was written, or None where there is none at all. What is damaged is said, and put
    out of the way.

    Args:
        fault: what is wrong with a checkpoint (another engine's are made of other files).

    Raises:
        UserError: all are damaged; a run never starts from the beginning by itself.
    """
    torn: dict[Path, str] = {}
    for path in reversed(stage.checkpoints()):
        wrong = fault(path)
        if wrong is not None:
            torn[path] = wrong
            continue
        if not (path / MANIFEST).exists():
            say(f"{path.name}: has no {MANIFEST}, so an earlier version wrote it; its files can be read, and are taken")
        for other, what in torn.items():
            say(f"{other.name}: {what}; taking {path.name}")
            aside = other.with_name(_TORN + other.name)
            remove_tree(aside)
            rename(other, aside)  # or it would count as the newest
        return path
    if torn:
        raise UserError(
            f"{stage.path}: all of its checkpoints are damaged: "
            + "; ".join(f"{path.name}: {what}" for path, what in torn.items())
            + ".",
            "Restore one of them from a copy, or delete them to train the stage from its beginning.",
        )
    return None


def prune(stage: StageDir, *, keep: int, best: int | None, busy: frozenset[str] = frozenset()) -> None:
    """Delete the oldest checkpoints beyond ``keep``, and damaged ones; never the best, never the last good one, none whose
    name is in ``busy`` (it is being copied). Call it when a new one is complete.

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
    """metrics.jsonl: one JSON object a logged step.

    Args:
        writes: False in a process that only counts along.

    Attributes:
        count: records in the file, as far as ``truncate`` and ``append`` of this process know.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.count = 0

    def append(self, record: dict[str, Any]) -> None:
        """Add a record: one line, one write.

        Raises:
            OSError: it cannot be written.
        """
        if self.writes:
            append_line(self.path, redact(json.dumps({k: _finite(v) for k, v in record.items()})))
        self.count += 1

    def flush(self) -> None:
        """What was appended is on the disk, so that a checkpoint written next knows of no step that the log may lose."""
        if self.writes and self.path.exists():
            sync_file(self.path)

    def truncate(
        self, step: int, *, logged: int | None = None, pending: bool = False, say: Callable[[str], None] = print
    ) -> list[dict[str, Any]]:
        """Keep what was logged up to this step, and return it; a resumed run repeats the rest.

        Args:
            logged: how many records there were when the checkpoint was written; fewer are said.
            pending: this step's evaluation is still to be made; one that is there was made by a process that died before it
                wrote a checkpoint.
        """
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        kept: list[tuple[str, dict[str, Any]]] = []
        for line in lines:
            try:
                text = line.decode("utf-8")
                record = json.loads(text)
                if record["step"] < step or (record["step"] == step and not (pending and "eval_loss" in record)):
                    kept.append((text, record))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # the torn last line of a killed run, or what a power failure made of it
        self.count = len(kept)
        if logged is not None and len(kept) < logged:
            say(
                f"{self.path}: {logged - len(kept)} of the {logged} records up to step {step} are missing: it was damaged"
            )
        if lines and self.writes:
            with file_aside(self.path) as file:
                file.writelines(text + "\n" for text, _ in kept)
        return [record for _, record in kept]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
