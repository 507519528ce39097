"""Resuming a stage: its stage.json and config.yaml compared with the configuration, files and machine of now.

A change that gradients do not depend on is allowed and printed; any other is refused, with its old and new value.
"""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config.load import DPO_DEFAULTS, DatasetSpec, MemorySpec, Method, RunConfig
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, TO_GO_ON, StageDir, checked
from ..memory.plan import Plan
from ..model.base import compute_device, fingerprint, is_fingerprint_of
from ..model.peft_io import AdapterFile
from .distributed import world

logger = logging.getLogger(__name__)

# keys that gradients do not depend on
ALLOWED = {
    "eval_dataset",
    "eval_steps",
    "save_steps",
    "logging_steps",
    "save_total_limit",
    "load_best_model_at_end",
    "early_stopping_patience",
    "samples",
    "sample_tokens",
    "report_to",
    "push_to_hub",
    "hub_private_repo",
    "sync",
    "memory",
}
# keys that name a place: key → the content that has to be the same
PLACES = {
    "model_name_or_path": "base",
    "model_revision": "base",
    "adapters": "adapters",
    "dataset": "data",
    "chat_template": "data",
}
# another version of these may sum in another order
LIBRARIES = ("zephyr-lite", "python", "torch", "transformers", "peft", "bitsandbytes", "triton", "trl", "unsloth")
# of the machine
ROUNDS = ("device", "processor", "dtype", "processes")


class StageComplete(UserError):
    """The stage is finished. The command line prints it and exits with 0."""

    done = True


def stage_complete(stage: StageDir, info: dict[str, Any]) -> StageComplete:
    following = {"sft": "zephyr-lite dpo", "dpo": "zephyr-lite merge --out model/"}[info["method"]]
    return StageComplete(f"{stage.path} is complete already.", f"Next: {following}")


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str], prefix: str = "") -> list[str]:
    """A line for every key whose values differ; a key that ``then`` has not is passed over."""

    def shown(value: Any) -> Any:
        return value[:12] if isinstance(value, str) and len(value) == 64 else value  # a hash

    return [
        f"{prefix}{key} {shown(then[key])} then, {shown(now.get(key, 'absent'))} now"
        for key in keys
        if key in then and then[key] != now.get(key, "absent")
    ]


@dataclass
class Changes:
    """Differences between a stage and what would resume it, one line each.

    Attributes:
        complete: the stage is finished.
        allowed: the stage continues with them.
        refused: it does not.
        moved: changed paths, by the content that decides about them: base, adapters, data.
    """

    complete: bool = False
    allowed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    moved: dict[str, list[str]] = field(default_factory=dict)

    def settle(self, content: str, found: list[str]) -> None:
        """Decide about the changed paths of a content: allowed if it is the same.

        Args:
            found: how the content differs, one line each.
        """
        lines = self.moved.pop(content, [])
        if found:
            self.refused += [*lines, *found]
        else:
            self.allowed += [f"{line} (the same content)" for line in lines]

    def refuse(self, stage: StageDir) -> None:
        """Raises:
        UserError: something was refused; the message has all of it.
        """
        if self.refused:
            lines = [*self.refused, *(line for lines in self.moved.values() for line in lines)]
            where = "" if world().is_main_process else f" ({platform.node()} has other files than the first process)"
            raise UserError(
                f"{stage.path}: was {'finished' if self.complete else 'started'} with another configuration or on other files "
                f"than these{where}:\n  " + "\n  ".join(lines),
                "Restore them, or choose another output_dir or stage.",
            )


def started_before(stage: StageDir, config: RunConfig, method: Method) -> tuple[dict[str, Any] | None, Changes]:
    """stage.json of a stage that can be resumed or is complete, and the changes of its configuration. None for a stage
    without a checkpoint: it starts again, with any configuration. Processes other than rank 0 resume what that has written
    just now.

    Raises:
        UserError: it is a stage of another method, or the file is not one that a run writes.
    """
    info = stage.info()
    if info is None or not world().is_main_process:
        return info, Changes()
    changes = Changes(complete=info.get("status") == "complete")
    if not changes.complete and not stage.checkpoints():
        return None, changes
    checked(info, stage.path / STAGE_FILE, needs=TO_GO_ON)
    if info["method"] != method:
        raise UserError(
            f"{stage.path}: is a {info['method']} stage; this is {method}.", "Choose another stage or output_dir."
        )
    old, new = read_yaml(stage.config), config.model_dump(mode="json")
    # an earlier version may not have had a key: it did what the default does
    old = {**RunConfig.model_construct().model_dump(mode="json"), **(DPO_DEFAULTS if method == "dpo" else {}), **old}
    for key in ("dataset", "eval_dataset"):
        defaults = DatasetSpec.model_construct(path="").model_dump(mode="json")
        old[key] = [{**defaults, **spec} for spec in old[key] or []]
    for key in sorted(old.keys() - {"output_dir"}, key=[*new, *old].index):
        if key in new and old[key] == new[key]:
            continue
        line = f"{key}: {old[key]!r} then, {repr(new[key]) if key in new else 'no such key'} now"
        if key in ALLOWED:
            changes.allowed.append(line)
        elif key in PLACES and (key != "dataset" or _but_for_paths(old[key]) == _but_for_paths(new[key])):
            changes.moved.setdefault(PLACES[key], []).append(line)
        else:
            changes.refused.append(line)
    return info, changes


def _but_for_paths(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in spec.items() if k not in ("path", "revision")} for spec in specs]


def compare_model(changes: Changes, before: dict[str, Any], folder: Path, frozen: list[AdapterFile]) -> None:
    """Compare the base's weights and the adapters below with those that the stage was started on."""
    base = before["base"]
    same = is_fingerprint_of(base["fingerprint"], folder)
    weights = {} if same else {"weights": fingerprint(folder)}
    changes.settle(
        "base", differences({"weights": base["fingerprint"]}, weights, weights, f"base {base['name_or_path']}: ")
    )
    # engine trl lists the adapters that it trains on separately
    links = (before.get("trl") or {}).get("continues") or before["adapters"]
    then = [(str(link.get("path")), str(link.get("sha256"))) for link in links]
    now = [(str(adapter.path), adapter.sha256) for adapter in frozen]
    named = [", ".join(f"{path} ({sha[:12]})" for path, sha in adapters) or "none" for adapters in (then, now)]
    differ = [sha for _, sha in then] != [sha for _, sha in now]
    changes.settle("adapters", [f"adapters below: {named[0]} then, {named[1]} now"] if differ else [])


def report_changes(
    changes: Changes, before: dict[str, Any], libraries: dict[str, str], machine: dict[str, Any], eval_data: str | None
) -> bool:
    """Print what changed since the stage was last worked on, and add libraries and machine to ``changes.allowed``.

    Args:
        libraries, machine: ``versions`` and ``machine_now``.
        eval_data: the fingerprint of the held-out rows.

    Returns:
        whether the evaluations so far used other held-out rows.
    """
    if changes.allowed:
        logger.warning(f"changed since this stage was last worked on: {'; '.join(changes.allowed)}")
    then = (before.get("eval_data") or {}).get("fingerprint")
    if forget_best := then is not None and then != eval_data:
        line = "the held-out rows are others than before: evaluations of before do not count for the best checkpoint"
        changes.allowed.append(line)
        logger.warning(line)
    rounding = differences(_last(before, "versions"), libraries, LIBRARIES)
    rounding += differences(_last(before, "machine"), machine, ROUNDS)
    if rounding:
        changes.allowed += rounding
        logger.warning(
            f"{'; '.join(rounding)}: sums may round otherwise, so the end is not bit for bit that of an undisturbed run"
        )
    return forget_best


def kept_plan(
    before: dict[str, Any], stage: StageDir, config: RunConfig, machine: dict[str, Any], layers: int
) -> Plan | None:
    """The plan in stage.json, which a resumed stage keeps: another split of its sums would change bits. None where the key
    ``memory`` or the kind of device has changed.

    Raises:
        UserError: this version has no such plan, or it is for another number of layers.
    """
    memory = MemorySpec.model_validate(read_yaml(stage.config).get("memory") or {})
    if memory != config.memory or _last(before, "machine").get("device", machine["device"]) != machine["device"]:
        logger.info("memory or the kind of device has changed: a new plan splits sums, and rounds them, in another way")
        return None
    try:
        plan = Plan(**before["plan"])
        if len(plan.keep) not in (0, layers):
            raise TypeError(f"it is for {len(plan.keep)} layers, and the base has {layers}")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{stage.path / STAGE_FILE}: its plan is none of this version's ({error}).",
            "Resume with the version that began the stage (the file names it), or choose another output_dir or stage.",
        ) from None
    for line in ("the plan is the one that the stage was started with", *plan.lines()):
        logger.info(line)
    return plan


def versions() -> dict[str, str]:
    """Versions of this kit, Python and the libraries that compute."""
    result = {"zephyr-lite": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "trl", "triton", "unsloth"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def machine_now(dtype: torch.dtype) -> dict[str, Any]:
    """The properties of this machine that decide how sums are rounded."""
    device = compute_device()
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "host": platform.node(),
        "device": device.type,
        "processor": card,
        "dtype": str(dtype).removeprefix("torch."),
        "processes": world().size,
    }


def _last(before: dict[str, Any], key: str) -> dict[str, Any]:
    """``key`` of the latest process that worked on the stage."""
    return next((entry[key] for entry in reversed(before.get("resumed") or []) if key in entry), before.get(key) or {})
