"""Checks of an adapter's files: tool, method and base, whether it was trained, and which adapters belong below it. No code is
run and nothing is unpickled: ``training_args.bin`` is never opened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import partialmethod
from pathlib import Path
from typing import Any

from transformers.trainer_utils import get_last_checkpoint

from ..config.schema import RunConfig
from ..config.strict_yaml import read_front_matter, read_yaml
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, stages_of
from ..io.text import read_object, read_text, shown
from ..model.chain import chain_of_run
from ..model.overlap import overlap, same_name, tuned_from
from ..model.peft_io import CARD, CONFIG_NAME, AdapterFile, fetch_adapter, read_adapter
from ..monitor.charts import is_number
from ..monitor.records import json_lines
from ..train.losses import initial_loss

LN2 = math.log(2)
# distance of DPO's first logged loss from the known one, a share of it where it is above 1: noise of bfloat16, and the change
# in a few steps of warm-up
FIRST_STEP, FIRST_STEPS = 0.02, 0.1
LOG = "trainer_state.json"
# files of a hub adapter that are fetched in addition to its weights and configuration
BESIDE = [CARD, LOG, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
TOPICS = ("weights", "base", "below", "reference", "bos", "end", "template")
_METHODS = ("dpo", "orpo", "kto", "ipo", "cpo", "simpo", "sft")  # tags of a card


class Level(IntEnum):
    """Severity of a finding; the verdict is that of the worst."""

    right = 0
    note = 1
    doubtful = 2
    wrong = 3


@dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    topic: str  # one of ``TOPICS``
    level: Level
    text: str
    evidence: tuple[str, ...] = ()  # numbers and files that it follows from
    advice: str = ""


@dataclass
class Audit:
    """All findings on an adapter."""

    adapter: str  # its folder
    tool: str
    method: str | None
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)  # measurements, for the JSON

    def add(self, level: Level, topic: str, text: str, *evidence: str, advice: str = "") -> None:
        self.findings.append(Finding(topic, level, text, evidence, advice))

    right = partialmethod(add, Level.right)
    note = partialmethod(add, Level.note)
    doubtful = partialmethod(add, Level.doubtful)
    wrong = partialmethod(add, Level.wrong)

    @property
    def level(self) -> Level:
        return max((finding.level for finding in self.findings), default=Level.right)

    @property
    def not_checked(self) -> list[str]:
        """The topics that have no finding, or only notes; an SFT adapter has no reference."""
        seen = {finding.topic for finding in self.findings if finding.level != Level.note}
        return [topic for topic in TOPICS if topic not in seen and (topic != "reference" or self.method == "dpo")]

    def verdict(self) -> str:
        """One line. Sound is only what was checked in every topic."""
        topics = ", ".join(dict.fromkeys(f.topic for f in self.findings if f.level == self.level))
        if self.level >= Level.doubtful:
            return f"{'WRONG' if self.level == Level.wrong else 'doubtful'} ({topics})"
        if "rows" not in self.numbers:
            return "no fault found in the files"
        return "no fault found" if self.not_checked else "sound"

    def as_dict(self) -> dict[str, Any]:
        findings = [{**asdict(finding), "level": finding.level.name} for finding in self.findings]
        return {**vars(self), "verdict": self.verdict(), "not_checked": self.not_checked, "findings": findings}


@dataclass
class Evidence:
    """An adapter's files, read before a model is loaded."""

    adapter: AdapterFile
    stage: StageDir | None = None  # of a run that it belongs to
    info: dict[str, Any] = field(default_factory=dict)  # its stage.json
    tool: str = "another tool (PEFT)"
    method: str | None = None  # sft, dpo, a loss without a reference, …
    base: str | None = None  # that it names
    tuned_from: str | None = None  # the model that its card says it was fine-tuned from
    settings: dict[str, Any] = field(default_factory=dict)  # config.yaml of the stage
    log: list[dict[str, Any]] = field(default_factory=list)  # records of its trainer: step, loss, rewards/accuracies, …
    tokenizer_from: Path | None = None  # the folder of its tokenizer

    @property
    def links(self) -> list[dict[str, Any]]:
        """The adapters below it (path, sha256) by stage.json."""
        return self.info.get("adapters") or []

    @property
    def is_delta(self) -> bool:
        """Whether it is the own part of a stage, which needs the adapters below it."""
        return self.stage is not None and self.adapter.path.name == "delta"


def gather(name: str) -> Evidence:
    """Read an adapter: its folder, a stage's or a run's folder, or a hub id."""
    folder = adapter_folder(name)
    found = Evidence(read_adapter(folder))
    found.base = found.adapter.config.get("base_model_name_or_path") or None
    places, stage = [folder], StageDir(folder.parent)
    info = stage.info() if folder.name in ("adapter", "delta") else None
    if info is not None:
        places.append(stage.adapter)
        found.stage, found.info, found.method = stage, info, info.get("method")
        engine = info.get("engine", "fused")
        found.tool = "zephyr-lite" if engine == "fused" else f"zephyr-lite (engine {engine})"
        found.base = (info.get("base") or {}).get("name_or_path") or found.base
        found.settings = read_yaml(stage.config) if stage.config.is_file() else {}
        losses = RunConfig.model_construct(**found.settings)
        if found.method == "dpo" and not losses.needs_reference:
            found.method = " + ".join(losses.losses)
        found.log = json_lines(stage.metrics)
    else:
        if (folder / CARD).is_file():
            tags = read_front_matter(read_text(folder / CARD))[0].get("tags")
            methods = {str(tag).lower() for tag in tags} if isinstance(tags, list) else set()
            found.method = next((method for method in _METHODS if method in methods), None)
        found.tuned_from = tuned_from(folder)
        # transformers' Trainer writes it into the folder, or into its checkpoints only
        states = [place / LOG for place in (folder, Path(get_last_checkpoint(folder) or folder))]
        if (state := next(filter(Path.is_file, states), None)) is not None:
            found.log = read_object(state).get("log_history") or []
        if found.method is None and found.log:
            rewards = any(str(key).endswith("rewards/accuracies") for record in found.log for key in record)
            found.method = "dpo" if rewards else "sft"
    found.tokenizer_from = next((place for place in places if (place / "tokenizer_config.json").is_file()), None)
    return found


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, of a stage's adapter, or of the only stage of a run; a hub adapter is fetched."""
    path = Path(name).expanduser()
    if (path / CONFIG_NAME).is_file():
        return path
    if (path / STAGE_FILE).is_file():
        return StageDir(path).adapter
    stages = [stage for stage in stages_of(path) if stage.complete()] if path.is_dir() else []
    if len(stages) > 1:
        names = ", ".join(stage.path.name for stage in stages)
        raise UserError(f"{path}: is a run with several stages ({names}).", f"Name one: {stages[-1].path}")
    return stages[0].adapter if stages else fetch_adapter(name, beside=BESIDE)


def check_files(evidence: Evidence, below: Sequence[AdapterFile], start: AdapterFile | None, audit: Audit) -> None:
    """All checks that need no model; ``below`` and ``start`` (which it was continued from) are claimed."""
    modules = list(evidence.adapter.modules.values())
    untrained = sum(not bool(weights.b.any()) for weights in modules)
    ranks = ", ".join(map(str, sorted({weights.rank for weights in modules})))
    scales = ", ".join(f"{scale:g}" for scale in sorted({round(weights.scale, 6) for weights in modules}))
    facts = f"{len(modules)} modules, {untrained} with a B of zeros, rank {ranks}, scale {scales}"
    facts += f", sha256 {evidence.adapter.sha256[:12]}"
    if untrained == len(modules):
        text = "every B is zero: the adapter was never trained and changes nothing"
        audit.wrong("weights", text, facts, advice="Take another checkpoint of it.")
    else:
        audit.right("weights", "a plain LoRA that was trained", facts)
    if evidence.stage is not None:
        _check_chain(evidence, evidence.stage, audit)
    else:
        _check_card(evidence, below, audit)
    for adapter in below:
        found = overlap(evidence.adapter, adapter)
        if found.contains:
            text = f"it was continued from {adapter.path} and contains it; with that below it, it would count twice"
            audit.wrong("below", text, found.evidence, advice=f"Give it as --start {adapter.path} instead of --below.")
        else:
            audit.right("below", f"it does not contain {adapter.path}: both can be on", found.evidence)
    if start is not None:
        found = overlap(evidence.adapter, start)
        if found.contains:
            audit.right("below", f"it was continued from {start.path}, and contains it", found.evidence)
        else:
            advice = "If that one was below it in training, give it as --below."
            audit.wrong("below", f"it was not continued from {start.path}", found.evidence, advice=advice)
    known = initial_loss(RunConfig.model_construct(**evidence.settings)) if evidence.method == "dpo" else None
    if known is not None:
        _check_log(evidence, *known, audit)


def _check_card(evidence: Evidence, below: Sequence[AdapterFile], audit: Audit) -> None:
    """Whether what the card of another tool's adapter names as its start is its base, or below it."""
    base, tuned = evidence.base, evidence.tuned_from
    if not tuned or not base or same_name(tuned, base):
        return
    facts = f"{CARD}: fine-tuned from {shown(tuned)}; adapter_config.json: base {shown(base)}"
    if any(same_name(tuned, str(adapter.path)) for adapter in below):
        audit.right("below", f"{shown(tuned)} is below it, as its card says", facts)
    else:
        text = f"its card says that it was trained from {shown(tuned)}, which is not its base: "
        text += "on the bare base it is probably another, worse model"
        advice = f"Put that below it (--below {shown(tuned)}), and wherever it is loaded."
        audit.doubtful("below", text, facts, advice=advice)


def _check_chain(evidence: Evidence, stage: StageDir, audit: Audit) -> None:
    """Whether the chain that a stage's stage.json names is complete and unchanged."""
    names = " + ".join(str(link.get("path")) for link in evidence.links)
    where = f"{stage.path}/stage.json: adapters {names or 'none'}"
    if evidence.is_delta:
        text = f"a delta: right only with {names or 'nothing'} below it"
        audit.note("below", text, where, advice=f"Load {stage.adapter} instead, which is the whole chain.")
        return
    try:
        chain_of_run(stage.run, stage=stage.path.name)
    except UserError as error:
        text = f"the chain that it was made of is incomplete: {error.message}"
        audit.doubtful("below", text, where, advice=error.hint)
        return
    parts = f"{names} and its own part in one adapter" if names else "one adapter"
    audit.right("below", f"{parts}: it belongs on the bare base", where)


def _check_log(evidence: Evidence, known: float, name: str, audit: Audit) -> None:
    """Whether the logged loss of DPO starts at the known value, as it does if the policy starts from the reference."""
    first = next((record for record in evidence.log if is_number(record.get("loss"))), None)
    if first is None:
        audit.note("reference", "its folder has no training log, so its first loss is unknown")
        return
    loss, at_first = float(first["loss"]), first.get("step") in (0, 1)
    facts = [f"loss at step {first.get('step', '?')} of its log: {loss:.4f}; {name} = {known:.4f}"]
    for key in ("rewards/margins", "rewards/accuracies"):
        if is_number(first.get(key)):
            facts.append(f"{key} {first[key]:.4g} there")
    if abs(loss - known) <= (FIRST_STEP if at_first else FIRST_STEPS) * max(1, known):
        audit.right("reference", f"its log starts at {name}: training started from its reference", *facts)
        return
    audit.add(
        Level.wrong if at_first else Level.doubtful,
        "reference",
        f"its log does not start at {name}: training did not start from its reference (often the bare base, with the SFT "
        "adapter only in the policy)",
        *facts,
        advice="Train it again against the right reference; --pairs FILE with --reference measures which it was.",
    )
