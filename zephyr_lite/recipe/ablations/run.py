"""Train the arms of a table, one stage after another, and compare them on the same held-out rows."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...config.load import DatasetSpec, Method
from ...data.load import load_rows
from ...errors import UserError
from ...io.lock import alone
from ...io.run_dir import StageDir, write_json, write_text
from ...train.dpo import run_dpo
from ...train.resume import StageComplete
from ...train.sft import run_sft
from .score import Score, Scores, held_out_config
from .table import BASE, Table

Say = Callable[[str], None]


@dataclass
class Ablation:
    """What a table came out as.

    Attributes:
        table: what was compared.
        base: the bare base's score.
        scores: arm → its score.
        conversations, pairs: how many rows were held out.
    """

    table: Table
    base: Score
    scores: dict[str, Score]
    conversations: int
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "table": self.table.name,
            "arms": {arm: [stage.name for stage in stages] for arm, stages in self.table.arms.items()},
            "held_out": {"conversations": self.conversations, "pairs": self.pairs},
            "scores": {BASE: self.base.as_dict(), **{arm: score.as_dict() for arm, score in self.scores.items()}},
        }


def run_ablation(
    table: Table,
    *,
    say: Say = print,
    on_metrics: Callable[[int, int, dict[str, float]], None] = lambda step, total, metrics: None,
) -> Ablation:
    """Train what is not trained yet, then score every arm and the bare base.

    A stage that is finished is taken as it is, one that was interrupted goes on. ``NAME.json`` and ``NAME.md`` in the
    table's folder hold the result (``NAME-some`` where arms of the file were left out). Every data set is opened before
    anything is trained: one that is missing would otherwise be found out after hours.

    Raises:
        UserError: as the stages' own commands; a stage stands on another base than the others.
    """
    _same_base(table)
    try:
        with alone(table.run):
            return _run(table, say, on_metrics)
    except UserError as error:  # which folder and which stage is not the command line's to say here
        hint = re.sub(
            "another (output_dir or stage|stage or output_dir|output_dir)", "another folder with --out", error.hint
        )
        raise UserError(error.message, hint) from None


def _run(table: Table, say: Say, on_metrics: Callable[[int, int, dict[str, float]], None]) -> Ablation:
    stages = table.stages()
    _rows_are_there(table)
    for number, stage in enumerate(stages, 1):
        arms = ", ".join(arm for arm, chain in table.arms.items() if any(s.name == stage.name for s in chain))
        say(f"[{number}/{len(stages)}] {stage.name} ({stage.method}), for {arms}")
        try:
            (run_sft if stage.method == "sft" else run_dpo)(stage.loaded, say=say, on_metrics=on_metrics)
        except StageComplete as done:
            say(done.message)
        gc.collect()  # one stage's base must be gone before the next one's comes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    scores = Scores(table, say)
    base = scores.base()
    result = Ablation(table, base, {arm: scores.arm(arm) for arm in table.arms}, scores.conversations, scores.pairs)
    write_json(table.run / f"{table.result.name}.json", result.as_dict())
    write_text(table.run / f"{table.result.name}.md", "\n".join(table_lines(result)) + "\n")
    say(f"{table.result}.json and .md hold the table")
    return result


def _rows_are_there(table: Table) -> None:
    for stage in table.stages():
        if not StageDir(table.run / stage.name).complete():
            config = stage.loaded.config
            for specs in (config.dataset, config.eval_dataset):
                if specs:
                    load_rows(specs, stage.method, seed=config.seed, system=config.system)
    held_out: tuple[tuple[DatasetSpec, Method], ...] = ((table.chat, "sft"), (table.preferences, "dpo"))
    for spec, method in held_out:
        config = held_out_config(table.stages(), method)
        load_rows([spec], method, seed=config.seed, system=config.system)


def _same_base(table: Table) -> None:
    """One base under all arms: otherwise the table would compare bases."""
    keys = ("model_name_or_path", "model_revision", "load_in_4bit", "bnb_4bit_use_double_quant", "dtype")
    first, *others = table.stages()
    for stage in others:
        for key in keys:
            ours, theirs = getattr(first.loaded.config, key), getattr(stage.loaded.config, key)
            if ours != theirs:
                raise UserError(
                    f"{key} is {ours!r} in {first.name} ({first.file}), and {theirs!r} in {stage.name} ({stage.file}).",
                    f"Give one for all of them: {key}={ours}",
                )


HEADER = (
    "arm",
    "held-out chat loss",
    "preference accuracy",
    "margin (nats)",
    "likelier a token",
    "own accuracy",
    "own margin",
)


def table_rows(result: Ablation) -> list[tuple[str, ...]]:
    """The table's cells, the bare base first."""
    return [row(BASE, result.base), *(row(arm, score) for arm, score in result.scores.items())]


def row(name: str, score: Score) -> tuple[str, ...]:
    def with_error(value: float | None, error: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")

    return (
        name,
        f"{score.chat_loss:.4f}",
        with_error(score.accuracy, score.accuracy_error, ".3f"),
        with_error(score.margin, score.margin_error, "+.3f"),
        f"{score.likelier:.3f}",
        "" if score.own_accuracy is None else f"{score.own_accuracy:.3f}",
        "" if score.own_margin is None else f"{score.own_margin:+.4f}",
    )


def legend(result: Ablation) -> list[str]:
    """What the columns mean."""
    return [
        f"Chat loss: nats a supervised token over {result.conversations:,} held-out conversations.",
        f"Preference accuracy and margin: over {result.pairs:,} held-out pairs, by how much likelier the arm made each response "
        "than the bare base (log-ratio, summed over the response); ± is one standard error.",
        "Likelier a token: share of pairs whose chosen response has the higher mean log-probability; needs no reference.",
        "Own accuracy and margin: what the arm's DPO stage measured at its end against its own reference (the margin times beta).",
    ]


def table_lines(result: Ablation) -> list[str]:
    """As Markdown."""
    rows = [tuple(cell.replace("|", "\\|") for cell in each) for each in table_rows(result)]
    cells = [HEADER, tuple("---" for _ in HEADER), *rows]
    return [f"# {result.table.name}", "", *(f"| {' | '.join(c)} |" for c in cells), "", *legend(result)]
