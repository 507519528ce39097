"""What the files of an adapter's folder say: who wrote it, by which method, on what base, and its training log.

Nothing is executed or unpickled: ``training_args.bin`` is never opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.strict_yaml import read_front_matter, read_yaml
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, stages_of
from ..io.text import read_object, read_text
from ..model.overlap import tuned_from
from ..model.peft_io import CARD, CONFIG_NAME, AdapterFile, fetch_adapter, read_adapter
from ..monitor.stage_record import json_lines

LOG, TRAINER_LOG = "trainer_state.json", "trainer_log.jsonl"
# files of a hub adapter that are fetched in addition to its weights and configuration
BESIDE = [CARD, LOG, TRAINER_LOG, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
TOKENIZER = "tokenizer_config.json"
_TOOLS = {  # words of a card, the most specific tool first
    "LLaMA-Factory": ("llama-factory", "llamafactory"),
    "Axolotl": ("axolotl",),
    "Unsloth": ("unsloth",),
    "torchtune": ("torchtune",),
    "the alignment handbook": ("alignment-handbook",),
    "TRL": ("trl",),
}
_PREFERENCE = ("dpo", "orpo", "kto", "ipo", "cpo", "simpo")


@dataclass
class Evidence:
    """What is known of an adapter before a model is loaded.

    Attributes:
        adapter: its weights and adapter_config.json.
        stage, info: the stage of a run that it belongs to, and its stage.json (None and {} elsewhere).
        tool: the program that wrote it.
        method: sft or dpo; None if unknown.
        base: the base that it names.
        tuned_from: the model that its card says it was fine-tuned from.
        settings: config.yaml of the stage.
        log: records of its trainer: step, loss, rewards/accuracies, …
        tokenizer_from: the folder of its tokenizer, or None.
    """

    adapter: AdapterFile
    stage: StageDir | None = None
    info: dict[str, Any] = field(default_factory=dict)
    tool: str = "an unknown tool (PEFT)"
    method: str | None = None
    base: str | None = None
    tuned_from: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    tokenizer_from: Path | None = None

    @property
    def path(self) -> Path:
        return self.adapter.path

    @property
    def links(self) -> list[dict[str, Any]]:
        """The adapters below it (path, sha256) by stage.json."""
        return self.info.get("adapters") or []

    @property
    def is_delta(self) -> bool:
        """Whether it is the own part of a stage, which needs the adapters below it."""
        return self.stage is not None and self.path.name == "delta"

    def holds(self, adapter: AdapterFile) -> bool:
        """Whether stage.json names another adapter as below this one."""
        return any(link.get("sha256") == adapter.sha256 for link in self.links)


def gather(name: str) -> Evidence:
    """Read an adapter: its folder, a stage's or a run's folder, or a hub id.

    Raises:
        UserError: there is no adapter, or it cannot be read.
    """
    folder = adapter_folder(name)
    evidence = Evidence(read_adapter(folder))
    evidence.base = evidence.adapter.config.get("base_model_name_or_path") or None
    if (folder / TOKENIZER).is_file():
        evidence.tokenizer_from = folder
    stage = StageDir(folder.parent)
    info = stage.info() if folder.name in ("adapter", "delta") else None
    if info is not None:
        _read_stage(evidence, stage, info)
    else:
        _read_card(evidence)
        _read_log(evidence)
    return evidence


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, of a stage's adapter, or of the only stage of a run; a hub adapter is fetched.

    Raises:
        UserError: there is none, or the run has several stages.
    """
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


def _read_stage(evidence: Evidence, stage: StageDir, info: dict[str, Any]) -> None:
    evidence.stage, evidence.info, evidence.tool, evidence.method = stage, info, "zephyr-lite", info.get("method")
    if info.get("engine", "fused") != "fused":
        evidence.tool += f" (engine {info['engine']})"
    evidence.base = (info.get("base") or {}).get("name_or_path") or evidence.base
    if evidence.tokenizer_from is None and (stage.adapter / TOKENIZER).is_file():
        evidence.tokenizer_from = stage.adapter
    if stage.config.is_file():
        evidence.settings = read_yaml(stage.config)
    evidence.log = json_lines(stage.metrics)


def _read_card(evidence: Evidence) -> None:
    path = evidence.path / CARD
    if not path.is_file():
        return
    front, body = read_front_matter(read_text(path))
    tags = front.get("tags")
    words = [str(tag).lower() for tag in tags] if isinstance(tags, list) else []
    words += [str(front.get("library_name", "")).lower(), str(front.get("base_model", "")).lower()]
    for tool, names in _TOOLS.items():
        if any(name in word for name in names for word in words) or any(f"/{name}" in body.lower() for name in names):
            evidence.tool = tool
            break
    methods = [word.removeprefix("trl-") for word in words]
    if any(method in _PREFERENCE for method in methods):
        evidence.method = "dpo"
    elif "sft" in methods:
        evidence.method = "sft"
    evidence.tuned_from = tuned_from(evidence.path)


def _read_log(evidence: Evidence) -> None:
    """``trainer_state.json`` of transformers' Trainer, here or in the newest checkpoint, or LLaMA-Factory's log."""
    checkpoints = [p for p in evidence.path.glob(f"checkpoint-*/{LOG}") if p.parent.name.split("-")[-1].isdigit()]
    checkpoints.sort(key=lambda p: int(p.parent.name.split("-")[-1]), reverse=True)
    state = next((path for path in (evidence.path / LOG, *checkpoints) if path.is_file()), None)
    if state is not None:
        evidence.log = read_object(state, strict=False).get("log_history") or []
    else:
        evidence.log = json_lines(evidence.path / TRAINER_LOG)
    if evidence.method is None and evidence.log:
        rewards = any(str(key).endswith("rewards/accuracies") for record in evidence.log for key in record)
        evidence.method = "dpo" if rewards else "sft"
