"""A table of ablations: the chains of stages to train, and the held-out rows that all of them are compared on.

A file of the folder ``configs/tables``, or one's own::

    output_dir: runs/ablations
    keys: {seed: 1}                    # for every stage, below its own file's
    arms:
      dSFT: [{sft: ablations/dsft-1}]
      dDPO + dSFT: [{sft: ablations/dsft-1}, {dpo: ablations/ddpo-dsft}]
    chat: {path: HuggingFaceH4/ultrachat_200k, split: test_sft}
    preferences: {path: HuggingFaceH4/ultrafeedback_binarized, split: test_prefs}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...client.jobs import validated
from ...config.load import DatasetSpec, Loaded, Method, RunConfig, find_config, load_config
from ...config.strict_yaml import read_yaml
from ...errors import UserError

PLACED = ("output_dir", "adapters", "stage")  # keys that the table sets, or the stages' files
BASE = "base"  # name of the bare base's row in the result
# the two published sets; ``--chat`` and ``--preferences`` name copies of them
CHAT, PREFERENCES = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"


class TableSpec(BaseModel):
    """The schema of a table's file."""

    model_config = ConfigDict(extra="forbid")

    output_dir: str = "runs/ablations"
    keys: dict[str, Any] = {}  # of the configuration, for every stage
    arms: dict[str, list[dict[Method, str]]] = Field(min_length=1)  # name → {method: configuration}, bottom first
    chat: DatasetSpec = DatasetSpec(path=CHAT, split="test_sft")
    preferences: DatasetSpec = DatasetSpec(path=PREFERENCES, split="test_prefs")

    @field_validator("keys")
    @classmethod
    def _check_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in PLACED:
                raise ValueError(f"{key} is the table's decision, no key for every stage")
            if key not in RunConfig.model_fields:
                raise ValueError(f"there is no key {key!r}; docs/configuration.md lists them")
        return value

    @field_validator("arms")
    @classmethod
    def _check_arms(cls, value: dict[str, list[dict[Method, str]]]) -> dict[str, list[dict[Method, str]]]:
        for name, stages in value.items():
            if name == BASE:
                raise ValueError(f"an arm cannot be called {BASE!r}, which is the name of the bare base")
            if not stages:
                raise ValueError(f"arm {name!r} has no stage")
            if any(len(entry) != 1 for entry in stages):
                raise ValueError(f"arm {name!r}: every entry is one stage, {{sft: FILE}} or {{dpo: FILE}}")
        return value


@dataclass(frozen=True)
class ArmStage:
    """One stage of an arm, shared by arms that start with the same stages.

    Attributes:
        method: sft or dpo.
        file: its configuration, as named in the table.
        loaded: resolved, with the table's ``output_dir`` and ``adapters``.
        below: the stages below it, bottom first.
    """

    method: Method
    file: str
    loaded: Loaded
    below: tuple[tuple[Method, str], ...]

    @property
    def name(self) -> str:
        return self.loaded.config.stage


@dataclass(frozen=True)
class Table:
    """A resolved table.

    Attributes:
        name: the file's, without suffix.
        run: the folder of all its stages.
        arms: name → stages, bottom first.
        chat, preferences: the held-out rows.
        whole: whether all arms of the file are included.
    """

    name: str
    run: Path
    arms: dict[str, list[ArmStage]]
    chat: DatasetSpec
    preferences: DatasetSpec
    whole: bool = True

    @property
    def result(self) -> Path:
        """The result's path without suffix; the result of some arms does not replace that of the whole table."""
        return self.run / (self.name if self.whole else f"{self.name}-some")

    def stages(self) -> list[ArmStage]:
        """Every stage once, each after those below it."""
        return list({stage.name: stage for arm in self.arms.values() for stage in arm}.values())


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
    run, scoped = Path(out or spec.output_dir), _scopes(words)
    copies = {CHAT: chat, PREFERENCES: preferences}
    arms: dict[str, list[ArmStage]] = {}
    known: dict[str, ArmStage] = {}
    for arm, entries in spec.arms.items():
        if only and arm not in only:
            continue
        chain = arms[arm] = []
        for entry in entries:
            ((method, file),) = entry.items()
            stage = _stage(method, file, spec.keys, run, scoped, copies, chain)
            first = known.setdefault(stage.name, stage)
            if (first.method, first.file, first.below) != (stage.method, stage.file, stage.below):
                raise UserError(
                    f"arm {arm!r}: its stage {stage.name!r} ({file}) shares its name with another one, of another file or "
                    "on other stages.",
                    "Give each its own `stage:` in its configuration.",
                )
            chain.append(first)
    if unused := sorted(set(scoped) - {"", "sft", "dpo", *known}):
        raise UserError(
            f"the command line: {unused[0]}.…: no stage of this table is called so, and it is no key.",
            f"Stages: {', '.join(sorted(known))}. A key for one of them is written {min(known)}.KEY=VALUE.",
        )
    return Table(
        path.stem, run, arms, _copied(spec.chat, copies), _copied(spec.preferences, copies), len(arms) == len(spec.arms)
    )


def _stage(
    method: Method,
    file: str,
    keys: dict[str, Any],
    run: Path,
    scoped: dict[str, list[str]],
    copies: dict[str, str | None],
    below: list[ArmStage],
) -> ArmStage:
    """Resolve a stage on top of others."""
    name = load_config(method, file, []).config.stage
    try:
        load_config(method, file, [], keys)
    except UserError as error:
        raise UserError(f"the table's keys do not fit: {error.message}", error.hint) from None
    adapters = f"[{run / below[-1].name / 'adapter'}]" if below else "none"
    words = [word for scope in ("", method, name) for word in scoped.get(scope, [])]
    loaded = load_config(method, file, [*words, f"output_dir={run}", f"adapters={adapters}"], keys)
    config: RunConfig = loaded.config
    assert config.stage == name, "stage is in PLACED"
    sets = {key: [_copied(entry, copies) for entry in getattr(config, key)] for key in ("dataset", "eval_dataset")}
    loaded.config = config.model_copy(update=sets)
    return ArmStage(method, file, loaded, tuple((stage.method, stage.file) for stage in below))


def _copied(entry: DatasetSpec, copies: dict[str, str | None]) -> DatasetSpec:
    folder = copies.get(entry.path)
    return entry.model_copy(update={"path": folder}) if folder else entry


def _scopes(words: Sequence[str]) -> dict[str, list[str]]:
    """``key=value`` words by scope: "" for all stages, a method, or a stage. ``--key value`` is one word."""
    keys = set(RunConfig.model_fields)
    scoped: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" not in word and rest:
            word = f"{word}={rest.pop(0)}"
        word = word.lstrip("-")
        head, dot, tail = word.split("=", 1)[0].partition(".")
        scope = head if dot and head.replace("-", "_") not in keys else ""
        key = (tail.partition(".")[0] if scope else head).replace("-", "_")
        if key in PLACED:
            raise UserError(
                f"the command line: {key} is the table's decision.",
                "Choose the folder with --out; the order and names of stages in the table and the stages' files.",
            )
        scoped.setdefault(scope, []).append(word.removeprefix(f"{scope}." if scope else ""))
    return scoped
