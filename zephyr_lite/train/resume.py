"""Resuming a stage: its stage.json and config.yaml compared with the configuration, files and machine of now.

A change that gradients do not depend on is allowed and printed; any other is refused, with its old and new value.
"""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..config.load import DPO_DEFAULTS, DatasetSpec, MemorySpec, Method, RunConfig
from ..config.strict_yaml import read_yaml
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..io.run_dir import FORMAT, STAGE_FILE, TO_GO_ON, StageDir, checked, text_sha256, tokenizer_sha256
from ..memory.plan import Plan
from ..model.base import compute_device, fingerprint, is_fingerprint_of
from ..model.peft_io import AdapterFile
from .checkpoint import checkpoint_fault
from .distributed import world

logger = logging.getLogger(__name__)

# keys that gradients do not depend on
ALLOWED = {
    "output_dir",
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
LIBRARIES = ("zephyr-lite", "python", "torch", "transformers", "peft", "bitsandbytes", "triton")
# of the machine
ROUNDS = ("device", "processor", "dtype", "processes")
OF_ENGINE = {"fused": (), "trl": ("trl",), "unsloth": ("trl", "unsloth")}
# numbers of stage.json's "data", as a message names them
COUNTS = {
    "read": "rows read",
    "kept": "kept",
    "rows": "rows to train on",
    "tokens": "tokens",
    "supervised": "supervised tokens",
    "longest": "tokens of the longest",
}
HASHES = {"template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}


class StageComplete(UserError):
    """The stage is finished. The command line prints it and exits with 0."""

    done = True


def stage_complete(stage: StageDir, info: dict[str, Any]) -> StageComplete:
    following = {"sft": "zephyr-lite dpo", "dpo": "zephyr-lite merge --out model/"}[info["method"]]
    return StageComplete(f"{stage.path} is complete already.", f"Next: {following}")


@dataclass
class Changes:
    """Differences between a stage and what would resume it, one line each.

    Attributes:
        allowed: the stage continues with them.
        refused: it does not.
        places: changed paths, by the content that decides about them: base, adapters, data.
        only_config: every refused difference is a key of the configuration.
        complete: the stage is finished.
    """

    allowed: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    places: dict[str, list[str]] = field(default_factory=dict)
    only_config: bool = True
    complete: bool = False

    def settle(self, content: str, difference: str | None) -> None:
        """Decide about the changed paths of a content: allowed if it is the same.

        Args:
            difference: how the content differs; None: it does not.
        """
        lines = self.places.pop(content, [])
        if difference is None:
            self.allowed += [f"{line} (the same content)" for line in lines]
        else:
            self.refused += [*lines, difference]
            self.only_config = False

    def refuse(self, stage: StageDir) -> None:
        """Raises:
        UserError: something was refused; the message has all of it.
        """
        if not self.refused:
            return
        if not world().writes:  # the process that writes has resumed the stage: this machine has other files
            raise UserError(
                f"{platform.node()}: has other files than the process that writes:\n  " + "\n  ".join(self.refused),
                "Give all machines the same base, data and versions of tokenizers and transformers.",
            )
        lines = [*self.refused, *(line for lines in self.places.values() for line in lines)]
        done = "finished" if self.complete else "started"
        what = f"{done} with another configuration" if self.only_config else f"{done} on something else than this"
        cure = "choose another output_dir or stage."
        raise UserError(
            f"{stage.path}: was {what}:\n  " + "\n  ".join(lines),
            f"To train with this one, {cure}"
            if self.complete
            else f"Restore what it was started with to resume it, or {cure}",
        )


def started_before(stage: StageDir, config: RunConfig, method: Method) -> tuple[dict[str, Any] | None, Changes]:
    """stage.json of a stage that can be resumed or is complete, and the changes of its configuration. None for a stage
    without a checkpoint: it starts again, with any configuration. Processes that do not write resume what the first has
    written just now.

    Raises:
        UserError: it is a stage of another method, or the file is not one that a run writes.
    """
    file = stage.path / STAGE_FILE
    info = stage.info()
    if info is None or not world().writes:
        return info, Changes()
    checked(info, file)
    if info.get("method", method) != method:
        raise UserError(
            f"{stage.path}: is a {info['method']} stage; this is {method}.", "Choose another stage or output_dir."
        )
    if info.get("status") != "complete" and not stage.checkpoints():
        return None, Changes()
    checked(info, file, needs=TO_GO_ON)
    changes = config_changes(stage, config, method)
    changes.complete = info.get("status") == "complete"
    return info, changes


def config_changes(stage: StageDir, config: RunConfig, method: Method) -> Changes:
    """The changes from the stage's config.yaml to a configuration."""
    old, new = read_yaml(stage.config), config.model_dump(mode="json")
    defaults = {**RunConfig.model_construct().model_dump(mode="json"), **(DPO_DEFAULTS if method == "dpo" else {})}
    changes = Changes()
    for key, now in new.items():
        # an earlier version may not have had the key: it did what the default does
        then = old.get(key, defaults.get(key))
        if key in ("dataset", "eval_dataset") and then:
            then = [{**DatasetSpec.model_construct(path="").model_dump(mode="json"), **spec} for spec in then]
        if then == now or key == "output_dir":
            continue
        line = f"{key}: {then!r} then, {now!r} now"
        if key in ALLOWED:
            changes.allowed.append(line)
        elif key in PLACES and (key != "dataset" or _but_for_paths(then) == _but_for_paths(now)):
            changes.places.setdefault(PLACES[key], []).append(line)
        else:
            changes.refused.append(line)
    changes.refused += [f"{key}: {old[key]!r} then, no such key now" for key in sorted(set(old) - set(new))]
    return changes


def _but_for_paths(specs: Any) -> Any:
    return [{k: v for k, v in spec.items() if k not in ("path", "revision")} for spec in specs or []]


def base_difference(before: dict[str, Any], folder: Path) -> str | None:
    """How the base's weights differ from those that the stage was started on."""
    base = before["base"]
    if is_fingerprint_of(base["fingerprint"], folder):
        return None
    return f"other weights of {base['name_or_path']}: {base['fingerprint'][:12]} then, {fingerprint(folder)[:12]} now"


def adapters_difference(before: dict[str, Any], frozen: list[AdapterFile]) -> str | None:
    """How the adapters below differ from those that the stage was started on."""
    # engine trl lists the adapters that it trains on separately
    links = (before.get("trl") or {}).get("continues") or before["adapters"]
    then = [(str(link.get("path")), str(link.get("sha256"))) for link in links]
    now = [(str(adapter.path), adapter.sha256) for adapter in frozen]
    if [sha for _, sha in then] == [sha for _, sha in now]:
        return None
    named = [", ".join(f"{path} ({sha[:12]})" for path, sha in adapters) or "none" for adapters in (then, now)]
    return f"an adapter below it was changed or replaced: {named[0]} then, {named[1]} now"


def data_info(data: TokenizedDataset, template: ChatTemplate) -> dict[str, Any]:
    """What stage.json keeps of the training rows: counts, and hashes of the rows, template and tokenizer."""
    return {
        **data.report.as_dict(),
        "fingerprint": data.fingerprint,
        "template_sha256": text_sha256(template.text),
        "tokenizer_sha256": tokenizer_sha256(template.tokenizer),
    }


def data_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How the rows (``data_info``) differ from those that the stage was started on; several lines."""
    then = before["data"]
    if then["fingerprint"] == now["fingerprint"]:
        return None
    lines = [
        f"{name}: {then[key]:,} then, {now[key]:,} now"
        for key, name in COUNTS.items()
        if isinstance(then.get(key), int) and then[key] != now[key]
    ]
    lines += [
        f"{name}: {str(then[key])[:12]} then, {str(now[key])[:12]} now"
        for key, name in HASHES.items()
        if key in then and then[key] != now[key]
    ]
    if not lines:
        hashes = f"{then['fingerprint'][:12]} then, {now['fingerprint'][:12]} now"
        lines = [f"as many rows and tokens, other content: {hashes}"]
    return "other rows than these:\n    " + "\n    ".join(lines)


def judged_on_other_rows(
    before: dict[str, Any], config: RunConfig, stage: StageDir, data: TokenizedDataset | None
) -> bool:
    """Whether the evaluations so far used other held-out rows than ``data``."""
    if "eval_data" in before:
        then = (before["eval_data"] or {}).get("fingerprint")
        return then is not None and then != (None if data is None else data.fingerprint)
    return bool(read_yaml(stage.config).get("eval_dataset") != config.model_dump(mode="json")["eval_dataset"])


def resumed_plan(
    stage: StageDir, before: dict[str, Any], config: RunConfig, machine: dict[str, Any], layers: int
) -> Plan | None:
    """The plan in stage.json, which a resumed stage keeps: another split of its sums would change bits. None where the key
    ``memory`` or the kind of device has changed.

    Args:
        layers: decoder layers of the base.

    Raises:
        UserError: this version has no such plan, or it is one of another model.
    """
    same_device = _last(before, "machine").get("device", machine["device"]) == machine["device"]
    if not same_device or MemorySpec.model_validate(read_yaml(stage.config).get("memory") or {}) != config.memory:
        why = "memory was changed" if same_device else "this is another kind of device"
        logger.info(f"{why}: from here on sums are split, and rounded, in another way")
        return None
    file = stage.path / STAGE_FILE
    hint = "Resume with the version that began the stage (the file names it), or choose another output_dir or stage."
    try:
        plan = Plan(**before["plan"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: its plan is none of this version's ({error}).", hint) from None
    if len(plan.keep) not in (0, layers):
        raise UserError(f"{file}: its plan is for {len(plan.keep)} layers, and the base has {layers}.", hint)
    for line in ("the plan is the one that the stage was started with", *plan.lines()):
        logger.info(line)
    if cores() < plan.threads:
        logger.info(f"it computes with {plan.threads} threads, and there are {cores()} cores here: it will be slower")
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


def cores() -> int:
    """CPU cores that this process may use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // world().local_size)


def _last(before: dict[str, Any], key: str) -> dict[str, Any]:
    """``key`` of the latest process that worked on the stage."""
    for entry in reversed(before.get("resumed") or []):
        if isinstance(entry.get(key), dict):
            return dict(entry[key])
    return dict(before.get(key) or {})


def report_changes(
    changes: Changes,
    before: dict[str, Any],
    libraries: dict[str, str],
    machine: dict[str, Any],
    engine: str,
    forget_best: bool,
) -> None:
    """Print what changed since the stage was last worked on, and add libraries and machine to ``changes.allowed``.

    Args:
        libraries, machine: ``versions`` and ``machine_now``.
        forget_best: ``judged_on_other_rows``.

    Raises:
        UserError: this process would compute in another dtype than the one that writes.
    """
    if changes.allowed:
        logger.warning(f"changed since this stage was last worked on: {'; '.join(changes.allowed)}")
    if forget_best:
        line = "the held-out rows are others than before: evaluations of before do not count for the best checkpoint"
        changes.allowed.append(line)
        logger.info(line)
    then, first = _last(before, "versions"), _last(before, "machine")
    if not world().writes and first["dtype"] != machine["dtype"]:
        raise UserError(
            f"{machine['host']}: {machine['processor']} would compute in {machine['dtype']}, the first process in "
            f"{first['dtype']}.",
            "Name one that all cards have: dtype=float16.",
        )
    names = (*LIBRARIES, *OF_ENGINE[engine]) if then else ()
    pairs = [(name, _release(name, then), _release(name, libraries)) for name in names]
    pairs += [(key, first[key], machine[key]) for key in ROUNDS if key in first]
    if rounding := [f"{name} {old} then, {new} now" for name, old, new in pairs if old != new]:
        changes.allowed += rounding
        logger.info(
            f"{'; '.join(rounding)}: sums may round otherwise, so the end is not bit for bit that of an undisturbed run"
        )


def _release(name: str, versions: dict[str, str]) -> str:
    """The version of a library, as far as it matters for rounding."""
    found = versions.get(name, "absent")
    return ".".join(found.split(".")[:2]) if name == "python" else found


def resumed_info(
    before: dict[str, Any],
    stage: StageDir,
    base: dict[str, Any],
    links: list[dict[str, str]],
    resumed: dict[str, Any],
) -> dict[str, Any]:
    """stage.json of a resumed stage: the paths of base and adapters are those of now, and ``resumed`` has one more entry.

    Args:
        base: ``Base.describe``.
        links: path and sha256 of the adapters below.
        resumed: the new entry, but for its step.
    """
    info = {**before, "format": FORMAT, "resumed": list(before.get("resumed") or [])}
    info["base"] = {**info["base"], "name_or_path": base["name_or_path"], "revision": base["revision"]}
    if (info.get("trl") or {}).get("continues"):
        info["trl"] = {**info["trl"], "continues": links}
    else:
        info["adapters"] = links
    # only sizes are compared here; the loop compares hashes
    whole = [path for path in stage.checkpoints() if checkpoint_fault(path, deep=False) is None]
    step = int(whole[-1].name.split("-")[1]) if whole else 0
    info["resumed"].append({"step": step, **resumed})
    return info
