"""The adapters that a stage was trained on: read from its stage.json, found, and checked against their hashes."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.run_dir import STAGE_FILE, StageDir, checked, newest_run, stages_of
from ..io.text import shown
from .overlap import CARD, overlap, same_name, tuned_from
from .peft_config import other_base
from .peft_io import AdapterFile, fetch_adapter, read_adapter


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

    def lineage(self) -> dict[str, Any]:
        """The chain's entry in a merged folder."""
        told: dict[str, Any] = {"base": self.base}
        if self.run is not None:
            told |= {"run": self.run.name, "stage": self.stage}
        return told | {"adapters": [{"path": str(a.path), "sha256": a.sha256} for a in self.adapters]}


def chain_of_run(
    run: str | Path | None = None, runs_root: str | Path = "runs", stage: str | None = None, base: str | None = None
) -> Chain:
    """The chain of a run's last complete stage.

    Args:
        run: a run's folder; None for the newest one under `runs_root` with a complete stage.
        stage: a stage's name; None for the complete stage with the longest chain, the latest of those.
        base: where its base is now, if it was moved; the caller compares the fingerprint.

    Raises:
        UserError: no such run or complete stage, or an adapter is missing or has changed since the stage was trained.
    """
    folder = Path(run) if run is not None else _newest(Path(runs_root))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run.", "Give a run's folder (--run), or the adapters themselves.")
    chosen, info = _last_stage(folder, stage)
    adapters = [_checked(_resolve(folder, link["path"]), link, chosen) for link in info["adapters"]]
    adapters.append(_checked(chosen.path / info["own"]["path"], info["own"], chosen))
    moved = {} if base is None else {"name_or_path": base, "revision": "main"}
    return Chain({**info["base"], **moved}, adapters, chosen.adapter, folder, chosen.path.name, info)


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
    notes = check_stack(adapters, base or named[0])
    with_tokenizer = [a.path for a in adapters if (a.path / "tokenizer_config.json").is_file()]
    return Chain(
        {"name_or_path": base or named[0]}, adapters, with_tokenizer[-1] if with_tokenizer else None, notes=notes
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
    notes = []
    for place, adapter in enumerate(adapters):
        below = adapters[:place]
        if not any(bool(adapter.modules[name].b.any()) for name in adapter.modules):
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
    """Check an adapter in a stage's folder: delta/ needs the adapters below it, adapter/ already contains them.

    Returns:
        the hashes of the adapters that a delta was trained on; empty for any other adapter.
    """
    stage = StageDir(adapter.path.parent)
    info = stage.info() if adapter.path.name in ("adapter", "delta") else None
    if info is None:
        return set()
    if adapter.path.name == "delta" and not below:
        raise UserError(
            f"{adapter.path}: is right only on top of the adapters that it was trained on, and is the lowest here.",
            f"Give {stage.adapter}, which holds the whole chain, or put the adapters below it first.",
        )
    checked(info, stage.path / STAGE_FILE, needs=("adapters",))
    parts = {str(link.get("sha256")) for link in info["adapters"]}
    if adapter.path.name == "delta":
        return parts
    if twice := [other.path for other in below if other.sha256 in parts]:
        raise UserError(
            f"{adapter.path}: holds the whole chain, {twice[0]} among it, which would count twice.",
            f"Leave {twice[0]} out, or give {stage.delta} instead.",
        )
    return set()


def _newest(root: Path) -> Path:
    """The run whose stage was completed last."""
    done = []
    for stage in (stage for run in root.glob("*") for stage in stages_of(run)):
        with suppress(UserError):  # a broken file of another run does not matter
            if stage.complete():
                done.append(stage)
    if not done:
        running = newest_run(root)
        raise UserError(
            f"{root}: no run there has a complete stage" + (f" ({running} is not finished)." if running else "."),
            "Train one first (zephyr-lite sft), or name a run with --run.",
        )
    return max(done, key=lambda stage: (stage.path / STAGE_FILE).stat().st_mtime_ns).run


def _last_stage(run: Path, name: str | None) -> tuple[StageDir, dict[str, Any]]:
    found = []
    for stage in stages_of(run):
        if name not in (None, stage.path.name):
            continue  # errors of another stage do not matter
        info = stage.info()
        if info is not None and info.get("status") == "complete":
            path = stage.path / STAGE_FILE
            checked(info, path, needs=("adapters", "own", "base.name_or_path"))
            found.append(((len(info["adapters"]), path.stat().st_mtime_ns), stage, info))
    if name is None:
        _refuse_lost_stages(run)
    if found:
        _, stage, info = max(found, key=lambda item: item[0])
        return stage, info
    if (run / "adapter_config.json").is_file():
        raise UserError(
            f"{run}: is an adapter's folder, and no run.",
            f"Give the run ({run.parent.parent}), or name the adapters from the bottom up, each with --adapter.",
        )
    if not stages_of(run):
        raise UserError(
            f"{run}: no complete stage in it: it is no run's folder, or nothing was trained there yet.",
            "Give a run's folder (runs/NAME), a stage's, or a merged model's.",
        )
    raise UserError(
        f"{run}: {'no complete stage' if name is None else f'stage {name} is not there, or not complete'}.",
        "Finish it first: the same command that started it resumes it.",
    )


def _refuse_lost_stages(run: Path) -> None:
    """A stage whose stage.json is missing or empty must not be skipped in favour of the one below it.

    Raises:
        UserError: there is an adapter of such a stage.
    """
    for adapter in sorted(run.glob("[!.]*/adapter")):
        stage = StageDir(adapter.parent)
        if adapter.is_dir() and "status" not in (stage.info() or {}):
            raise UserError(
                f"{stage.path}: has an adapter, and no {STAGE_FILE} that says what it was trained on.",
                "Restore that file; or name a stage (--stage), or the adapters themselves (--adapter, --base).",
            )


def _resolve(run: Path, name: str) -> Path:
    """A frozen adapter: relative to the run's folder if it is in it, else absolute or a hub id."""
    inside = run / name
    if Path(name).is_absolute() or inside.is_dir():
        return inside
    # a missing stage of the run ("sft/adapter") is not looked for on the hub
    if (run / Path(name).parts[0]).exists() or Path(name).name in ("adapter", "delta"):
        return inside
    return fetch_adapter(name)


def _checked(path: Path, link: dict[str, Any], stage: StageDir) -> AdapterFile:
    if not path.is_dir():
        raise UserError(
            f"{path}: is gone; {stage.path} was trained on it.",
            f"Put it back, or merge from {stage.adapter}, which holds the whole chain, as an explicit adapter.",
        )
    adapter = read_adapter(path)
    if adapter.sha256 != link["sha256"]:
        raise UserError(
            f"{path}: its content is {adapter.sha256[:12]}, but {stage.path.name} was trained on {link['sha256'][:12]}.",
            "The adapter was changed or replaced since. Restore it, or train the stages above it again.",
        )
    return adapter
