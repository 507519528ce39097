"""The held-out rows of an evaluation: a stage's own or the user's, prepared as training prepares them."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client.endpoints import validated
from ..config.load import DPO_DEFAULTS, DatasetSpec, Method, RunConfig
from ..config.strict_yaml import read_yaml
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, general_text, prepare
from ..errors import UserError
from ..io.redact import refuse_secrets
from ..io.run_dir import StageDir, stages_of
from ..io.text import short
from ..model.chain import Chain

logger = logging.getLogger(__name__)

_UNITS = {"sft": "conversations", "dpo": "preference pairs"}


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows and their origin."""

    method: Method  # sft for conversations, dpo for pairs
    origin: str  # ``runs/a/sft's eval_dataset``, or the file
    specs: list[DatasetSpec]  # empty for general text
    config: RunConfig  # that the rows were prepared with: the stage's, or the recipe's if there is no stage
    stage: StageDir | None  # of that configuration
    data: TokenizedDataset
    named: str | None = None  # the value of ``--data``; None: the stage's own held-out rows
    limit: int | None = None  # number of rows of each data set

    def kind(self, name: str) -> str:
        """Name of a result: ``loss``; ``loss-limit-8`` for a part of the rows; ``loss-mine`` for ``--data mine.jsonl``, so
        that neither replaces the complete result on the run's own rows."""
        if self.named is not None and self.stage is not None:
            place = re.sub(r"\.(jsonl|json|csv|parquet)$", "", self.named.rstrip("/").rsplit("/", 1)[-1])
            name += "-" + (re.sub(r"[^\w-]+", "_", place).strip("_") or "data")
            if split := re.sub(r"\W+", "_", self.specs[0].split or "").strip("_"):
                name += f"-{split}"
        return name if self.limit is None else f"{name}-limit-{self.limit}"

    def as_dict(self) -> dict[str, Any]:
        """The result's entry on its rows: enough to read the same rows again."""
        keys = ("max_length", "max_prompt_length", "loss_on", "system", "seed") if self.specs else ()
        return {
            "origin": self.origin,
            "datasets": [spec.model_dump(mode="json", exclude_defaults=True) for spec in self.specs],
            "rows": len(self.data.lengths),
            "supervised_tokens": self.data.report.supervised,
            "fingerprint": self.data.fingerprint,
            **{key: getattr(self.config, key) for key in keys if self.method == "dpo" or key != "max_prompt_length"},
        }


def held_out(
    chain: Chain | None,
    template: ChatTemplate,
    method: Method,
    *,
    data: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
) -> HeldOut:
    """Prepare rows to evaluate the models of a chain on.

    Args:
        chain: its stages' configurations say how rows are prepared; None for a model's folder.
        template: of the models.
        method: sft for conversations, dpo for preference pairs.
        data: a file, a folder or a hub id; None: the ``eval_dataset`` of the chain's topmost stage of this method, or
            of another stage of the same run.
        split: of ``data``.
        limit: number of rows of each data set, drawn with the stage's seed.
        max_length: upper limit on the stage's.

    Raises:
        UserError: nothing is held out and no data is given; the rows cannot be read.
    """
    if split is not None and data is None:
        raise UserError("--split goes with --data.", "Name the data set with --data, or leave --split out.")
    stages = [] if chain is None else _stages(chain)
    stages = [each for each in stages if (each.info() or {}).get("method") == method]
    configs = [(each, RunConfig.model_validate(read_yaml(each.config))) for each in stages]
    stage, config = next((found for found in configs if found[1].eval_dataset or data is not None), (None, None))
    if data is not None:
        refuse_secrets({"--data": data, "--split": split or ""}, "the command line")
        spec = validated(DatasetSpec, {"path": data, "split": split}, f"--data {short(data)}")
        origin, specs, place = data, [spec], Path(spec.path).expanduser().resolve()
        trained = [] if config is None else [(Path(each.path).resolve(), each.split) for each in config.dataset]
        if stage is not None and (place, split) in trained:
            logger.info(f"{data}: are the rows that {stage.path} was trained on, not held-out ones")
    elif config is not None and stage is not None:
        origin, specs = f"{stage.path}'s eval_dataset", list(config.eval_dataset)
    else:
        found = f"no stage says which {_UNITS[method]} to evaluate on."
        if configs:
            found = f"{configs[0][0].path}: nothing was held out (its configuration has no eval_dataset)."
        hint = f"Name {_UNITS[method]} that it was not trained on: --data FILE (or a hub id, with --split)."
        raise UserError(found, hint)
    if limit is not None:
        specs = [spec.model_copy(update={"limit": min(limit, spec.limit or limit)}) for spec in specs]
    recipe = RunConfig.model_validate({"max_length": DPO_DEFAULTS["max_length"]} if method == "dpo" else {})
    if config is None:
        config = recipe
    elif (
        data is not None and config.val_size == "auto"
    ):  # max_length may have been chosen for the stage's own short rows
        config = config.model_copy(update={"max_length": max(config.max_length, recipe.max_length)})
    if max_length is not None:
        config = config.model_copy(update={"max_length": min(max_length, config.max_length)})
    prepared = prepare(specs, method, config, template, what="held-out")
    return HeldOut(method, origin, specs, config, stage, prepared, data, limit)


def general_rows(template: ChatTemplate) -> HeldOut:
    """The passages of ``general_text``."""
    return HeldOut("sft", "general text", [], RunConfig(), None, general_text(template))


def _stages(chain: Chain) -> list[StageDir]:
    """The stages that a chain's adapters are in, the topmost first, then the other stages of its run."""
    own = [chain.run / chain.stage] if chain.run is not None and chain.stage is not None else []
    below = [a.path.parent for a in reversed(chain.adapters) if a.path.name in ("adapter", "delta")]
    others = [stage.path for stage in stages_of(chain.run)] if chain.run is not None else []
    unique: dict[Path, Path] = {}
    for path in [*own, *below, *others]:
        unique.setdefault(path.resolve(), path)
    return [StageDir(path) for path in unique.values()]
