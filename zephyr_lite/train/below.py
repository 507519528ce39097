"""What a stage starts from: the named files and folders, the adapters below it, and its chat template."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path
from typing import Any

from ..config.load import Method, RunConfig
from ..data.chat_template import ChatTemplate, resolve_template
from ..data.sources import local_path
from ..data.templates import find_template
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, checked
from ..model.base import fetch_base, load_tokenizer
from ..model.base_folder import read_model_config
from ..model.files import named_folder
from ..model.peft_io import CARD, AdapterFile, fetch_adapter, read_adapter
from ..model.tokenizer import check_vocabulary

logger = logging.getLogger(__name__)


def check_paths(config: RunConfig) -> None:
    """Raise a UserError for a file or folder that is not there, before anything is printed or downloaded."""
    for spec in (*config.dataset, *config.eval_dataset):
        local_path(spec)
    named_folder("model", config.model_name_or_path)
    for name in () if config.adapters == "none" else config.adapters:
        named_folder("adapter", name)
    find_template(config.chat_template)


def adapters_below(method: Method, config: RunConfig, stage: StageDir) -> list[AdapterFile]:
    """The adapters below this stage, read and verified: those of the key ``adapters``, or dpo's stage sft."""
    if config.adapters == "none":
        return []
    if not config.adapters and method == "sft":
        return []
    from ..model.chain import chain_of_run, check_stack

    if config.adapters:
        adapters = [read_adapter(fetch_adapter(name, beside=[CARD])) for name in config.adapters]
        for note in check_stack(adapters, config.model_name_or_path):
            logger.warning(note)
        return adapters
    if not StageDir(stage.run / "sft").complete():
        raise UserError(
            f"{stage.run}: has no finished stage sft, so there is nothing for dpo to start from.",
            "Run `zephyr-lite sft` first, name an SFT adapter (adapters=[FOLDER]), or set adapters=none to train on the "
            "base itself.",
        )
    adapters = chain_of_run(stage.run, stage="sft").adapters
    start = "the reference is" if config.needs_reference else "training starts from"
    logger.info(f"{start} the base with {', '.join(str(a.path) for a in adapters)}")
    return adapters


def stage_of(adapter: AdapterFile) -> dict[str, Any] | None:
    """stage.json of the stage that trained an adapter; None where that is another tool's."""
    stage = StageDir(adapter.path.parent)
    info = stage.info() if adapter.path.name in ("adapter", "delta") else None
    return None if info is None else checked(info, stage.path / STAGE_FILE, needs=("base.fingerprint",))


def template_of(config: RunConfig, folder: Path, frozen: list[AdapterFile], time: str | None = None) -> ChatTemplate:
    """The chat template of a run. ``auto`` is that of the adapter below if it was saved with one, else the base's.

    Args:
        time: when the stage began, for a template that writes the date; None: now.
    """
    now = datetime.datetime.fromisoformat(time) if time else None
    if config.chat_template == "auto":
        for adapter in reversed(frozen):
            # a stage keeps its tokenizer in adapter/, beside delta/
            for candidate in (adapter.path, adapter.path.parent / "adapter"):
                if (candidate / "tokenizer_config.json").is_file():
                    return resolve_template("auto", load_tokenizer(candidate), now)
    return resolve_template(config.chat_template, load_tokenizer(folder), now)


def open_template(method: Method, config: RunConfig) -> tuple[ChatTemplate, Any, list[str]]:
    """(the chat template, the base's configuration, notes) of a run, for commands that look at its rows before it begins."""
    check_paths(config)
    folder = fetch_base(config.model_name_or_path, config.model_revision, weights=False)
    base_config: Any = read_model_config(folder, any_family=True)
    stage, notes = StageDir(Path(config.output_dir) / config.stage), []
    frozen: list[AdapterFile] = []
    if method == "dpo" and config.adapters == [] and not StageDir(stage.run / "sft").complete():
        notes.append(f"{stage.run} has no finished stage sft yet: chat_template auto is looked for in the base")
    else:
        frozen = adapters_below(method, config, stage)
    template = template_of(config, folder, frozen)
    check_vocabulary(template.tokenizer, base_config.vocab_size, Path(template.tokenizer.name_or_path))
    return template, base_config, notes
