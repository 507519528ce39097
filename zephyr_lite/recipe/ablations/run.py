"""Training of a table's arms, and their comparison on the same held-out rows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...config.load import Method
from ...data.load import load_rows
from ...errors import UserError
from ...io.lock import alone
from ...io.run_dir import StageDir, write_json, write_text
from ...train.dpo import run_dpo
from ...train.resume import StageComplete
from ...train.sft import run_sft
from .score import Score, Scores, held_out_config
from .table import BASE, Table

logger = logging.getLogger(__name__)

OnMetrics = Callable[[int, int, dict[str, float]], None]


@dataclass
class Ablation:
    """The result of a table.

    Attributes:
        base: the bare base's score; scores: arm → its score.
        conversations, pairs: numbers of held-out rows.
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


def run_ablation(table: Table, *, on_metrics: OnMetrics = lambda step, total, metrics: None) -> Ablation:
    """Train the stages that are not finished, then score every arm and the bare base.

    Interrupted stages are resumed. The result is written to ``NAME.json`` and ``NAME.md`` in the table's folder (``NAME-some``
    if arms of the file were left out).

    Raises:
        UserError: as the stages' own commands; or stages have different bases.
    """
    _check_bases(table)
    with alone(table.run):
        return _run(table, on_metrics)


def _run(table: Table, on_metrics: OnMetrics) -> Ablation:
    stages = table.stages()
    _check_rows(table)
    for number, stage in enumerate(stages, 1):
        arms = ", ".join(arm for arm, chain in table.arms.items() if any(s.name == stage.name for s in chain))
        logger.info(f"[{number}/{len(stages)}] {stage.name} ({stage.method}), for {arms}")
        try:
            (run_sft if stage.method == "sft" else run_dpo)(stage.loaded, on_metrics=on_metrics)
        except StageComplete as done:
            logger.info(done.message)
        gc.collect()  # free one stage's base before the next one is loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    scores = Scores(table)
    base = scores.base()
    result = Ablation(table, base, {arm: scores.arm(arm) for arm in table.arms}, scores.conversations, scores.pairs)
    write_json(table.run / f"{table.result.name}.json", result.as_dict())
    write_text(table.run / f"{table.result.name}.md", "\n".join(table_lines(result)) + "\n")
    logger.info(f"wrote {table.result}.json and .md")
    return result


def _check_rows(table: Table) -> None:
    """Open every data set before hours of training."""
    for stage in table.stages():
        if not StageDir(table.run / stage.name).complete():
            config = stage.loaded.config
            for specs in (config.dataset, config.eval_dataset):
                if specs:
                    load_rows(specs, stage.method, seed=config.seed, system=config.system)
    method: Method
    for spec, method in ((table.chat, "sft"), (table.preferences, "dpo")):
        config = held_out_config(table.stages(), method)
        load_rows([spec], method, seed=config.seed, system=config.system)


def _check_bases(table: Table) -> None:
    """All arms have to be trained on one base: otherwise the table would compare bases."""
    first, *others = table.stages()
    for stage in others:
        for key in ("model_name_or_path", "model_revision", "load_in_4bit", "bnb_4bit_use_double_quant", "dtype"):
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
    return [_row(arm, score) for arm, score in {BASE: result.base, **result.scores}.items()]


def _row(arm: str, score: Score) -> tuple[str, ...]:
    def cell(value: float | None, form: str, error: float | None = None) -> str:
        return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")

    return (
        arm,
        f"{score.chat_loss:.4f}",
        cell(score.accuracy, ".3f", score.accuracy_error),
        cell(score.margin, "+.3f", score.margin_error),
        f"{score.likelier:.3f}",
        cell(score.own_accuracy, ".3f"),
        cell(score.own_margin, "+.4f"),
    )


def legend(result: Ablation) -> list[str]:
    """The meaning of the columns."""
    return [
        f"Chat loss: nats a supervised token over {result.conversations:,} held-out conversations.",
        f"Preference accuracy and margin: over {result.pairs:,} held-out pairs, by how much likelier the arm made each response "
        "than the bare base (log-ratio, summed over the response); ± is one standard error.",
        "Likelier a token: share of pairs whose chosen response has the higher mean log-probability; needs no reference.",
        "Own accuracy and margin: the last evaluation of the arm's DPO stage against its own reference (the margin times beta).",
    ]


def table_lines(result: Ablation) -> list[str]:
    """The table in Markdown."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in table_rows(result)]
    cells = [HEADER, tuple("---" for _ in HEADER), *rows]
    return [f"# {result.table.name}", "", *(f"| {' | '.join(c)} |" for c in cells), "", *legend(result)]
