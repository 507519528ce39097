"""What a finished run of a recipe came to, and its row in the README's table of results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluate.rows import stage_config
from ..io.run_dir import StageDir, read_json
from ..model.chain import chain_of_run

FORMAT = 1
# stands before the table in the README
MARKER = "<!-- results -->"
HEADER = (
    "| who | card | base | recipe | hours sft + dpo | tokens/s | pairs/s | peak GiB | eval loss base → sft → dpo "
    "| preference accuracy | version |"
)
RULE = "|" + "---|" * (HEADER.count("|") - 1)
STAGES = ("sft", "dpo")
KEYS_NAMED = 4  # of those that differ from the recipe


def results(run: Path, *, recipe: str, changed: dict[str, Any], who: str) -> dict[str, Any]:
    """Everything that the run's files say of it.

    Args:
        run: with both stages complete and evaluated.
        recipe: its name.
        changed: keys that are not the recipe's, with their values.
        who: ran it.

    Raises:
        UserError: a stage is not complete, or was not evaluated.
    """
    stages = {name: StageDir(run / name) for name in STAGES}
    infos: dict[str, dict[str, Any]] = {}
    for name, stage in stages.items():
        if not stage.complete():
            raise UserError(f"{stage.path} is not complete.", "Start the same command again.")
        infos[name] = stage.info() or {}
    evaluated = {kind: evaluation(stages["dpo"], kind) for kind in ("loss", "preference")}
    for kind, found in evaluated.items():
        if found is None:
            raise UserError(f"{run}: there is no `eval {kind}` of its stage dpo.", "Start the same command again.")
    assert evaluated["loss"] is not None and evaluated["preference"] is not None
    losses = {name: model["loss"] for name, model in evaluated["loss"]["models"].items()}
    against = evaluated["preference"]["comparisons"][0]
    return {
        "format": FORMAT,
        "recipe": recipe,
        "changed": changed,
        "who": who,
        "machines": machines(list(infos.values())),
        "base": infos["sft"]["base"],
        "versions": infos["dpo"]["versions"],
        **{name: _stage(stages[name], infos[name]) for name in STAGES},
        "eval_loss": {"rows": evaluated["loss"]["data"]["rows"], "models": losses},
        "preference": {
            "rows": evaluated["preference"]["data"]["rows"],
            "against": against["against"],
            "accuracy": against["accuracy"],
            "margin_nats": against["margin_nats"],
        },
        "mt_bench": (evaluation(stages["dpo"], "mt-bench") or {}).get("models"),
    }


def evaluation(stage: StageDir, kind: str) -> dict[str, Any] | None:
    """What ``zephyr-lite eval KIND`` wrote of a stage; None where it did not, or of another adapter than is there now.

    Raises:
        UserError: the file is no JSON object.
    """
    found = read_json(stage.path / "eval" / f"{kind}.json")
    return found if found is not None and same_adapter(found, stage) else None


def same_adapter(found: dict[str, Any], stage: StageDir) -> bool:
    """Whether a result or a merged model (its ``adapters``) is of the stage as it is now."""
    adapters = found.get("adapters")
    own = ((stage.info() or {}).get("own") or {}).get("sha256")
    return bool(own) and isinstance(adapters, list) and bool(adapters) and adapters[-1].get("sha256") == own


def machines(infos: list[dict[str, Any]]) -> list[str]:
    """The cards that the stages were trained on; without one, how many threads of a CPU."""
    found = []
    for info in infos:
        for machine in [info["machine"], *(start["machine"] for start in info.get("resumed", []))]:
            if machine["device"] == "cuda":
                several = machine.get("processes", 1)
                found.append(f"{several} × {machine['processor']}" if several > 1 else machine["processor"])
            else:
                threads = info["plan"]["threads"]
                found.append(f"CPU ({machine['processor']}), {threads} thread{'s' if threads != 1 else ''}")
    return list(dict.fromkeys(found))


def _stage(stage: StageDir, info: dict[str, Any]) -> dict[str, Any]:
    """Hours, speed and memory of a stage, over all processes that worked on it."""
    records = [json.loads(line) for line in stage.metrics.read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "loss" in record and record.get("seconds")]
    if not steps:
        raise UserError(f"{stage.metrics}: holds no step.", "Restore the file.")
    seconds = statistics.fmean(record["seconds"] for record in steps) * info["result"]["steps"]
    unit = "num_pairs" if any("num_pairs" in record for record in steps) else "num_tokens"
    rate = sum(record.get(unit, 0.0) for record in steps) / sum(record["seconds"] for record in steps)
    peaks = [record["peak_memory_gib"] for record in records if record.get("peak_memory_gib")]
    peak = max([info["result"].get("peak_memory_bytes", 0) / 2**30, *peaks])
    config = stage_config(stage)
    return {
        "steps": info["result"]["steps"],
        "step_hours": round(seconds / 3600, 4),
        f"{unit.removeprefix('num_')}_per_second": round(rate, 3),
        "peak_gib": round(peak, 3),
        "max_length": config.max_length,
        "warnings": info["result"].get("warnings", []),
    }


def row(found: dict[str, Any]) -> str:
    """The line for the README's table."""
    hours = [_hours(found[name]["step_hours"]) for name in STAGES]
    names = chain_names(found)
    cells = [
        found["who"],
        " + ".join(found["machines"]),
        found["base"]["name_or_path"].rstrip("/").rsplit("/", 1)[-1],
        _recipe(found["recipe"], list(found["changed"])),
        " + ".join(hours),
        f"{found['sft']['tokens_per_second']:,.0f}",
        f"{found['dpo']['pairs_per_second']:,.2f}",
        f"{max(found[name]['peak_gib'] for name in STAGES):.1f}",
        " → ".join(f"{found['eval_loss']['models'][name]['value']:.3f}" for name in names),
        f"{found['preference']['accuracy']['value']:.3f}",
        found["versions"]["zephyr-lite"],
    ]
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def chain_names(found: dict[str, Any]) -> list[str]:
    """The models of a result, base first."""
    return list(found["eval_loss"]["models"])


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 0.95 else f"{hours:.2f}"


def _recipe(name: str, keys: list[str]) -> str:
    if not keys:
        return name
    more = f" and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
    return f"{name}, but {', '.join(keys[:KEYS_NAMED])}{more}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())


def merged_from(folder: Path, run: Path) -> bool:
    """Whether a folder holds the merged model of the run as it is now."""
    mark = read_json(folder / "zephyr_lite.json")
    stage = StageDir(run / "dpo")
    if mark is None or not stage.complete() or not any(folder.glob("*.safetensors")):
        return False
    return [a.sha256 for a in chain_of_run(run, stage="dpo").adapters] == [
        a["sha256"] for a in mark.get("adapters", [])
    ]
