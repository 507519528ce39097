"""Resuming a stage: its stage.json and config.yaml compared with the configuration, files and machine of now.

A change that gradients do not depend on is allowed and printed; any other is refused, with its old and new value.
"""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from .. import __version__
from ..config.load import DPO_DEFAULTS, Loaded, Method, RunConfig
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, TO_GO_ON, StageDir, checked
from ..io.text import check_values
from ..memory.plan import Plan
from ..model.base import compute_device
from ..model.base_folder import fingerprint, is_fingerprint_of
from .distributed import world

logger = logging.getLogger(__name__)

# keys that gradients do not depend on, memory.compute aside
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
# keys that name a place: what is there has to be the same
PLACES = {"model_name_or_path", "model_revision", "adapters", "dataset", "chat_template"}
# another version of these may sum in another order
LIBRARIES = ("zephyr-lite", "python", "torch", "transformers", "peft", "bitsandbytes", "triton", "trl", "unsloth")
# of the machine
ROUNDS = ("device", "processor", "dtype", "processes")


class StageComplete(UserError):
    """The stage is finished. The command line prints it and exits with 0."""

    done = True

    def __init__(self, stage: StageDir) -> None:
        super().__init__(f"{stage.path} is complete already.")


def utc_now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def compare_config(stage: StageDir, loaded: Loaded, method: Method) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Compare config.yaml of a stage on the disk with the configuration that would resume it.

    A stage without a checkpoint starts again, with any configuration. Processes other than rank 0 resume what that has
    written just now. ``loaded.automatic`` keys take the stage's values, and so does ``precompute_ref_log_probs: auto``.

    Returns:
        stage.json, None of a stage that starts; a line for each key that has changed.

    Raises:
        StageComplete: the stage is finished.
        UserError: it cannot be resumed with this configuration, or is a stage of another method.
    """
    before, main = stage.info(), world().is_main_process
    if before is None:
        return None, {}
    complete = before.get("status") == "complete"
    if main and not complete and not stage.checkpoints():
        return None, {}
    checked(before, stage.path / STAGE_FILE, needs=TO_GO_ON)
    if before["method"] != method:
        raise UserError(
            f"{stage.path}: is a {before['method']} stage; this is {method}.", "Choose another stage or output_dir."
        )
    # an earlier version may not have had a key: it did what the default does
    values = (DPO_DEFAULTS if method == "dpo" else {}) | read_yaml(stage.config)
    old = check_values(RunConfig, values, stage.config, "Correct it, or remove it from the file.")
    kept = {key: getattr(old, key) for key in loaded.automatic}
    new = RunConfig.model_validate({**loaded.config.model_dump(), **kept})
    if new.precompute_ref_log_probs == "auto":
        new = new.model_copy(update={"precompute_ref_log_probs": old.precompute_ref_log_probs})
    loaded.config = new
    if not main:
        return before, {}
    changed = {
        key: f"{key}: {_brief(getattr(old, key))} then, {_brief(getattr(new, key))} now"
        for key in RunConfig.model_fields
        if key != "output_dir" and getattr(old, key) != getattr(new, key)
    }
    if refused := [line for key, line in changed.items() if not _may_change(key, getattr(old, key), getattr(new, key))]:
        raise _refusal(stage, before, [*refused, *_moved(changed)])
    if complete and not _moved(changed):
        raise StageComplete(stage)
    return before, changed


def compare_files(
    stage: StageDir, before: dict[str, Any], changed: dict[str, str], folder: Path, now: dict[str, Any]
) -> list[str]:
    """Compare a stage's base, adapters, rows, machine and libraries with those of now, and print what has changed.

    Args:
        before, changed: of ``compare_config``.
        folder: the base's.
        now: stage.json's ``adapters``, ``data``, ``eval_data``, ``machine`` and ``versions`` as they would be now.

    Returns:
        the lines that were printed.

    Raises:
        StageComplete: the stage is finished.
        UserError: base, adapters or rows differ.
    """
    base, refused = before["base"], []
    if not is_fingerprint_of(base["fingerprint"], folder):
        weights = {"weights": base["fingerprint"]}, {"weights": fingerprint(folder)}
        refused += _differences(f"base {base['name_or_path']}: ", *weights, ["weights"])
    # engine trl lists the adapters that it trains on separately
    links = (before.get("trl") or {}).get("continues") or before["adapters"]
    if [link.get("sha256") for link in links] != [link["sha256"] for link in now["adapters"]]:
        told, found = (
            ", ".join(f"{link.get('path')} ({str(link.get('sha256'))[:12]})" for link in each) or "none"
            for each in (links, now["adapters"])
        )
        refused.append(f"adapters below: {told} then, {found} now")
    if before["data"]["fingerprint"] != now["data"]["fingerprint"]:
        counted = [key for key, value in before["data"].items() if isinstance(value, int | str)]
        refused += _differences("data: ", before["data"], now["data"], counted)
    if not world().is_main_process:  # rank 0 has written stage.json just now
        refused += _differences("", before["machine"], now["machine"], ["dtype"])
    if refused:
        raise _refusal(stage, before, [*refused, *_moved(changed)])
    if before.get("status") == "complete":
        raise StageComplete(stage)
    lines = [*changed.values()]
    if lines:
        logger.warning(f"changed since this stage was last worked on: {'; '.join(lines)}")
    if other_rows_held_out(before, now):
        lines.append(
            "the held-out rows are others than before: evaluations of before do not count for the best checkpoint"
        )
        logger.warning(lines[-1])
    rounding = _differences("", _last(before, "versions"), now["versions"], LIBRARIES)
    rounding += _differences("", _last(before, "machine"), now["machine"], ROUNDS)
    if rounding:
        logger.warning(
            f"{'; '.join(rounding)}: sums may round otherwise, so the end is not bit for bit that of an undisturbed run"
        )
    return lines + rounding


def other_rows_held_out(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the evaluations so far used other held-out rows."""
    return bool(before.get("eval_data")) and before["eval_data"] != now["eval_data"]


def _may_change(key: str, then: Any, now: Any) -> bool:
    """Whether a stage can be resumed with another value of a key."""
    if key == "memory":
        return bool(then.int8 == now.int8)
    if key == "dataset":  # its places
        then, now = ([spec.model_copy(update={"path": "", "revision": None}) for spec in each] for each in (then, now))
        return bool(then == now)
    return key in ALLOWED | PLACES


def _moved(changed: dict[str, str]) -> list[str]:
    return [line for key, line in changed.items() if key in PLACES]


def _differences(what: str, then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """A line for every key whose values differ; a key that ``then`` has not is passed over."""
    found = []
    for key in keys:
        values = [then.get(key), now.get(key, "absent")]
        if key in then and values[0] != values[1]:
            shown = [v[:12] if isinstance(v, str) and len(v) == 64 else v for v in values]  # a hash
            found.append(f"{what}{key} {shown[0]} then, {shown[1]} now")
    return found


def _refusal(stage: StageDir, before: dict[str, Any], lines: list[str]) -> UserError:
    began = "finished" if before.get("status") == "complete" else "started"
    where = "" if world().is_main_process else f" ({platform.node()} has other files than the first process)"
    return UserError(
        f"{stage.path}: was {began} with another configuration or on other files than these{where}:\n  "
        + "\n  ".join(lines),
        "Restore them, or choose another output_dir or stage.",
    )


def _brief(value: Any) -> str:
    """A key's value in a message; of data sets the path, and what is not the default."""
    if isinstance(value, BaseModel):
        words = [f"{key}={each}" for key, each in value.model_dump(exclude_defaults=True).items()]
        return " ".join(words).removeprefix("path=") or "auto"
    if value and isinstance(value, list) and isinstance(value[0], BaseModel):
        return " + ".join(map(_brief, value))
    return repr(value)


def kept_plan(before: dict[str, Any], changed: dict[str, str], device: str) -> Plan | None:
    """The plan in stage.json, which a resumed stage keeps: another split of its sums would change bits. None where the key
    ``memory``, the kind of device or the version has changed."""
    with suppress(KeyError, TypeError):  # the plan of another version
        if "memory" not in changed and _last(before, "machine").get("device", device) == device:
            plan = Plan(**before["plan"])
            for line in ("the plan is the one that the stage was started with", *plan.lines()):
                logger.info(line)
            return plan
    logger.info(
        "memory, the kind of device or the version has changed: a new plan splits sums, and rounds them, in another way"
    )
    return None


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
