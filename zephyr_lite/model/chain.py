"""The adapters that a stage was trained on: read from its stage.json, found, and checked against their hashes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, checked, stages_of
from ..io.text import shown
from .peft_io import CARD, AdapterFile, fetch_adapter, other_base, read_adapter


@dataclass
class Chain:
    """A base and the adapters on it, from the bottom up.

    Attributes:
        base: as in stage.json: name_or_path, revision, load_in_4bit, double_quant, dtype (explicit adapters: only
            name_or_path).
        adapters: every adapter, the stage's own last.
        tokenizer_from: a folder with tokenizer and chat template, where one is known.
        run, stage: folder and stage name; None for explicit adapters.
        info: the stage's stage.json.
        notes: doubts about explicit adapters on this base, a line each.
    """

    base: dict[str, Any]
    adapters: list[AdapterFile]
    tokenizer_from: Path | None = None
    run: Path | None = None
    stage: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """The stage's folder, or the adapters, for messages."""
        if self.run is not None and self.stage is not None:
            return str(self.run / self.stage)
        return " + ".join(str(adapter.path) for adapter in self.adapters)

    def lineage(self) -> dict[str, Any]:
        """The chain's entry in a merged folder."""
        told: dict[str, Any] = {"base": self.base}
        if self.run is not None:
            told |= {"run": self.run.name, "stage": self.stage}
        return told | {"adapters": [{"path": str(a.path), "sha256": a.sha256} for a in self.adapters]}


def chain_of_run(run: str | Path, stage: str | None = None, base: str | None = None) -> Chain:
    """The chain of a run's last complete stage.

    Args:
        run: a run's folder.
        stage: a stage's name; None for the complete stage with the longest chain, the latest of those.
        base: where its base is now, if it was moved; the caller compares the fingerprint.

    Raises:
        UserError: no such run or complete stage, or an adapter is missing or has changed since the stage was trained.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", "Give a run's folder (runs/NAME), a stage's, or a model's.")
    stages = []
    for place in stages_of(folder):
        if stage in (None, place.path.name) and place.complete():
            file = place.path / STAGE_FILE
            info = checked(place.info() or {}, file, needs=("adapters", "own", "base.name_or_path"))
            stages.append((len(info["adapters"]), file.stat().st_mtime_ns, place, info))
    if not stages:
        raise UserError(
            f"{folder}: no complete stage{f' {stage}' if stage else ''} in it.",
            "Give a run's folder (runs/NAME), not a stage's or an adapter's; a stage that is not finished is resumed by the "
            "command that started it.",
        )
    _, _, chosen, info = max(stages, key=lambda stage: stage[:2])
    adapters = []
    for link in (*info["adapters"], info["own"]):
        path = chosen.path / link["path"] if link is info["own"] else _resolve(folder, link["path"])
        adapter = read_adapter(path)
        if adapter.sha256 != link["sha256"]:
            raise UserError(
                f"{path}: its content is {adapter.sha256[:12]}, but {chosen.path.name} was trained on {link['sha256'][:12]}.",
                "The adapter was changed or replaced since. Restore it, or train the stages above it again.",
            )
        adapters.append(adapter)
    moved = {} if base is None else {"name_or_path": base, "revision": "main"}
    return Chain({**info["base"], **moved}, adapters, chosen.adapter, folder, chosen.path.name, info)


def _resolve(run: Path, name: str) -> Path:
    """A frozen adapter: relative to the run's folder if it is in it, else absolute or a hub id."""
    inside = run / name
    # a missing stage of the run ("sft/adapter") is not looked for on the hub
    if inside.is_dir() or Path(name).is_absolute() or inside.name in ("adapter", "delta"):
        return inside
    return fetch_adapter(name)


def chain_of_adapters(names: list[str], base: str | None = None) -> Chain:
    """The chain of explicit adapters (folders or hub ids), on the base that the first one names unless `base` is given.

    Raises:
        UserError: an adapter cannot be read, they name different bases and none is given, or see ``check_stack``.
    """
    adapters = [read_adapter(fetch_adapter(name, beside=[CARD])) for name in names]
    named = list(dict.fromkeys(str(a.config.get("base_model_name_or_path") or "") for a in adapters))
    if base is None and (len(named) != 1 or not named[0]):
        raise UserError(
            f"the adapters name {'several bases: ' + ', '.join(named) if len(named) > 1 else 'no base'}.",
            "Say which one they belong on with --base.",
        )
    base = base or named[0]
    with_tokenizer = [a.path for a in adapters if (a.path / "tokenizer_config.json").is_file()]
    return Chain(
        {"name_or_path": base},
        adapters,
        with_tokenizer[-1] if with_tokenizer else None,
        notes=check_stack(adapters, base),
    )


def check_stack(adapters: list[AdapterFile], base: str) -> list[str]:
    """Whether explicit adapters may all be on together, on this base, as far as their files tell.

    Args:
        adapters: from the bottom up.
        base: its name or folder.

    Returns:
        doubts, a line each.

    Raises:
        UserError: one is given twice, contains another, is a delta without the adapters below it, or was never trained.
    """
    from .overlap import overlap, same_name, tuned_from

    notes = []
    for place, adapter in enumerate(adapters):
        below = adapters[:place]
        if not any(bool(weights.b.any()) for weights in adapter.modules.values()):
            raise UserError(
                f"{adapter.path}: every lora_B is zero: it was never trained and changes nothing.",
                "Take another checkpoint of it, or leave it out.",
            )
        if same := [other.path for other in below if other.sha256 == adapter.sha256]:
            raise UserError(f"{adapter.path}: is the same adapter as {same[0]} and would count twice.", "Give it once.")
        trained_on = _check_stage(adapter, below)
        if trained_on - {other.sha256 for other in below}:
            notes.append(
                f"adapter {adapter.path}: its stage.json says that it was trained on top of adapters that are not below it here"
            )
        for other in below:
            if other.sha256 not in trained_on and (
                overlap(adapter, other).contains or overlap(other, adapter).contains
            ):
                raise UserError(
                    f"{adapter.path}: contains {other.path}, or is contained in it (one's training continued from the "
                    "other); together they count what they share twice.",
                    "Give only the one that was trained last.",
                )
        if (told := other_base(adapter.config, base)) is not None:
            notes.append(f"adapter {adapter.path}: {told}")
        named = [base, str(adapter.config.get("base_model_name_or_path") or base), *(str(a.path) for a in below)]
        tuned = None if trained_on else tuned_from(adapter.path)
        if tuned is not None and not any(same_name(tuned, name) for name in named):
            notes.append(
                f"adapter {adapter.path}: its card says that it was trained from {shown(tuned)}, which is neither the base "
                "nor an adapter below it: without it the result is probably another, worse model"
            )
    return notes


def _check_stage(adapter: AdapterFile, below: list[AdapterFile]) -> set[str]:
    """Check an adapter in a stage's folder: delta/ needs the adapters below it, adapter/ already contains them. Returns the
    hashes of the adapters that a delta was trained on."""
    stage = StageDir(adapter.path.parent)
    info = stage.info() if adapter.path.name in ("adapter", "delta") else None
    if info is None:
        return set()
    checked(info, stage.path / STAGE_FILE, needs=("adapters",))
    parts = {str(link.get("sha256")) for link in info["adapters"]}
    if adapter.path.name == "delta":
        if not below:
            raise UserError(
                f"{adapter.path}: is right only on top of the adapters that it was trained on, and is the lowest here.",
                f"Give {stage.adapter}, which holds the whole chain, or put the adapters below it first.",
            )
        return parts
    if twice := [other.path for other in below if other.sha256 in parts]:
        raise UserError(
            f"{adapter.path}: holds the whole chain, {twice[0]} among it, which would count twice.",
            f"Leave {twice[0]} out, or give {stage.delta} instead.",
        )
    return set()
