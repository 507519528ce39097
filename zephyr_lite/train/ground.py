"""What a stage stands on, and whether it may go on: the adapters below it, the base's weights, its own configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import MemorySpec, Method, RunConfig, read_dumped
from ..errors import UserError
from ..model.chain import chain_of_run, check_order
from ..model.peft_files import AdapterFile, fetch_adapter, read_adapter
from ..model.plan import Plan
from ..rundir import StageDir

# what may differ when a stage goes on: nothing that a gradient depends on
MAY_CHANGE = {
    "output_dir", "eval_dataset", "eval_steps", "save_steps", "logging_steps", "save_total_limit",
    "load_best_model_at_end", "early_stopping_patience", "report_to", "push_to_hub", "sync", "memory",
}  # fmt: skip


class StageComplete(UserError):
    """The stage is finished; there is nothing to do. The command line says so and exits with 0."""


def may_go_on(stage: StageDir, before: dict[str, Any], config: RunConfig, method: Method) -> None:
    """Refuse a finished stage, and one that was started with another configuration."""
    if before.get("method") not in (None, method):
        raise UserError(
            f"{stage.path}: is a {before['method']} stage; this is {method}.", "Choose another stage or output_dir."
        )
    complete = before.get("status") == "complete"
    old = read_dumped(stage.config) if stage.config.is_file() else {}
    new = config.model_dump(mode="json")
    changed = [
        f"{k}: {old.get(k)!r} then, {v!r} now" for k, v in new.items() if k not in MAY_CHANGE and old.get(k) != v
    ]
    if changed:
        cure = "choose another output_dir or stage."
        raise UserError(
            f"{stage.path}: was {'finished' if complete else 'started'} with another configuration:\n  "
            + "\n  ".join(changed),
            f"To train with this one, {cure}" if complete else f"Go back to it to go on, or {cure}",
        )
    if complete:
        following = {"sft": "zephyr-lite dpo", "dpo": "zephyr-lite merge --out model/"}[before["method"]]
        raise StageComplete(f"{stage.path} is complete already.", f"Next: {following}")


def memory_then(stage: StageDir) -> dict[str, Any]:
    """What the user had fixed of the plan when the stage was started."""
    then = read_dumped(stage.config) if stage.config.is_file() else {}
    return MemorySpec.model_validate(then.get("memory") or {}).model_dump(mode="json")


def plan_then(stage: StageDir, before: dict[str, Any]) -> Plan:
    """The plan that the stage was started with."""
    try:
        return Plan(**before["plan"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{stage.path}/stage.json: its plan is none of this version's ({error}).",
            "Go on with the version that began the stage (the file names it), or choose another output_dir or stage.",
        ) from None


def same_ground(stage: StageDir, before: dict[str, Any], base: str, frozen: list[AdapterFile]) -> None:
    """A stage that goes on stands on what it was started on: the same base, the same adapters below."""
    if "trl" in before:  # the baseline counts adapters that it trains on as its own
        then = before["trl"].get("continues", before.get("adapters", []))
    else:
        then = before.get("adapters", [])
    if before["base"]["fingerprint"] != base:
        raise UserError(
            f"{stage.path}: was started on other weights of {before['base']['name_or_path']} than these.",
            "Restore them (a hub id's model_revision pins them), or choose another output_dir or stage.",
        )
    if [a["sha256"] for a in then] != [a.sha256 for a in frozen]:
        raise UserError(
            f"{stage.path}: an adapter below it was changed or replaced since it was started.",
            "Restore it, or choose another output_dir or stage.",
        )


def adapters_below(method: Method, config: RunConfig, stage: StageDir, say: Callable[[str], None]) -> list[AdapterFile]:
    """The adapters below this stage, read and verified."""
    if config.adapters == "none":
        return []
    if config.adapters:
        adapters = [read_adapter(fetch_adapter(name)) for name in config.adapters]
        check_order(adapters)
        return adapters
    if method == "sft":
        return []
    below = StageDir(stage.run / "sft")
    info = below.info()
    if info is None or info.get("status") != "complete":
        state = "has no stage sft" if info is None else "has a stage sft that is not finished"
        raise UserError(
            f"{stage.run}: {state}, so there is nothing for dpo to start from.",
            "Run `zephyr-lite sft` first, name an SFT adapter (adapters=[FOLDER]), or set adapters=none to train on the "
            "base itself.",
        )
    adapters = chain_of_run(stage.run, stage="sft").adapters
    say(f"the reference is the base with {', '.join(str(a.path) for a in adapters)}")
    return adapters


def relative_to_run(path: Path, run: Path) -> str:
    path, run = path.resolve(), run.resolve()
    return str(path.relative_to(run)) if path.is_relative_to(run) else str(path)


def same_base(frozen: list[AdapterFile], ours: str, folder: Path) -> None:
    """An adapter of a run of ours knows the base that it was trained on."""
    for adapter in frozen:
        info = StageDir(adapter.path.parent).info() if adapter.path.name in ("adapter", "delta") else None
        if info is not None and info["base"]["fingerprint"] != ours:
            raise UserError(
                f"adapter {adapter.path}: was trained on {info['base']['name_or_path']}, and {folder} is another model.",
                f"Set model_name_or_path={info['base']['name_or_path']}.",
            )


def vocabulary_fits(tokenizer: Any, config: Any, folder: Path) -> None:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer knows {len(tokenizer):,} tokens, the model {config.vocab_size:,}.",
            "Use the tokenizer that belongs to this model.",
        )
