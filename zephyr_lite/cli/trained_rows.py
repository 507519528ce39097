"""The rows of a run as training gets them, without its weights: the tokenizer and ``config.json`` are enough."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..config.load import DatasetSpec, Method, RunConfig
from ..config.resolve import resolve_run
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..io.run_dir import StageDir
from ..memory.planned import stages_of
from ..model.base import fetch_base, read_model_config
from ..model.peft_io import AdapterFile
from ..model.tokenizer import check_vocabulary
from ..train.setup import adapters_below, template_of


@dataclass
class TrainedRows:
    """Rows of a configuration.

    Attributes:
        method: sft or dpo.
        config: as the run would resolve it.
        template: as the run would choose it.
        specs: what ``data`` was made of.
        data: as the run would prepare it.
        notes: what was decided on the way.
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
        method: which stage's defaults to start from.
        file: its configuration.
        words: ``key=value`` words that change it.
        held_out: the rows of ``eval_dataset`` instead.

    Raises:
        UserError: as the run itself would say, but for what concerns weights and memory; or there is no eval_dataset.
    """
    config, template, notes = _ground(method, file, words)
    if held_out and not config.eval_dataset:
        raise UserError("nothing is held out: the configuration has no eval_dataset.", "Add eval_dataset=FILE.")
    return _prepared(method, config, template, notes, held_out)


def held_out_rows(rows: TrainedRows) -> TrainedRows | None:
    """The rows of ``eval_dataset`` beside those that are trained on; None where there are none."""
    return _prepared(rows.method, rows.config, rows.template, [], True) if rows.config.eval_dataset else None


def _prepared(
    method: Method, config: RunConfig, template: ChatTemplate, notes: list[str], held_out: bool
) -> TrainedRows:
    specs, what = (config.eval_dataset, "held-out") if held_out else (config.dataset, "training")
    return TrainedRows(method, config, template, specs, prepare(specs, method, config, template, what=what), notes)


def _ground(method: Method, file: str | None, words: list[str]) -> tuple[RunConfig, ChatTemplate, list[str]]:
    loaded = resolve_run(method, file, words)
    config, notes = loaded.config, list(loaded.notes)
    folder = fetch_base(config.model_name_or_path, config.model_revision, weights=False)
    base_config: Any = read_model_config(folder, any_family=True)
    template = template_of(config, folder, _frozen(method, config, notes))
    check_vocabulary(template.tokenizer, base_config.vocab_size, Path(template.tokenizer.name_or_path))
    return config, template, notes


def _frozen(method: Method, config: RunConfig, notes: list[str]) -> list[AdapterFile]:
    """The adapters below: the template is saved with them. A run whose stage sft is still to come has none yet."""
    stage = StageDir(Path(config.output_dir) / config.stage)
    if method == "dpo" and config.adapters == [] and not StageDir(stage.run / "sft").complete():
        notes.append(f"{stage.run} has no finished stage sft yet: chat_template auto is looked for in the base")
        return []
    return adapters_below(method, config, stage, notes.append)


def example_places(data: TokenizedDataset) -> list[str]:
    """The place ("train.jsonl row 17") of the data row that each example was made of."""
    return example_column(data, "where").to_pylist()


def example_column(data: TokenizedDataset, name: str) -> pa.ChunkedArray:
    """A column of the prepared table, beside ids and masks: where, length, supervised, lost, cut."""
    return data.examples.columns(name)[:].column(name)


def stage_of_words(words: list[str], file: str | None) -> tuple[Method, list[str]]:
    """The stage that the first word names, or else the configuration's file; and the other words.

    Raises:
        UserError: neither says which.
    """
    if words and "=" not in words[0] and not words[0].startswith("-"):
        if words[0].lower() not in ("sft", "dpo"):
            raise UserError(f"{words[0]}: there is no such stage.", "Say sft or dpo, then key=value.")
        return ("sft" if words[0].lower() == "sft" else "dpo"), words[1:]
    methods, rest = stages_of(words, file)
    if len(methods) > 1:
        raise UserError("which stage's rows?", "Say sft or dpo, then key=value: … sft dataset=FILE.")
    return methods[0], rest
