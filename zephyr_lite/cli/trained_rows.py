"""The rows of a run as training gets them; needs the base's tokenizer and ``config.json``, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config.load import DatasetSpec, Method, RunConfig
from ..config.resolve import resolve_run
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..io.run_dir import StageDir
from ..memory.forecast import stages_of
from ..model.base import fetch_base, read_model_config
from ..model.peft_io import AdapterFile
from ..model.tokenizer import check_vocabulary
from ..train.setup import adapters_below, template_of


@dataclass
class TrainedRows:
    """Prepared rows of a configuration.

    Attributes:
        method: sft or dpo.
        config, template: as the run resolves them.
        specs: the sources of ``data``.
        data: as the run prepares it.
        notes: for the user, on decisions that were taken.
    """

    method: Method
    config: RunConfig
    template: ChatTemplate
    specs: list[DatasetSpec]
    data: TokenizedDataset
    notes: list[str] = field(default_factory=list)


def open_rows(method: Method, file: str | None, words: list[str], *, held_out: bool = False) -> TrainedRows:
    """Prepare a run's rows.

    Args:
        method: the stage.
        file: its configuration.
        words: ``key=value`` overrides.
        held_out: the rows of ``eval_dataset`` instead.

    Raises:
        UserError: as the run itself, except for weights and memory; or there is no eval_dataset.
    """
    loaded = resolve_run(method, file, words)
    config, notes = loaded.config, list(loaded.notes)
    folder = fetch_base(config.model_name_or_path, config.model_revision, weights=False)
    base_config: Any = read_model_config(folder, any_family=True)
    stage = StageDir(Path(config.output_dir) / config.stage)
    frozen: list[AdapterFile] = []
    if method == "dpo" and config.adapters == [] and not StageDir(stage.run / "sft").complete():
        notes.append(f"{stage.run} has no finished stage sft yet: chat_template auto is looked for in the base")
    else:
        frozen = adapters_below(method, config, stage)
    template = template_of(config, folder, frozen)
    check_vocabulary(template.tokenizer, base_config.vocab_size, Path(template.tokenizer.name_or_path))
    if held_out and not config.eval_dataset:
        raise UserError("nothing is held out: the configuration has no eval_dataset.", "Add eval_dataset=FILE.")
    specs, what = (config.eval_dataset, "held-out") if held_out else (config.dataset, "training")
    return TrainedRows(method, config, template, specs, prepare(specs, method, config, template, what=what), notes)


def held_out_rows(rows: TrainedRows) -> TrainedRows:
    """The rows of ``eval_dataset`` of the same run, which has one."""
    specs = rows.config.eval_dataset
    data = prepare(specs, rows.method, rows.config, rows.template, what="held-out")
    return replace(rows, specs=specs, data=data)


def example_column(data: TokenizedDataset, name: str) -> pa.ChunkedArray:
    """A column of the prepared table; ``where`` holds places such as "train.jsonl row 17"."""
    return data.examples.columns(name)[:].column(name)


def stage_of_words(words: list[str], file: str | None) -> tuple[Method, list[str]]:
    """The stage that the first word or the configuration's file names, and the other words.

    Raises:
        UserError: neither names one.
    """
    methods, rest = stages_of(words, file)
    if len(methods) > 1:
        raise UserError("which stage's rows?", "Name sft or dpo, then key=value: … sft dataset=FILE.")
    return methods[0], rest
