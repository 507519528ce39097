"""A stage that goes on, and what is not as it was: what may differ is said, what may not is refused, old and new shown."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config.load import DPO_DEFAULTS, DatasetSpec, MemorySpec, Method, RunConfig, read_dumped
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..io.manifest import MANIFEST, manifest_fault
from ..io.run_dir import StageDir
from ..io.stage_info import text_sha256, tokenizer_sha256
from ..model.base import compute_device, fingerprint, is_fingerprint_of
from ..model.peft_io import AdapterFile
from .distributed import world

# what may differ when a stage goes on: nothing that a gradient depends on
MAY_CHANGE = {
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
# where something lies, which may differ as long as it is the same thing
PLACES = {
    "model_name_or_path": "base",
    "model_revision": "base",
    "adapters": "adapters",
    "dataset": "data",
    "chat_template": "data",
}
# what rounds: another version of these may sum in another order
LIBRARIES = ("zephyr-lite", "python", "torch", "transformers", "peft", "bitsandbytes", "triton")
OF_ENGINE = {"fused": (), "trl": ("trl",), "unsloth": ("trl", "unsloth")}


@dataclass
class Changes:
    """Lines of what is not as it was.

    Attributes:
        refused: what a stage cannot go on with.
        said: what it goes on with.
        open: places that changed, by what decides whether that matters: base, adapters, data.
        only_config: whether everything refused is a key of the configuration.
    """

    refused: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    open: dict[str, list[str]] = field(default_factory=dict)
    only_config: bool = True

    def settle(self, what: str, difference: str | None) -> None:
        """Decide on places of one kind: with the same content they may differ.

        Args:
            difference: how the content differs; None: it does not.
        """
        lines = self.open.pop(what, [])
        if difference is None:
            self.said += [f"{line} (the same content)" for line in lines]
        else:
            self.refused += [*lines, difference]
            self.only_config = False

    def refuse(self, stage: StageDir, *, complete: bool) -> None:
        """Raises:
        UserError: something was refused; names all of it.
        """
        lines = [*self.refused, *(line for lines in self.open.values() for line in lines)] if self.refused else []
        if not lines:
            return
        done = "finished" if complete else "started"
        what = f"{done} with another configuration" if self.only_config else f"{done} on something else than this"
        cure = "choose another output_dir or stage."
        raise UserError(
            f"{stage.path}: was {what}:\n  " + "\n  ".join(lines),
            f"To train with this one, {cure}" if complete else f"Go back to what it was to go on, or {cure}",
        )


def config_then(stage: StageDir) -> dict[str, Any]:
    """The configuration that the stage was started with, or last went on with.

    Raises:
        UserError: the file is gone or broken.
    """
    if not stage.config.is_file():
        raise UserError(
            f"{stage.config}: is missing, so nobody knows with which configuration the stage was started.",
            "Restore the file, or choose another output_dir or stage.",
        )
    then = read_dumped(stage.config)
    if missing := sorted({"model_name_or_path", "dataset", "seed"} - set(then)):
        raise UserError(
            f"{stage.config}: has no {missing[0]}, which every run writes: it is not the whole of the file.",
            "Restore the file, or choose another output_dir or stage.",
        )
    return then


def config_changes(stage: StageDir, config: RunConfig, method: Method) -> Changes:
    """The configuration of now against that of then."""
    old, new = config_then(stage), config.model_dump(mode="json")
    defaults = {**RunConfig.model_construct().model_dump(mode="json"), **(DPO_DEFAULTS if method == "dpo" else {})}
    changes = Changes()
    for key, now in new.items():
        # a key that an earlier version did not have means what its default does
        then = old.get(key, defaults.get(key))
        if key in ("dataset", "eval_dataset") and then:
            then = [{**DatasetSpec.model_construct(path="").model_dump(mode="json"), **spec} for spec in then]
        if then == now or key == "output_dir":
            continue
        line = f"{key}: {then!r} then, {now!r} now"
        if key in MAY_CHANGE:
            changes.said.append(line)
        elif key in PLACES and (key != "dataset" or _but_for_paths(then) == _but_for_paths(now)):
            changes.open.setdefault(PLACES[key], []).append(line)
        else:
            changes.refused.append(line)
    changes.refused += [f"{key}: {old[key]!r} then, no such key now" for key in sorted(set(old) - set(new))]
    return changes


def _but_for_paths(specs: Any) -> Any:
    if not isinstance(specs, list):
        return specs
    return [
        {k: v for k, v in spec.items() if k not in ("path", "revision")} if isinstance(spec, dict) else spec
        for spec in specs
    ]


def base_difference(before: dict[str, Any], folder: Path) -> str | None:
    """How the base's weights differ from those that the stage was started on."""
    base = before["base"]
    if is_fingerprint_of(base["fingerprint"], folder):
        return None
    return f"other weights of {base['name_or_path']}: {base['fingerprint'][:12]} then, {fingerprint(folder)[:12]} now"


def adapters_then(before: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters below: a baseline counts those that it trains on as its own."""
    return list((before.get("trl") or {}).get("continues") or before["adapters"])


def adapters_difference(before: dict[str, Any], frozen: list[AdapterFile]) -> str | None:
    """How the adapters below differ from those that the stage was started on."""
    then = [(str(link.get("path")), str(link.get("sha256"))) for link in adapters_then(before)]
    now = [(str(adapter.path), adapter.sha256) for adapter in frozen]
    if [sha for _, sha in then] == [sha for _, sha in now]:
        return None
    return f"an adapter below it was changed or replaced: {_named(then)} then, {_named(now)} now"


def _named(adapters: list[tuple[str, str]]) -> str:
    return ", ".join(f"{path} ({sha[:12]})" for path, sha in adapters) or "none"


def data_prints(data: TokenizedDataset, template: ChatTemplate) -> dict[str, Any]:
    """What tells the rows of a stage from others, each of its parts by itself."""
    return {
        "fingerprint": data.fingerprint,
        "template_sha256": text_sha256(template.text),
        "tokenizer_sha256": tokenizer_sha256(template.tokenizer),
    }


def data_difference(before: dict[str, Any], data: TokenizedDataset, template: ChatTemplate) -> str | None:
    """How the rows differ from those that the stage was started on; several lines."""
    then, now = before["data"], {**data.report.as_dict(), **data_prints(data, template)}
    if then["fingerprint"] == now["fingerprint"]:
        return None
    names = {"read": "rows read", "kept": "kept", "rows": "rows to train on", "tokens": "tokens"}
    names |= {"supervised": "supervised tokens", "longest": "tokens of the longest"}
    lines = [f"{name}: {then[key]:,} then, {now[key]:,} now" for key, name in names.items() if _differ(then, now, key)]
    for key, name in {"template_sha256": "chat template", "tokenizer_sha256": "tokenizer"}.items():
        if key in then and then[key] != now[key]:
            lines.append(f"{name}: {str(then[key])[:12]} then, {str(now[key])[:12]} now")
    if not lines:
        lines = [
            f"as many rows and tokens, other content: {then['fingerprint'][:12]} then, {data.fingerprint[:12]} now"
        ]
    return "other rows than these:\n    " + "\n    ".join(lines)


def _differ(then: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    return isinstance(then.get(key), int) and then[key] != now[key]


def judged_on_other_rows(
    before: dict[str, Any], config: RunConfig, stage: StageDir, data: TokenizedDataset | None
) -> bool:
    """Whether the evaluations so far were made on other held-out rows than those to come will be."""
    now = None if data is None else data.fingerprint
    if "eval_data" in before:
        then = (before["eval_data"] or {}).get("fingerprint")
        return then is not None and then != now
    return bool(config_then(stage).get("eval_dataset") != config.model_dump(mode="json")["eval_dataset"])


def memory_then(stage: StageDir) -> dict[str, Any]:
    """What the user had fixed of the plan when the stage was started."""
    return MemorySpec.model_validate(config_then(stage).get("memory") or {}).model_dump(mode="json")


def machine_now(dtype: torch.dtype) -> dict[str, Any]:
    """What of this machine decides how sums round."""
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
    """What the latest process that worked on the stage was, or had."""
    for entry in reversed(before.get("resumed") or []):
        if isinstance(entry.get(key), dict):
            return dict(entry[key])
    return dict(before.get(key) or {})


def same_device(before: dict[str, Any], machine: dict[str, Any]) -> bool:
    return _last(before, "machine").get("device", machine["device"]) == machine["device"]


def roundings(before: dict[str, Any], versions: dict[str, str], machine: dict[str, Any], engine: str) -> list[str]:
    """What makes sums round otherwise than before, although everything that was asked for is the same."""
    then, lines = _last(before, "versions"), []
    for name in (*LIBRARIES, *OF_ENGINE.get(engine, ())):
        old, new = then.get(name), versions.get(name)
        if name == "python":
            old, new = (".".join(v.split(".")[:2]) if v else v for v in (old, new))
        if then and old != new:
            lines.append(f"{name} {old or 'absent'} then, {new or 'absent'} now")
    before_machine = _last(before, "machine")
    for key in ("device", "processor", "dtype", "processes"):
        if key in before_machine and before_machine[key] != machine[key]:
            lines.append(f"{key} {before_machine[key]} then, {machine[key]} now")
    return lines


def cores() -> int:
    """CPU cores that this process may use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // world().local_size)


def moved(info: dict[str, Any], base: dict[str, Any], frozen: list[AdapterFile], relative: Any) -> None:
    """Write down where the same base and the same adapters are now: merge looks for them there."""
    info["base"] = {**info["base"], "name_or_path": base["name_or_path"], "revision": base["revision"]}
    links = [{"path": relative(adapter.path), "sha256": adapter.sha256} for adapter in frozen]
    if (info.get("trl") or {}).get("continues"):
        info["trl"]["continues"] = links
    else:
        info["adapters"] = links


def resumed(
    stage: StageDir, changes: Changes, versions: dict[str, str], machine: dict[str, Any], *, at: str
) -> dict[str, Any]:
    """What stage.json keeps of a start that went on: from which checkpoint, when, where, and what was not as it was."""
    # sizes only: the loop looks at every byte, and says what it finds
    whole = [
        path
        for path in stage.checkpoints()
        if not (path / MANIFEST).is_file() or manifest_fault(path, deep=False) is None
    ]
    step = int(whole[-1].name.split("-")[1]) if whole else 0
    return {"step": step, "at": at, "machine": machine, "versions": versions, "changed": list(changes.said)}
