"""What lies in an adapter's folder beside its weights: who wrote it, with which method, on what, and how it went.

Nothing of it is executed or unpickled: a ``training_args.bin`` is never opened.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.load import read_dumped
from ..config.strict_yaml import read_front_matter
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, stages_of
from ..io.text import is_file, read_object, read_text
from ..model.overlap import CARD, tuned_from
from ..model.peft_config import CONFIG_NAME
from ..model.peft_io import AdapterFile, fetch_adapter, read_adapter

LOG, TRAINER_LOG = "trainer_state.json", "trainer_log.jsonl"
# what is fetched of a hub adapter, beside its two files
BESIDE = [CARD, LOG, TRAINER_LOG, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"]
TOKENIZER = "tokenizer_config.json"
_TOOLS = {  # words of a card's tags or text, the most particular first
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
        stage: the stage of ours that it lies in, and its stage.json ({} elsewhere).
        tool: who wrote it.
        method: sft or dpo; None where nothing says so.
        method_because: what says so.
        base: what it says it was trained on.
        tuned_from: what its card says it is a fine-tuned version of; None where it says nothing.
        settings: the configuration that it was trained with, where it lies in a stage of ours.
        log: what its trainer logged, a record a step: loss, rewards/accuracies, …
        tokenizer_from: the folder of its tokenizer; None where it has none.
    """

    adapter: AdapterFile
    stage: StageDir | None = None
    info: dict[str, Any] = field(default_factory=dict)
    tool: str = "an unknown tool (PEFT)"
    method: str | None = None
    method_because: str = ""
    base: str | None = None
    tuned_from: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    tokenizer_from: Path | None = None

    @property
    def path(self) -> Path:
        return self.adapter.path

    def links(self) -> list[dict[str, Any]]:
        """The adapters that stage.json says lie below, path and sha256; [] elsewhere."""
        found = self.info.get("adapters")
        return [link for link in found if isinstance(link, dict)] if isinstance(found, list) else []

    def is_delta(self) -> bool:
        """Of ours: dpo's own part, which is right on top of others only."""
        return self.stage is not None and self.path.name == "delta"


def gather(name: str) -> Evidence:
    """Look at an adapter: its folder, a stage's or a run's folder of ours, or a hub id.

    Raises:
        UserError: there is no adapter, or it cannot be read.
    """
    folder = adapter_folder(name)
    evidence = Evidence(read_adapter(folder))
    evidence.base = evidence.adapter.config.get("base_model_name_or_path") or None
    if (folder / TOKENIZER).is_file():
        evidence.tokenizer_from = folder
    stage = StageDir(folder.parent)
    if folder.name in ("adapter", "delta") and (info := stage.info()) is not None:
        _ours(evidence, stage, info)
    else:
        _card(evidence)
        _logs(evidence)
    return evidence


def adapter_folder(name: str) -> Path:
    """The folder of an adapter, of a stage's finished adapter, or of a run's only one; else a hub adapter's, fetched.

    Raises:
        UserError: there is none, or the run has several stages.
    """
    path = Path(name).expanduser()
    if (path / CONFIG_NAME).is_file():
        return path
    if (path / STAGE_FILE).is_file():
        return StageDir(path).adapter
    if path.is_dir():
        stages = [stage for stage in stages_of(path) if stage.complete()]
        if len(stages) == 1:
            return stages[0].adapter
        if stages:
            names = ", ".join(stage.path.name for stage in stages)
            raise UserError(f"{path}: is a run with several stages ({names}).", f"Name one: {stages[-1].path}")
    return fetch_adapter(name, beside=BESIDE)


def _ours(evidence: Evidence, stage: StageDir, info: dict[str, Any]) -> None:
    evidence.stage, evidence.info, evidence.tool = stage, info, "zephyr-lite"
    engine = info.get("engine")
    if engine not in (None, "fused"):
        evidence.tool += f" (engine {engine})"
    evidence.method, evidence.method_because = info.get("method"), f"{stage.path / STAGE_FILE}"
    base = info.get("base")
    if isinstance(base, dict) and isinstance(base.get("name_or_path"), str):
        evidence.base = base["name_or_path"]
    if evidence.tokenizer_from is None and (stage.adapter / TOKENIZER).is_file():
        evidence.tokenizer_from = stage.adapter
    if is_file(stage.config):
        evidence.settings = read_dumped(stage.config)
    evidence.log = _lines(stage.metrics)


def _card(evidence: Evidence) -> None:
    path = evidence.path / CARD
    if not is_file(path):
        return
    text = read_text(path)
    front, body = read_front_matter(text)
    tags = front.get("tags")
    words = [str(tag).lower() for tag in tags] if isinstance(tags, list) else []
    words += [str(front.get("library_name", "")).lower(), str(front.get("base_model", "")).lower()]
    for tool, names in _TOOLS.items():
        if any(name in word for name in names for word in words) or any(f"/{name}" in body.lower() for name in names):
            evidence.tool = tool
            break
    plain = [tag.removeprefix("trl-") for tag in words]
    method = next((tag for tag in plain if tag in _PREFERENCE), None) or next((t for t in plain if t == "sft"), None)
    if method is not None:
        evidence.method = "sft" if method == "sft" else "dpo"
        evidence.method_because = f"the tag {method} of its {CARD}"
    evidence.tuned_from = tuned_from(evidence.path)


def _logs(evidence: Evidence) -> None:
    """``trainer_state.json`` of transformers' Trainer, here or in the newest checkpoint; LLaMA-Factory's log."""
    numbered = [
        (int(p.parent.name.rpartition("-")[2]), p)
        for p in evidence.path.glob(f"checkpoint-*/{LOG}")
        if p.parent.name.rpartition("-")[2].isdigit()
    ]
    states = [evidence.path / LOG, *(path for _, path in sorted(numbered, reverse=True))]
    for path in states:
        if is_file(path):
            history = read_object(path, strict=False).get("log_history")
            evidence.log = (
                [record for record in history if isinstance(record, dict)] if isinstance(history, list) else []
            )
            break
    else:
        evidence.log = _lines(evidence.path / TRAINER_LOG)
    if evidence.method is None and evidence.log:
        rewards = any(str(key).endswith("rewards/accuracies") for record in evidence.log for key in record)
        evidence.method = "dpo" if rewards else "sft"
        evidence.method_because = f"its log {'has' if rewards else 'has no'} rewards/accuracies"


def _lines(path: Path) -> list[dict[str, Any]]:
    if not is_file(path):
        return []
    records = []
    for line in read_text(path).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue  # the last line of a run that is under way
        if isinstance(record, dict):
            records.append(record)
    return records
