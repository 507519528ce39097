"""Resuming a stage: its stage.json and config.yaml compared with the configuration, files and machine of now.

A change that gradients do not depend on is allowed and printed; any other is refused, with its old and new value.
"""

from __future__ import annotations

import datetime
import logging
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config.load import DPO_DEFAULTS, DatasetSpec, Loaded, Method, RunConfig
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, TO_GO_ON, StageDir, checked
from ..io.text import check_values
from ..memory.plan import Plan
from ..model.base import compute_device
from ..model.base_folder import fingerprint, is_fingerprint_of
from ..model.peft_io import AdapterFile
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


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def differences(what: str, then: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """A line for every key whose values differ; a key that ``then`` has not is passed over."""
    found = []
    for key in keys:
        values = [then.get(key), now.get(key, "absent")]
        if key in then and values[0] != values[1]:
            shown = [v[:12] if isinstance(v, str) and len(v) == 64 else v for v in values]  # a hash
            found.append(f"{what}{key} {shown[0]} then, {shown[1]} now")
    return found


class Comparison:
    """A stage on the disk, compared with what would resume it. Every difference is one line.

    A stage without a checkpoint starts again, with any configuration. Processes other than rank 0 resume what that has
    written just now, so their configuration is not compared. ``loaded.automatic`` keys take the stage's values, and so does
    ``precompute_ref_log_probs: auto``.

    Attributes:
        before: stage.json of a stage that can be resumed or is complete, or None.
        complete: the stage is finished.
        allowed: differences with which the stage continues.
        moved: of these, the keys that name a place, whose content is compared (``model``, ``rows``).
        refused: differences with which it does not.

    Raises:
        UserError: it is a stage of another method, or stage.json is not one that a run writes.
    """

    def __init__(self, stage: StageDir, loaded: Loaded, method: Method) -> None:
        self.stage = stage
        self.before = stage.info()
        self.complete = False
        self.allowed: list[str] = []
        self.moved: list[str] = []
        self.refused: list[str] = []
        if self.before is None:
            return
        main = world().is_main_process
        self.complete = main and self.before.get("status") == "complete"
        if main and not self.complete and not stage.checkpoints():
            self.before = None
            return
        checked(self.before, stage.path / STAGE_FILE, needs=TO_GO_ON)
        if self.before["method"] != method:
            raise UserError(
                f"{stage.path}: is a {self.before['method']} stage; this is {method}.",
                "Choose another stage or output_dir.",
            )
        # an earlier version may not have had a key: it did what the default does
        old = RunConfig.model_construct().model_dump(mode="json") | (DPO_DEFAULTS if method == "dpo" else {})
        old |= read_yaml(stage.config)
        kept = {key: old[key] for key in loaded.automatic}
        if loaded.config.precompute_ref_log_probs == "auto":
            key = "precompute_ref_log_probs"  # a loss without a reference has none: only loss_type is a difference then
            kept[key] = old[key] = loaded.config.needs_reference and old[key]
        self.config = loaded.config = RunConfig.model_validate({**loaded.config.model_dump(), **kept})
        values, hint = {"memory": old["memory"] or {}}, "Correct it, or remove it from the file."
        self.memory = check_values(RunConfig, values, stage.config, hint).memory
        if not main:
            return
        new = loaded.config.model_dump(mode="json")
        for key in ("dataset", "eval_dataset"):
            defaults = DatasetSpec.model_construct(path="").model_dump(mode="json")
            old[key] = [{**defaults, **spec} for spec in old[key] or []]
        old["memory"] = self.memory.model_dump(mode="json")
        if self.memory.int8 != loaded.config.memory.int8:
            self.refused.append(f"memory.compute: {old['memory']['compute']} then, {new['memory']['compute']} now")
        for key in {**new, **old}:
            if key == "output_dir" or (key in new and old[key] == new[key]):
                continue
            line = f"{key}: {_brief(old[key])} then, {_brief(new[key]) if key in new else 'no such key'} now"
            if key in ALLOWED:
                self.allowed.append(line)
            elif key in PLACES and (key != "dataset" or _but_for_paths(old[key]) == _but_for_paths(new[key])):
                self.allowed.append(line)
                self.moved.append(line)
            else:
                self.refused.append(line)

    def model(self, folder: Path, frozen: list[AdapterFile]) -> None:
        """Compare the base's weights and the adapters below with those that the stage was started on.

        Raises:
            UserError: something differs; the message has all of it.
        """
        if self.before is None:
            return
        base = self.before["base"]
        if not is_fingerprint_of(base["fingerprint"], folder):
            then, now = {"weights": base["fingerprint"]}, {"weights": fingerprint(folder)}
            self.refused += differences(f"base {base['name_or_path']}: ", then, now, now)
        # engine trl lists the adapters that it trains on separately
        links = (self.before.get("trl") or {}).get("continues") or self.before["adapters"]
        if [link.get("sha256") for link in links] != [adapter.sha256 for adapter in frozen]:
            told = [f"{link.get('path')} ({str(link.get('sha256'))[:12]})" for link in links]
            found = [f"{adapter.path} ({adapter.sha256[:12]})" for adapter in frozen]
            self.refused.append(f"adapters below: {', '.join(told) or 'none'} then, {', '.join(found) or 'none'} now")
        self.refuse()

    def rows(self, rows: dict[str, Any], held_out: dict[str, str] | None, told: dict[str, dict[str, Any]]) -> bool:
        """Compare rows, machine and libraries, and print what has changed.

        Args:
            rows: stage.json's ``data``, as it would be now.
            held_out: its ``eval_data``.
            told: ``machine_now`` and ``versions``.

        Returns:
            whether the evaluations so far used other held-out rows.
        """
        if self.before is None:
            return False
        then = self.before["data"]
        if then["fingerprint"] != rows["fingerprint"]:
            counted = [key for key, value in then.items() if isinstance(value, int | str)]
            self.refused += differences("data: ", then, rows, counted)
        if not world().is_main_process:  # rank 0 has written stage.json just now
            self.refused += differences("", self.before["machine"], told["machine"], ["dtype"])
        self.refuse()
        if self.complete:
            return False
        if self.allowed:
            logger.warning(f"changed since this stage was last worked on: {'; '.join(self.allowed)}")
        evaluated = self.before.get("eval_data")
        if forget_best := bool(evaluated) and evaluated != held_out:
            line = (
                "the held-out rows are others than before: evaluations of before do not count for the best checkpoint"
            )
            self.allowed.append(line)
            logger.warning(line)
        rounding = differences("", _last(self.before, "versions"), told["versions"], LIBRARIES)
        rounding += differences("", _last(self.before, "machine"), told["machine"], ROUNDS)
        if rounding:
            self.allowed += rounding
            logger.warning(
                f"{'; '.join(rounding)}: sums may round otherwise, so the end is not bit for bit that of an undisturbed run"
            )
        return forget_best

    def refuse(self) -> None:
        """Raise a UserError with all differences of ``refused``, if there are any."""
        if not self.refused:
            return
        began = "finished" if self.complete else "started"
        where = "" if world().is_main_process else f" ({platform.node()} has other files than the first process)"
        raise UserError(
            f"{self.stage.path}: was {began} with another configuration or on other files than these{where}:\n  "
            + "\n  ".join([*self.refused, *self.moved]),
            "Restore them, or choose another output_dir or stage.",
        )


def _brief(value: Any) -> str:
    """A key's value in a message; of data sets the path, and what is not the default."""
    if not value or not isinstance(value, list) or not all(isinstance(spec, dict) for spec in value):
        return repr(value)
    defaults = DatasetSpec.model_construct(path="").model_dump(mode="json")
    words = [[f"{key}={spec[key]}" for key in spec if spec[key] != defaults.get(key)] for spec in value]
    return " + ".join(" ".join(each).removeprefix("path=") for each in words)


def _but_for_paths(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in spec.items() if k not in ("path", "revision")} for spec in specs]


def kept_plan(compared: Comparison, machine: dict[str, Any], layers: int) -> Plan | None:
    """The plan in stage.json, which a resumed stage keeps: another split of its sums would change bits. None where the key
    ``memory`` or the kind of device has changed, and for a stage that begins.

    Raises:
        UserError: this version has no such plan, or it is for another number of layers.
    """
    before, stage = compared.before, compared.stage
    if before is None:
        return None
    if (
        compared.memory != compared.config.memory
        or _last(before, "machine").get("device", machine["device"]) != machine["device"]
    ):
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
