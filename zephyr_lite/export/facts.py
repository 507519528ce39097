"""What is known of a model that was made here, for its card: gathered from the folder, its run, and the evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.load import RunConfig, read_dumped
from ..errors import UserError
from ..io.run_dir import StageDir, read_json
from ..io.stage_info import checked
from ..merge.weights import MARK
from ..model.base import fingerprint
from ..model.shards import local_folder

Say = Callable[[str], None]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


@dataclass
class StageFacts:
    """One stage of training.

    Attributes:
        name, method, engine: sft or dpo; fused, trl or unsloth.
        config: as it was trained with.
        info: its stage.json.
        sha256: of its own adapter.
        folder: where it lies.
    """

    name: str
    method: str
    engine: str
    config: RunConfig
    info: dict[str, Any]
    sha256: str
    folder: Path


@dataclass
class Facts:
    """Of a folder that ``merge`` made.

    Attributes:
        folder: the model, or the adapter (``adapter``).
        mark: its zephyr_lite.json.
        base: what people know the base as; a local one by its folder's name alone.
        base_id: its hub id, where it has one.
        stages: those that were found, from the bottom up.
        lost: adapters without a stage.
        results: kind → an evaluation's JSON.
        pictures: name → a picture that an evaluation made.
        measure: what the merge was measured to change (``merge.measure.MergeMeasure.as_dict``).
        license: of the base, where its files say.
    """

    folder: Path
    mark: dict[str, Any]
    base: str
    base_id: str | None
    adapter: bool
    stages: list[StageFacts] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    measure: dict[str, Any] = field(default_factory=dict)
    license: str | None = None


def gather(folder: Path, *, run: Path | None = None, say: Say = lambda line: None) -> Facts:
    """Read what a card says.

    Args:
        folder: as ``merge`` made it.
        run: the run's folder or a stage's, where it is not any more where it was when it was merged.

    Raises:
        UserError: the folder is not one that ``merge`` made, or ``run`` is none, or another one.
    """
    mark = read_json(folder / MARK) if folder.is_dir() else None
    if mark is None or not isinstance(mark.get("adapters"), list) or not isinstance(mark.get("base"), dict):
        raise UserError(
            f"{folder}: is no folder that zephyr-lite merge made (it has no {MARK}), so nothing is known of it.",
            "Make it: zephyr-lite merge --out model/",
        )
    if run is not None and not run.is_dir():
        raise UserError(f"--run {run}: no such folder.", "Give the run that the model was merged from.")
    if run is not None and (run / "stage.json").is_file():  # a stage of it
        run = run.resolve().parent
    name = str(mark["base"].get("name_or_path", ""))
    base_id = hub_id(name)
    facts = Facts(
        folder, mark, base_id or f"{Path(name).name} (a local folder)", base_id, "adapter" in str(mark["kind"])
    )
    for link in mark["adapters"]:
        stage = _stage(link, run)
        if stage is None:
            facts.lost.append(link)
            hint = "" if run is not None else "; --run says where the run is now"
            say(f"{link.get('path')}: no finished stage of this content there, so the card says only its hash{hint}")
            continue
        if stage.sha256 != (stage.info.get("own") or {}).get("sha256"):  # adapter/ holds the stages below too
            for part in stage.info.get("adapters") or []:
                below = _stage({**part, "path": str(stage.folder.parent / str(part.get("path")))}, None)
                facts.stages += [below] if below is not None else []
                facts.lost += [part] if below is None else []
        facts.stages.append(stage)
    if run is not None and not facts.stages:
        raise UserError(
            f"--run {run}: none of its stages is what {folder} was merged from.",
            "Give the run that it was merged from; without --run the card says only hashes.",
        )
    _results(facts, say)
    measured = mark.get("measured")
    facts.measure = measured if isinstance(measured, dict) else {}
    facts.license = _license(local_folder(name)) if name else None
    return facts


def hub_id(name: str) -> str | None:
    """The name, where it is a hub id and no folder of this machine; paths are nobody else's business."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _stage(link: Mapping[str, Any], run: Path | None) -> StageFacts | None:
    place = Path(str(link.get("path", "")))
    path = place.parent if run is None else run / place.parent.name
    stage = StageDir(path)
    info = stage.info()
    if info is None or info.get("status") != "complete":
        return None
    checked(info, path / "stage.json")
    own = info.get("own") or {}
    if link.get("sha256") not in (own.get("sha256"), info.get("adapter_sha256")):
        return None
    config = RunConfig.model_validate(read_dumped(stage.config))
    engine = str(info.get("engine", "fused"))
    return StageFacts(path.name, str(info.get("method", "sft")), engine, config, info, str(link["sha256"]), path)


def _results(facts: Facts, say: Say) -> None:
    """Evaluations of this very model: of the stage it was merged from, and of the folder."""
    wanted = [link.get("sha256") for link in facts.mark["adapters"]]
    folders = [stage.folder / "eval" for stage in facts.stages[-1:]]
    folders.append(facts.folder.with_name(f"{facts.folder.resolve().name}-eval"))
    for place in folders:
        for path in sorted(place.glob("*.json")):
            told = read_json(path) or {}
            if not isinstance(told.get("models"), dict) or path.stem.endswith("-partial"):
                continue
            found = [link.get("sha256") for link in told.get("adapters") or []]
            whole = not found and (told.get("base") or {}).get("fingerprint") == _fingerprint(facts.folder)
            if found != wanted and not whole:
                say(f"{path}: is of other adapters, and left out of the card")
                continue
            if re.search(r"-limit-\d+$", path.stem):
                say(f"{path}: is a trial on a few rows, and left out of the card")
                continue
            facts.results[path.stem] = told
            if (picture := path.with_suffix(".png")).is_file():
                facts.pictures[path.stem] = picture


def _fingerprint(folder: Path) -> str | None:
    return fingerprint(folder) if (folder / "config.json").is_file() else None


def _license(folder: Path | None) -> str | None:
    """What the front matter of the base's own card says."""
    card = folder / "README.md" if folder is not None else None
    if card is None or not card.is_file() or card.stat().st_size > 2**20:
        return None
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    found = re.search(r"^license:\s*['\"]?([\w.-]+)['\"]?\s*$", head, re.MULTILINE) if head.startswith("---") else None
    return found[1] if found else None


def history(stage: StageFacts) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl, by step; a broken line is left out."""
    lines = []
    path = StageDir(stage.folder).metrics
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            told = json.loads(line)
        except ValueError:
            continue
        if isinstance(told, dict) and isinstance(told.get("step"), int):
            lines.append(told)
    return lines
