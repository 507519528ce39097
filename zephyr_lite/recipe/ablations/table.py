"""A table of ablations: which chains of stages are trained, and the held-out rows that all of them are compared on.

A file of the folder ``configs/tables``, or one's own::

    output_dir: runs/ablations
    keys: {seed: 1}                    # for every stage, below what its own file says
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

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ...config.load import DatasetSpec, Loaded, Method, RunConfig, load_config
from ...config.presets import preset_configs
from ...config.strict_yaml import read_yaml
from ...errors import UserError
from ...io.text import is_file, refuse_special

# what the table decides itself, by its arms, its ``output_dir`` and the stages' files
PLACED = ("output_dir", "adapters", "stage")
# the name of the bare base's row in the result
BASE = "base"
# the two published sets; ``--chat`` and ``--preferences`` name copies of them
CHAT, PREFERENCES = "HuggingFaceH4/ultrachat_200k", "HuggingFaceH4/ultrafeedback_binarized"


class TableSpec(BaseModel):
    """The schema of a table's file."""

    model_config = ConfigDict(extra="forbid")

    output_dir: str = "runs/ablations"
    keys: dict[str, Any] = {}  # of the configuration, for every stage
    arms: dict[str, list[dict[Method, str]]] = Field(min_length=1)  # name → {method: configuration}, from the bottom up
    chat: DatasetSpec = DatasetSpec(path=CHAT, split="test_sft")
    preferences: DatasetSpec = DatasetSpec(path=PREFERENCES, split="test_prefs")

    @field_validator("keys")
    @classmethod
    def _keys_of_stages(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in PLACED:
                raise ValueError(f"{key} is the table's decision, no key for every stage")
            if key not in RunConfig.model_fields:
                raise ValueError(f"there is no key {key!r}; docs/configuration.md lists them")
        return value

    @field_validator("arms")
    @classmethod
    def _one_stage_an_entry(cls, value: dict[str, list[dict[Method, str]]]) -> dict[str, list[dict[Method, str]]]:
        for name, stages in value.items():
            if name == BASE:
                raise ValueError(f"an arm cannot be called {BASE!r}: the bare base is, beside the arms")
            if not stages:
                raise ValueError(f"arm {name!r} has no stage")
            if any(len(entry) != 1 for entry in stages):
                raise ValueError(f"arm {name!r}: every entry is one stage, {{sft: FILE}} or {{dpo: FILE}}")
        return value


@dataclass(frozen=True)
class ArmStage:
    """One stage of an arm: arms that begin alike share it.

    Attributes:
        method: sft or dpo.
        file: its configuration, as the table names it.
        loaded: resolved, with ``output_dir`` and ``adapters`` as the table says.
    """

    method: Method
    file: str
    loaded: Loaded

    @property
    def name(self) -> str:
        return self.loaded.config.stage


@dataclass(frozen=True)
class Table:
    """A resolved table.

    Attributes:
        name: the file's, without suffix.
        run: the folder of all its stages.
        arms: name → stages from the bottom up.
        chat, preferences: what is held out.
        whole: no arm of the file is left out.
    """

    name: str
    run: Path
    arms: dict[str, list[ArmStage]]
    chat: DatasetSpec
    preferences: DatasetSpec
    whole: bool = True

    @property
    def result(self) -> Path:
        """What the result is written to, without suffix; some of the arms do not replace the whole table."""
        return self.run / (self.name if self.whole else f"{self.name}-some")

    def stages(self) -> list[ArmStage]:
        """Every stage once, each after what it stands on."""
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
    """Read a table and resolve the configuration of each of its stages, before anything is trained.

    Args:
        name: a YAML file, or a shipped table's name.
        words: ``key=value`` for every stage; ``sft.key=value``, ``dpo.key=value`` or ``STAGE.key=value`` for those only.
        out: instead of the file's ``output_dir``.
        only: these arms.
        chat, preferences: folders that stand for the two published sets, wherever the table or a stage names them.

    Raises:
        UserError: no such table or arm, a key that does not fit, or two different stages of one name.
    """
    path = Path(name)
    shipped = preset_configs("tables")
    refuse_special(path, name)
    if not is_file(path):
        if name not in shipped:
            raise UserError(
                f"table {name}: there is no such file.", f"Give a YAML file, or a shipped table: {', '.join(shipped)}."
            )
        path = shipped[name]
    try:
        spec = TableSpec.model_validate(read_yaml(path))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        like = ", ".join(str(file) for file in shipped.values())
        raise UserError(f"{path}: {faults}.", f"The shipped tables show what one holds: {like}.") from None
    copies = {CHAT: chat, PREFERENCES: preferences}
    wanted = {arm: stages for arm, stages in spec.arms.items() if not only or arm in only}
    if unknown := [arm for arm in only if arm not in spec.arms]:
        raise UserError(f"{path}: there is no arm {unknown[0]!r}.", f"There are {', '.join(spec.arms)}.")
    run = Path(out or spec.output_dir)
    scoped = _scopes(words)
    arms = _resolve(wanted, spec, run, scoped, copies)
    if unused := set(scoped) - _known_scopes(arms):
        stages = sorted({stage.name for arm in arms.values() for stage in arm})
        raise UserError(
            f"the command line: {sorted(unused)[0]}.…: no stage of this table is called so, and it is no key.",
            f"Stages: {', '.join(stages)}. A key for one of them is written {stages[0]}.KEY=VALUE.",
        )
    chat_spec, pairs_spec = _copied(spec.chat, copies), _copied(spec.preferences, copies)
    return Table(path.stem, run, arms, chat_spec, pairs_spec, whole=len(wanted) == len(spec.arms))


def _resolve(
    wanted: dict[str, list[dict[Method, str]]],
    spec: TableSpec,
    run: Path,
    scoped: dict[str, list[str]],
    copies: dict[str, str | None],
) -> dict[str, list[ArmStage]]:
    stages: dict[str, tuple[tuple[Any, ...], ArmStage]] = {}
    arms: dict[str, list[ArmStage]] = {}
    for arm, entries in wanted.items():
        chain: list[ArmStage] = []
        identity: tuple[Any, ...] = ()
        for entry in entries:
            ((method, file),) = entry.items()
            stage = _stage(method, file, spec, run, scoped, copies, chain)
            identity = (*identity, (method, file))
            known = stages.setdefault(stage.name, (identity, stage))
            if known[0] != identity:
                raise UserError(
                    f"arm {arm!r}: its stage {stage.name!r} ({file}) shares its name with another one, of another file or "
                    "on other stages.",
                    "Give each its own `stage:` in its configuration.",
                )
            chain.append(known[1])
        arms[arm] = chain
    return arms


def _stage(
    method: Method,
    file: str,
    spec: TableSpec,
    run: Path,
    scoped: dict[str, list[str]],
    copies: dict[str, str | None],
    below: list[ArmStage],
) -> ArmStage:
    ground = f"[{run / below[-1].name / 'adapter'}]" if below else "none"
    placed = [f"output_dir={run}", f"adapters={ground}"]
    name = load_config(method, file, []).config.stage
    try:
        load_config(method, file, [], spec.keys)
    except UserError as error:  # the file alone has no fault
        raise UserError(f"the table's keys do not fit: {error.message}", error.hint) from None
    loaded = load_config(
        method, file, [*scoped.get("", []), *scoped.get(method, []), *scoped.get(name, []), *placed], spec.keys
    )
    config: RunConfig = loaded.config
    if config.stage != name:
        raise UserError(
            f"{file}: its stage is {name!r} in this table, and cannot be renamed to {config.stage!r} from outside.",
            "Name it in its file.",
        )
    loaded.config = config.model_copy(
        update={key: [_copied(entry, copies) for entry in getattr(config, key)] for key in ("dataset", "eval_dataset")}
    )
    return ArmStage(method, file, loaded)


def _copied(entry: DatasetSpec, copies: dict[str, str | None]) -> DatasetSpec:
    folder = copies.get(entry.path)
    return entry.model_copy(update={"path": folder}) if folder else entry


def _known_scopes(arms: dict[str, list[ArmStage]]) -> set[str]:
    stages = [stage for arm in arms.values() for stage in arm]
    return {"", "sft", "dpo", *(stage.name for stage in stages)}


def _scopes(words: Sequence[str]) -> dict[str, list[str]]:
    """{"": for all, "sft": …, "STAGE": …} of ``key=value`` words; ``--key value`` counts as one."""
    keys = set(RunConfig.model_fields)
    scoped: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" not in word and rest:
            word = f"{word}={rest.pop(0)}"
        key = word.lstrip("-").split("=", 1)[0]
        head, dot, _ = key.partition(".")
        scope = head if dot and head.replace("-", "_") not in keys else ""
        head = head if not scope else key.split(".")[1]
        if head.replace("-", "_") in PLACED:
            raise UserError(
                f"the command line: {head} is the table's decision.",
                "Choose the folder with --out; what stands on what, and its name, in the table and the stages' files.",
            )
        scoped.setdefault(scope, []).append(word.lstrip("-").removeprefix(f"{scope}." if scope else ""))
    return scoped
