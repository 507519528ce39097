"""``zephyr-lite ablate``: tables of ablations, their training, and their comparison on the same held-out rows.

A table is a file of the folder ``configs/tables``, or one's own::

    output_dir: runs/ablations
    keys: {seed: 1}                    # for every stage, below its own file's
    arms:
      dSFT: [{sft: ablations/dsft-1}]
      dDPO + dSFT: [{sft: ablations/dsft-1}, {dpo: ablations/ddpo-dsft}]
    chat: {path: HuggingFaceH4/ultrachat_200k, split: test_sft}
    preferences: {path: HuggingFaceH4/ultrafeedback_binarized, split: test_prefs}
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..client.endpoints import validated
from ..config.load import (
    DatasetSpec,
    Loaded,
    Method,
    RunConfig,
    find_config,
    load_config,
    refuse_placed,
    words_by_scope,
)
from ..config.strict_yaml import read_yaml
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..data.load import load_rows
from ..errors import UserError
from ..evaluate.judge import standard_error
from ..evaluate.likelihood import Logps, chat_loss, row_logps, scorer_of
from ..io.atomic import alone, write_json, write_text
from ..io.run_dir import StageDir
from ..model.chain import chain_of_run
from ..model.loaded import BASE, live_of
from ..train.dpo import run_dpo
from ..train.resume import StageComplete
from ..train.sft import run_sft
from ..train.stage import Observer

logger = logging.getLogger(__name__)

METHODS: tuple[Method, Method] = ("sft", "dpo")
OneStage = Annotated[dict[Method, str], Field(min_length=1, max_length=1)]
ONE_BASE = ("model_name_or_path", "model_revision", "load_in_4bit", "bnb_4bit_use_double_quant", "dtype")
# the two published sets; ``--chat`` and ``--preferences`` name copies of them
CHAT, PREFERENCES = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"

# -- the table -------------------------------------------------------------------------------------------------------


class TableSpec(BaseModel):
    """The schema of a table's file."""

    model_config = ConfigDict(extra="forbid")

    output_dir: str = "runs/ablations"
    keys: dict[str, Any] = {}  # of the configuration, for every stage
    # name → stages {method: configuration}, bottom first
    arms: dict[str, Annotated[list[OneStage], Field(min_length=1)]] = Field(min_length=1)
    chat: DatasetSpec = DatasetSpec(path=CHAT, split="test_sft")
    preferences: DatasetSpec = DatasetSpec(path=PREFERENCES, split="test_prefs")


@dataclass(frozen=True)
class ArmStage:
    """One stage of an arm, shared by arms that start with the same stages."""

    method: Method
    file: str  # its configuration, as named in the table
    loaded: Loaded  # resolved, with the table's ``output_dir`` and ``adapters``

    @property
    def name(self) -> str:
        return self.loaded.config.stage


@dataclass(frozen=True)
class Table:
    """A resolved table."""

    name: str  # the file's, without suffix
    run: Path  # the folder of all its stages
    arms: dict[str, list[ArmStage]]  # name → stages, bottom first
    chat: DatasetSpec  # held-out rows
    preferences: DatasetSpec
    whole: bool = True  # whether all arms of the file are included

    def stages(self) -> list[ArmStage]:
        """Every stage once, each after those below it."""
        return list({stage.name: stage for arm in self.arms.values() for stage in arm}.values())

    def held_out(self, method: Method) -> tuple[DatasetSpec, RunConfig]:
        """The held-out rows of a method, and the configuration to read them with: the first such stage's, or the recipe's."""
        configs = [stage.loaded.config for stage in self.stages() if stage.method == method]
        config = configs[0] if configs else RunConfig(max_length=2048 if method == "sft" else 1024)
        return self.chat if method == "sft" else self.preferences, config


def read_table(
    name: str,
    words: Sequence[str] = (),
    *,
    out: str | None = None,
    only: Sequence[str] = (),
    chat: str | None = None,
    preferences: str | None = None,
) -> Table:
    """Read a table and resolve the configurations of its stages.

    Args:
        name: a YAML file, or a shipped table's name.
        words: ``key=value`` for every stage; ``sft.key=value``, ``dpo.key=value`` or ``STAGE.key=value`` for those only.
        out: instead of the file's ``output_dir``.
        only: these arms.
        chat, preferences: copies of the two published sets, used wherever the table or a stage names them.

    Raises:
        UserError: there is no such table or arm, a key is invalid, or two different stages have one name.
    """
    path = find_config(name, "tables")
    spec = validated(TableSpec, read_yaml(path), str(path))
    if unknown := [arm for arm in only if arm not in spec.arms]:
        raise UserError(f"{path}: there is no arm {unknown[0]!r}.", f"There are {', '.join(spec.arms)}.")
    run, scoped = Path(out or spec.output_dir), words_by_scope(words)
    refuse_placed(spec.keys, str(path))
    copies = {CHAT: chat, PREFERENCES: preferences}

    def copied(entry: DatasetSpec) -> DatasetSpec:
        return entry.model_copy(update={"path": copies.get(entry.path) or entry.path})

    arms: dict[str, list[ArmStage]] = {arm: [] for arm in spec.arms if not only or arm in only}
    known: dict[str, ArmStage] = {}
    for arm, chain in arms.items():
        for method, file in (item for entry in spec.arms[arm] for item in entry.items()):
            name = load_config(method, file, []).config.stage
            adapters = f"[{run / chain[-1].name / 'adapter'}]" if chain else "none"
            own = [word for scope in ("", method, name) for word in scoped.get(scope, [])]
            loaded = load_config(method, file, [*own, f"output_dir={run}", f"adapters={adapters}"], spec.keys)
            config = loaded.config
            sets = {key: [copied(entry) for entry in getattr(config, key)] for key in ("dataset", "eval_dataset")}
            loaded.config = config.model_copy(update=sets)
            stage = known.setdefault(name, ArmStage(method, file, loaded))
            if stage.loaded.config != loaded.config:
                raise UserError(
                    f"arm {arm!r}: its stage {name!r} ({file}) shares its name with another one, of another file or on other "
                    "stages.",
                    "Give each its own `stage:` in its configuration.",
                )
            chain.append(stage)
    if unused := sorted(set(scoped) - {"", "sft", "dpo", *known}):
        raise UserError(
            f"the command line: {unused[0]}.…: no stage of this table is called so, and it is no key.",
            f"Stages: {', '.join(sorted(known))}. A key for one of them is written {min(known)}.KEY=VALUE.",
        )
    return Table(path.stem, run, arms, copied(spec.chat), copied(spec.preferences), len(arms) == len(spec.arms))


# -- training and scoring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A model's scores on the held-out rows, with standard errors."""

    chat_loss: float  # nats a supervised token
    likelier: float  # share of pairs whose chosen response has the higher mean log-probability a token
    # share of pairs whose chosen response gained more log-probability over the bare base than the rejected one (a tie does
    # not count); None for the base
    accuracy: float | None = None
    accuracy_error: float | None = None
    margin: float | None = None  # mean of that difference in nats
    margin_error: float | None = None


@dataclass
class Ablation:
    """The result of a table."""

    table: Table
    scores: dict[str, Score]  # by arm, the bare base (``BASE``) first
    conversations: int  # held-out rows
    pairs: int


def run_ablation(table: Table, *, observers: Sequence[Observer] = ()) -> Ablation:
    """Train the stages that are not finished, then score every arm and the bare base.

    The result is written to ``NAME.json`` and ``NAME.md`` in the table's folder (``NAME-some`` if arms were left out).

    Raises:
        UserError: as the stages' own commands; or stages have different bases, or a finished stage or the base was changed.
    """
    stages = table.stages()
    for key in ONE_BASE:
        found = {str(getattr(stage.loaded.config, key)) for stage in stages}
        if len(found) > 1:
            raise UserError(f"{table.name}: {key} differs between stages: {', '.join(sorted(found))}.", f"Add {key}=…")
    with alone(table.run):
        _check_rows(table)
        for number, stage in enumerate(stages, 1):
            arms = ", ".join(arm for arm, chain in table.arms.items() if stage in chain)
            logger.info(f"[{number}/{len(stages)}] {stage.name} ({stage.method}), for {arms}")
            try:
                (run_sft if stage.method == "sft" else run_dpo)(stage.loaded, observers=observers)
            except StageComplete as done:
                logger.info(done.message)
            _free()
        result = _score(table)
        file = table.run / (table.name if table.whole else f"{table.name}-some")
        values = {
            "table": table.name,
            "arms": {arm: [stage.name for stage in chain] for arm, chain in table.arms.items()},
            "held_out": {"conversations": result.conversations, "pairs": result.pairs},
            "scores": {arm: asdict(score) for arm, score in result.scores.items()},
        }
        write_json(file.with_name(f"{file.name}.json"), values)
        write_text(file.with_name(f"{file.name}.md"), "\n".join(table_lines(result)) + "\n")
        logger.info(f"wrote {file}.json and .md")
    return result


def _free() -> None:
    """Free the base that was used last before the next one is loaded."""
    gc.collect()
    torch.cuda.empty_cache()


def _check_rows(table: Table) -> None:
    """Open every data set before hours of training."""
    for stage in table.stages():
        if not StageDir(table.run / stage.name).complete():
            config = stage.loaded.config
            for specs in filter(None, (config.dataset, config.eval_dataset)):
                load_rows(specs, stage.method, seed=config.seed, system=config.system)
    for method in METHODS:
        spec, config = table.held_out(method)
        load_rows([spec], method, seed=config.seed, system=config.system)


def _score(table: Table) -> Ablation:
    """Score every arm, and the base that all of them have in common."""
    rows: dict[str, tuple[TokenizedDataset, TokenizedDataset, Logps]] = {}  # by template; log-probabilities of the base
    scores: dict[str, Score] = {}
    for arm, stages in table.arms.items():
        logger.info(f"scoring {arm}")
        live = live_of(chain_of_run(table.run, stage=stages[-1].name), dtype=stages[-1].loaded.config.dtype)
        if live.template.text not in rows:
            chats, pairs = _held_out(table, "sft", live.template), _held_out(table, "dpo", live.template)
            rows[live.template.text] = chats, pairs, row_logps(scorer_of(live, BASE), pairs)
        chats, pairs, reference = rows[live.template.text]
        if not scores:
            scores[BASE] = Score(chat_loss(scorer_of(live, BASE), chats), _likelier(reference))
        logps = row_logps(scorer_of(live, live.policy), pairs)
        gained = logps.sums - reference.sums
        margins = gained[:, 0] - gained[:, 1]
        won = (margins > 0).double()
        scores[arm] = Score(
            chat_loss=chat_loss(scorer_of(live, live.policy), chats),
            likelier=_likelier(logps),
            accuracy=won.mean().item(),
            accuracy_error=standard_error(won.tolist()),
            margin=margins.mean().item(),
            margin_error=standard_error(margins.tolist()),
        )
        del live
        _free()
    return Ablation(table, scores, len(chats.lengths), len(pairs.lengths))


def _held_out(table: Table, method: Method, template: ChatTemplate) -> TokenizedDataset:
    spec, config = table.held_out(method)
    data = prepare([spec], method, config, template, what="held-out")
    for line in data.report.lines():
        logger.info(line)
    return data


def _likelier(logps: Logps) -> float:
    means = logps.means()
    return (means[:, 0] > means[:, 1]).double().mean().item()


# -- the table as text -----------------------------------------------------------------------------------------------

HEADER = ["arm", "held-out chat loss", "preference accuracy", "margin (nats)", "likelier a token"]


def table_rows(result: Ablation) -> list[tuple[str, ...]]:
    """The table's cells, the bare base first."""

    def cell(value: float | None, form: str, error: float | None = None) -> str:
        return "" if value is None else f"{value:{form}}" + ("" if error is None else f" ± {error:.3f}")

    return [
        (
            arm,
            f"{score.chat_loss:.4f}",
            cell(score.accuracy, ".3f", score.accuracy_error),
            cell(score.margin, "+.3f", score.margin_error),
            f"{score.likelier:.3f}",
        )
        for arm, score in result.scores.items()
    ]


def legend(result: Ablation) -> list[str]:
    """The meaning of the columns."""
    return [
        f"Chat loss: nats a supervised token over {result.conversations:,} held-out conversations.",
        f"Preference accuracy and margin: over {result.pairs:,} held-out pairs, by how much likelier the arm made each response "
        "than the bare base (log-ratio, summed over the response); ± is one standard error.",
        "Likelier a token: share of pairs whose chosen response has the higher mean log-probability; needs no reference.",
    ]


def table_lines(result: Ablation) -> list[str]:
    """The table in Markdown."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table_rows(result)]
    cells = [HEADER, ["---"] * len(HEADER), *rows]
    return [f"# {result.table.name}", "", *(f"| {' | '.join(c)} |" for c in cells), "", *legend(result)]
