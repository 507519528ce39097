"""``zephyr-lite reproduce``: a recipe from its first step to its row in the table of results.

Every part is a command as a user types it, in a process of its own. Finished parts are not repeated, so the same command
resumes an interrupted reproduction.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import PLACED, Method, RunConfig, load_config, words_by_scope
from ..data.sources import open_source
from ..errors import Interrupted, UserError
from ..io.atomic import write_json
from ..io.run_dir import StageDir, read_json
from ..merge.weights import MARK
from ..model.chain import chain_of_run
from ..monitor.records import StageRecord
from .child import child
from .smoke import DISK_RESERVE, base_files, speed

logger = logging.getLogger(__name__)
# name → the configurations of its stages
RECIPES: dict[str, dict[Method, str]] = {
    "overnight": {"sft": "zephyr-7b/overnight-sft", "dpo": "zephyr-7b/overnight-dpo"},
    "full": {"sft": "zephyr-7b/sft", "dpo": "zephyr-7b/dpo"},
}
# keys that do not change the result
NEUTRAL = {*PLACED, "sync", "report_to", "push_to_hub", "samples", "sample_tokens", "save_steps", "save_total_limit"}
FORMAT = 1
HEADER = (
    "| who | card | base | recipe | hours sft + dpo | tokens/s | pairs/s | peak GiB | eval loss base → sft → dpo "
    "| preference accuracy | version |"
)
RULE = "|" + "---|" * (HEADER.count("|") - 1)
STAGES: tuple[Method, ...] = ("sft", "dpo")


@dataclass
class Reproduction:
    recipe: str  # its name in ``RECIPES``
    run: Path
    configs: dict[Method, RunConfig]  # by stage
    changed: dict[str, Any]  # keys that differ from the recipe's → values; those of one stage as ``STAGE.key``
    commands: list[tuple[str, list[str]]]  # (part, command) in the order of their execution
    who: str  # for the row


def plan_reproduction(
    recipe: str, words: Sequence[str] = (), *, out: Path | None = None, judge: str | None = None, who: str = "anonymous"
) -> Reproduction:
    """Parse the command line.

    Args:
        words: ``key=value`` or ``--key value`` for both stages; ``sft.key=value`` and ``dpo.key=value`` for one.
        out: the run's folder; the recipe's by default.
        judge: of MT-Bench; None: no MT-Bench.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe}: there is no such recipe.", f"There are {', '.join(RECIPES)}.")
    scoped = words_by_scope(words)
    if unknown := sorted(set(scoped) - {"", *STAGES}):
        raise UserError(
            f"the command line: {unknown[0]}.…: there is no such key or stage.", "The stages are sft and dpo."
        )
    given = {stage: [*scoped.get("", []), *scoped.get(stage, [])] for stage in STAGES}
    recipes = {stage: load_config(stage, file).config for stage, file in RECIPES[recipe].items()}
    run = out or Path(recipes["sft"].output_dir)
    configs: dict[Method, RunConfig] = {}
    commands: list[tuple[str, list[str]]] = []
    for stage, file in RECIPES[recipe].items():
        configs[stage] = load_config(stage, file, [f"output_dir={run}", *given[stage]]).config
        commands.append((stage, [stage, "--config", file, f"output_dir={run}", *given[stage]]))
    merged, dpo = str(run / "merged"), str(run / "dpo")
    commands.append(("merge", ["merge", "--run", str(run), "--stage", "dpo", "--out", merged, "--overwrite"]))
    commands += [(kind, ["eval", kind, dpo]) for kind in ("loss", "preference")]
    if judge is not None:
        commands.append(("mt-bench", ["eval", "mt-bench", dpo, "--judge", judge]))
    commands.append(("report", ["report", str(run)]))

    changed: dict[str, Any] = {}
    now = {stage: config.model_dump(mode="json") for stage, config in configs.items()}
    then = {stage: config.model_dump(mode="json") for stage, config in recipes.items()}
    for key in (key for key in RunConfig.model_fields if key not in NEUTRAL):
        values = {stage: now[stage][key] for stage in now if now[stage][key] != then[stage][key]}
        if len(values) == 2 and values["sft"] == values["dpo"]:
            changed[key] = values["sft"]
        else:
            changed.update({f"{stage}.{key}": value for stage, value in values.items()})
    changed.pop("dpo.model_name_or_path", None)  # DPO has the base of the stage below
    return Reproduction(recipe, run, configs, changed, commands, who)


def run_reproduction(chosen: Reproduction, *, run: Callable[..., int] = child) -> dict[str, Any]:
    """Run the parts that are not done yet; write ``results.json`` into the run's folder, and return its content.

    Args:
        run: starts a command and waits for it.
    """
    for config in chosen.configs.values():
        for spec in [*config.dataset, *config.eval_dataset]:
            open_source(spec)  # a missing one would otherwise be found hours later
    found: dict[str, Any] = {}
    for number, (part, words) in enumerate(chosen.commands, 1):
        logger.info(f"[{number}/{len(chosen.commands)}] {command_line(words)}")
        if (reason := done(chosen, part)) is not None:
            logger.info(reason)
        else:
            try:
                code = run(words)
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted at {part}; the same command resumes from there.") from None
            if code != 0:
                raise UserError(
                    f"`zephyr-lite {' '.join(words[:2])}` ended with exit code {code}; see the error above.",
                    "After fixing it, the same command resumes from there.",
                )
        if part in ("preference", "mt-bench"):  # a later part may fail
            found = results(chosen)
            write_json(chosen.run / "results.json", found)
    logger.info(f"{chosen.run / 'results.json'} holds the results; the row for the table in docs/recipe.md:")
    for line in (HEADER, RULE, found["row"]):
        logger.info(line)
    return found


def done(chosen: Reproduction, part: str) -> str | None:
    """Why a part has nothing to do, or None. The commands of the stages check by themselves whether they are complete."""
    if part in ("loss", "preference", "mt-bench"):
        return f"{part} is done already" if evaluation(StageRecord(chosen.run / "dpo"), part) else None
    if part != "merge":
        return None
    merged = chosen.run / "merged"
    if merged_from(merged, chosen.run):
        return f"{merged} is done already"
    size, free = base_files(chosen.configs["sft"]).nbytes, shutil.disk_usage(chosen.run).free
    if free >= size + DISK_RESERVE:
        return None
    return (
        f"left out: the model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free for {merged}; "
        f"{chosen.run / 'dpo' / 'adapter'} is the whole chain as one adapter"
    )


def command_line(words: Sequence[str]) -> str:
    return shlex.join(["zephyr-lite", *words])


def results(chosen: Reproduction) -> dict[str, Any]:
    """The content of results.json, from the files of a run whose stages are complete and evaluated."""
    sft, dpo = records = [StageRecord(chosen.run / name) for name in STAGES]
    loss, preference = evaluation(dpo, "loss"), evaluation(dpo, "preference")
    against = preference["comparisons"][0]
    machines: list[str] = []
    stages: dict[str, dict[str, Any]] = {}
    for record in records:
        info, steps, seconds = record.info, record.info["result"]["steps"], record.values("seconds")
        for machine in [info["machine"], *(start["machine"] for start in info["resumed"])]:
            count = machine.get("processes", 1)
            machines.append(f"{count} × {machine['processor']}" if count > 1 else machine["processor"])
        rate, unit = speed(record.columns)
        peaks = [info["result"].get("peak_memory_bytes", 0) / 2**30, *record.values("peak_memory_gib")]
        stages[record.name] = {  # over all processes that worked on it
            "steps": steps,
            "step_hours": round(statistics.fmean(seconds) * steps / 3600, 4),
            f"{unit}_per_second": round(rate, 3),
            "peak_gib": round(max(peaks), 3),
            "max_length": record.config["max_length"],
            "warnings": info["result"].get("warnings", []),
        }
    merged = chosen.run / "merged"
    found: dict[str, Any] = {
        "format": FORMAT,
        "recipe": chosen.recipe,
        "changed": chosen.changed,
        "who": chosen.who,
        "machines": list(dict.fromkeys(machines)),
        "base": sft.info["base"],
        "versions": dpo.info["versions"],
        **stages,
        "eval_loss": {
            "rows": loss["data"]["rows"],
            "models": {name: model["loss"] for name, model in loss["models"].items()},
        },
        "preference": {
            "rows": preference["data"]["rows"],
            **{key: against[key] for key in ("against", "accuracy", "margin_nats")},
        },
        "mt_bench": evaluation(dpo, "mt-bench").get("models"),
        "merged": str(merged) if merged_from(merged, chosen.run) else None,
    }
    return {**found, "row": row(found)}


def evaluation(record: StageRecord, kind: str) -> dict[str, Any]:
    """The result of ``zephyr-lite eval KIND`` on a stage; {} if there is none, or one of another adapter."""
    found = record.results.get(kind) or {}
    of_this = found and found["adapters"][-1]["sha256"] == record.info["own"].get("sha256")
    return found if of_this else {}


def row(found: dict[str, Any]) -> str:
    """The line for the table in docs/recipe.md."""
    hours = [found[name]["step_hours"] for name in STAGES]
    changed = ", ".join(found["changed"])
    cells = [
        found["who"],
        " + ".join(found["machines"]),
        found["base"]["name_or_path"].rstrip("/").rsplit("/", 1)[-1],
        found["recipe"] + (f", but {changed}" if changed else ""),
        " + ".join(f"{value:.1f}" if value >= 0.95 else f"{value:.2f}" for value in hours),
        f"{found['sft']['tokens_per_second']:,.0f}",
        f"{found['dpo']['pairs_per_second']:,.2f}",
        f"{max(found[name]['peak_gib'] for name in STAGES):.1f}",
        " → ".join(f"{loss['value']:.3f}" for loss in found["eval_loss"]["models"].values()),
        f"{found['preference']['accuracy']['value']:.3f}",
        found["versions"]["zephyr-lite"],
    ]
    escaped = [" ".join(cell.replace("|", "\\|").replace("<", "&lt;").split()) for cell in cells]
    return f"| {' | '.join(escaped)} |"


def merged_from(folder: Path, run: Path) -> bool:
    """Whether a folder holds the merged model of the run as it is now."""
    mark = read_json(folder / MARK)
    if mark is None or not StageDir(run / "dpo").complete():
        return False
    adapters = chain_of_run(run, stage="dpo").adapters
    return [adapter.sha256 for adapter in adapters] == [adapter["sha256"] for adapter in mark["adapters"]]
