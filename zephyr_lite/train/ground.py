"""What a stage stands on, and whether it may go on: the adapters below it, the base's weights, its own configuration."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.load import Method, RunConfig
from ..data.chat_template import ChatTemplate
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, stages_of
from ..io.stage_info import TO_GO_ON, check_rendering, checked
from ..io.sync import catch_up
from ..memory.plan import Plan
from ..model.base import is_fingerprint_of
from ..model.chain import chain_of_run, check_stack
from ..model.overlap import CARD
from ..model.peft_io import AdapterFile, fetch_adapter, read_adapter
from ..model.tokenizer import check_vocabulary
from .publish import push_adapter
from .resume import Changes, adapters_difference, base_difference, config_changes


class StageComplete(UserError):
    """The stage is finished; there is nothing to do. The command line says so and exits with 0."""

    done = True


def may_go_on(
    stage: StageDir, config: RunConfig, method: Method, say: Callable[[str], None], *, claim: bool
) -> tuple[dict[str, Any] | None, Changes]:
    """What stage.json says of a stage that was begun, and what of the configuration is not as it was.

    A stage that kept nothing (a typo, an early error) binds nobody: then there is nothing to go on with, and None comes.

    Args:
        claim: False where nothing is to be written.

    Raises:
        StageComplete: it is finished, with this configuration.
        UserError: it was begun with another one, or the file is not what a run writes.
    """
    file = stage.path / STAGE_FILE
    info = stage.info()
    if info is None:
        return None, Changes()
    checked(info, file)
    complete = info.get("status") == "complete"
    if not complete and not stage.checkpoints() and info.get("method", method) == method:
        return None, Changes()
    if info.get("method", method) != method:
        raise UserError(
            f"{stage.path}: is a {info['method']} stage; this is {method}.", "Choose another stage or output_dir."
        )
    checked(info, file, needs=TO_GO_ON)
    changes = config_changes(stage, config, method)
    if changes.refused:
        _the_rest(changes, info, method, config, stage)
        changes.refuse(stage, complete=complete)
    if complete and not changes.open:
        if claim and config.sync:
            catch_up(config.sync, stage, say)
        if claim:
            push_adapter(config, stage, info, say)
        raise finished(stage, info)
    return info, changes


def _the_rest(changes: Changes, info: dict[str, Any], method: Method, config: RunConfig, stage: StageDir) -> None:
    """What else is not as it was, as far as that costs nothing to know: a stage that cannot go on anyway."""
    with contextlib.suppress(UserError):
        folder = Path(config.model_name_or_path)
        if folder.is_dir() and (difference := base_difference(info, folder)):
            changes.settle("base", difference)
    if config.adapters == [] or all(Path(name).is_dir() for name in config.adapters if config.adapters != "none"):
        with contextlib.suppress(UserError):
            frozen = adapters_below(method, config, stage, lambda line: None)
            if difference := adapters_difference(info, frozen):
                changes.settle("adapters", difference)


def finished(stage: StageDir, info: dict[str, Any]) -> StageComplete:
    following = {"sft": "zephyr-lite dpo", "dpo": "zephyr-lite merge --out model/"}[info["method"]]
    return StageComplete(f"{stage.path} is complete already.", f"Next: {following}")


def run_id(run: Path) -> str:
    """What tells a run from another of the same name; its stages share it."""
    for stage in stages_of(run):
        with contextlib.suppress(UserError):  # a broken one among them is its own stage's affair
            found = (stage.info() or {}).get("id")
            if isinstance(found, str) and found:
                return found
    return uuid.uuid4().hex


def plan_then(stage: StageDir, before: dict[str, Any], layers: int) -> Plan:
    """The plan that the stage was started with.

    Args:
        layers: how many the base has.

    Raises:
        UserError: it is none of this version's, or of another model.
    """
    file = stage.path / STAGE_FILE
    hint = "Go on with the version that began the stage (the file names it), or choose another output_dir or stage."
    try:
        plan = Plan(**before["plan"])
        whole = (plan.micro_tokens, plan.threads, *([plan.tile] if plan.tile is not None else []))
        fits = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in whole)
        fits = fits and isinstance(plan.offload, int) and isinstance(plan.stream, bool)
        fits = fits and set(plan.keep) <= {"input", "attention", "all"} and plan.reference in ("together", "own")
        fits = fits and isinstance(plan.free_bytes, int) and isinstance(plan.bytes_per_token, int)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: its plan is none of this version's ({error}).", hint) from None
    if not fits:
        raise UserError(f"{file}: its plan holds what no plan holds.", hint)
    if len(plan.keep) not in (0, layers):
        raise UserError(f"{file}: its plan is for {len(plan.keep)} layers, and the base has {layers}.", hint)
    return plan


def adapters_below(method: Method, config: RunConfig, stage: StageDir, say: Callable[[str], None]) -> list[AdapterFile]:
    """The adapters below this stage, read and verified."""
    if config.adapters == "none":
        return []
    if config.adapters:
        adapters = [read_adapter(fetch_adapter(name, beside=[CARD])) for name in config.adapters]
        for note in check_stack(adapters, config.model_name_or_path):
            say(note)
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


def same_base(frozen: list[AdapterFile], folder: Path) -> None:
    """An adapter of a run of ours knows the base that it was trained on."""
    for adapter in frozen:
        info = StageDir(adapter.path.parent).info() if adapter.path.name in ("adapter", "delta") else None
        if info is None:
            continue
        file = adapter.path.parent / STAGE_FILE
        checked(info, file, needs=("base.fingerprint", "base.name_or_path"))
        if not is_fingerprint_of(info["base"]["fingerprint"], folder):
            raise UserError(
                f"adapter {adapter.path}: was trained on {info['base']['name_or_path']}, and {folder} is another model "
                "(other weights, or another architecture).",
                "Give the folder of the model that it was trained on: model_name_or_path=FOLDER.",
            )


def same_template(frozen: list[AdapterFile], template: ChatTemplate) -> None:
    """The stage below knows how its conversations were rendered.

    Raises:
        UserError: this stage would render its own otherwise.
    """
    adapter = frozen[-1].path if frozen else Path()
    info = StageDir(adapter.parent).info() if adapter.name in ("adapter", "delta") else None
    if info is not None:
        check_rendering(info, adapter.parent, template.text, template.tokenizer)


def vocabulary_fits(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that gives ids for which the base of this configuration has no embedding."""
    check_vocabulary(tokenizer, config.vocab_size, Path(tokenizer.name_or_path))
