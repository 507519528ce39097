"""The held-out rows that a trained model is judged on: a stage's own, or a file of the user's, prepared as training would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.load import DPO_DEFAULTS, DatasetSpec, Method, RunConfig, read_dumped
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..io.redact import refuse_secrets
from ..io.run_dir import StageDir, stages_of
from ..io.text import short
from ..model.chain import Chain
from ..model.loaded import Say

_WHAT = {"sft": "conversations", "dpo": "preference pairs"}


@dataclass(frozen=True)
class HeldOut:
    """Rows, and where they come from.

    Attributes:
        method: sft for conversations, dpo for pairs.
        origin: in words: ``runs/a/sft's eval_dataset``, or the file.
        config: what they were prepared with: the stage's, or the recipe's where no stage says.
        stage: whose configuration that is; None: the recipe's.
        data: prepared.
        named: by ``--data``, and so not what the stage itself holds out.
        limit: so many rows of each data set, or None: all.
    """

    method: Method
    origin: str
    specs: list[DatasetSpec]
    config: RunConfig
    stage: StageDir | None
    data: TokenizedDataset
    named: str | None = None
    limit: int | None = None

    def kind(self, name: str) -> str:
        """What a result on these rows is called: ``loss``; ``loss-limit-8`` of a trial, which replaces no complete result;
        ``loss-mine`` of other rows than those that a run holds out, ``--data my/mine.jsonl``."""
        other = ""
        if self.named is not None and self.stage is not None:
            place = self.named.rstrip("/").rsplit("/", 1)[-1]
            other = re.sub(r"[^\w-]+", "_", re.sub(r"\.(jsonl|json|csv|parquet)$", "", place)).strip("_") or "data"
            other = f"-{other}" + (
                f"-{split}" if (split := re.sub(r"\W+", "_", self.specs[0].split or "").strip("_")) else ""
            )
        return f"{name}{other}" + (f"-limit-{self.limit}" if self.limit is not None else "")

    def as_dict(self) -> dict[str, Any]:
        """What a result keeps of them: enough to read the same rows again."""
        keys = ("max_length", "max_prompt_length", "loss_on", "system", "seed")
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
    say: Say = lambda line: None,
) -> HeldOut:
    """Rows to judge the models of a chain on.

    Args:
        chain: its stages' configurations say how rows are prepared; None for a model's folder.
        template: of the models.
        method: sft for conversations, dpo for preference pairs.
        data: a file, a folder or a hub id; None: the ``eval_dataset`` of the chain's topmost stage of this method, or
            of another stage of the same run.
        split: of ``data``.
        limit: so many rows of each data set, by a draw seeded as the stage is.
        max_length: shorter than the stage's.

    Raises:
        UserError: nothing is held out and no data is given; the rows cannot be read.
    """
    if split is not None and data is None:
        raise UserError("--split goes with --data.", "Name the data set with --data, or leave --split out.")
    stage, config = _stage_of(chain, method, rows_wanted=data is None)
    if data is not None:
        origin, specs = data, [_spec(data, split)]
        if config is not None and any(_same(specs[0], trained) for trained in config.dataset):
            say(f"{data}: are the rows that {stage.path if stage else 'the stage'} was trained on, not held-out ones")
    elif stage is None or config is None:
        raise UserError(
            f"no stage says which {_WHAT[method]} to judge on.",
            f"Name {_WHAT[method]} that it was not trained on: --data FILE (or a hub id, with --split).",
        )
    else:
        origin, specs = f"{stage.path}'s eval_dataset", list(config.eval_dataset)
    if limit is not None:
        specs = [spec.model_copy(update={"limit": min(limit, spec.limit or limit)}) for spec in specs]
    config = config or RunConfig.model_validate({"max_length": DPO_DEFAULTS["max_length"]} if method == "dpo" else {})
    if max_length is not None:
        config = config.model_copy(update={"max_length": min(max_length, config.max_length)})
    prepared = prepare(specs, method, config, template, what="held-out")
    return HeldOut(method, origin, specs, config, stage, prepared, data, limit)


def stage_config(stage: StageDir) -> RunConfig:
    """The configuration that a stage was trained with.

    Raises:
        UserError: config.yaml is gone, or not one that a run wrote.
    """
    try:
        return RunConfig.model_validate(read_dumped(stage.config))
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise UserError(f"{stage.config}: is not what a run writes: {short(what, 300)}.", "Restore the file.") from None


def stages_below(chain: Chain) -> Iterator[StageDir]:
    """The stages that a chain's adapters lie in, the topmost first; adapters that lie elsewhere are passed over."""
    if chain.run is not None and chain.stage is not None:
        yield StageDir(chain.run / chain.stage)
    for adapter in reversed(chain.adapters):
        stage = StageDir(adapter.path.parent)
        own = chain.run is not None and chain.stage == stage.path.name and chain.run == stage.run
        if adapter.path.name in ("adapter", "delta") and not own and stage.info() is not None:
            yield stage


def _stage_of(chain: Chain | None, method: Method, *, rows_wanted: bool) -> tuple[StageDir | None, RunConfig | None]:
    """The stage whose settings prepare the rows; with ``rows_wanted`` it has to hold some out."""
    if chain is None:
        return None, None
    stages = list(stages_below(chain))
    if chain.run is not None:
        stages += [stage for stage in stages_of(chain.run) if stage.path not in {s.path for s in stages}]
    empty: StageDir | None = None
    for stage in stages:
        if (stage.info() or {}).get("method") != method:
            continue
        config = stage_config(stage)
        if config.eval_dataset or not rows_wanted:
            return stage, config
        empty = empty or stage
    if empty is not None:
        raise UserError(
            f"{empty.path}: nothing was held out (its configuration has no eval_dataset).",
            f"Name {_WHAT[method]} that it was not trained on: --data FILE (or a hub id, with --split).",
        )
    return None, None


def _same(data: DatasetSpec, trained: DatasetSpec) -> bool:
    """Whether both name the same rows: the same place and split, or the file that is the split in the other's folder."""
    one, other = (Path(spec.path).expanduser().resolve() for spec in (data, trained))
    if data.path == trained.path or (one == other and one.exists()):
        return data.split == trained.split
    for file, folder, split in ((one, other, trained.split), (other, one, data.split)):
        if split is not None and file.is_file() and folder in (file.parent, file.parent.parent):
            return file.stem == split
    return False


def _spec(data: str, split: str | None) -> DatasetSpec:
    refuse_secrets({"--data": data, "--split": split or ""}, "the command line")
    try:
        return DatasetSpec(path=data, split=split)
    except ValidationError as error:
        raise UserError(f"--data {short(data)}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None
