"""``zephyr-lite reproduce``: a recipe from its first step to its row in the table of results.

Every part is a command as a user types it, in a process of its own. Finished parts are not repeated, so the same command
resumes an interrupted reproduction.
"""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.load import Method, RunConfig, load_config
from ..data.load import open_source
from ..errors import Interrupted, UserError
from ..evaluate.rows import stage_config
from ..io.atomic import write_json
from ..io.run_dir import StageDir, read_json
from ..model.chain import chain_of_run
from .child import Ended, child
from .smoke import DISK_RESERVE, merged_bytes

logger = logging.getLogger(__name__)

# name → the configurations of its stages
RECIPES: dict[str, dict[Method, str]] = {
    "overnight": {"sft": "zephyr-7b/overnight-sft", "dpo": "zephyr-7b/overnight-dpo"},
    "full": {"sft": "zephyr-7b/sft", "dpo": "zephyr-7b/dpo"},
}
PLACED = ("output_dir", "adapters", "stage")  # keys that the recipe decides
# keys that do not change the result
NEUTRAL = {*PLACED, "sync", "report_to", "push_to_hub", "samples", "sample_tokens", "save_steps", "save_total_limit"}
FORMAT = 1
MARKER = "<!-- results -->"  # before the table in docs/recipe.md
HEADER = (
    "| who | card | base | recipe | hours sft + dpo | tokens/s | pairs/s | peak GiB | eval loss base → sft → dpo "
    "| preference accuracy | version |"
)
RULE = "|" + "---|" * (HEADER.count("|") - 1)
STAGES: tuple[Method, ...] = ("sft", "dpo")
KEYS_NAMED = 4  # number of changed keys that the row names


@dataclass
class Reproduction:
    """A recipe and its run.

    Attributes:
        recipe: its name in ``RECIPES``.
        run: the run's folder.
        words: stage → ``key=value`` words.
        judge: of MT-Bench; None: no MT-Bench.
        who: for the row.
    """

    recipe: str
    run: Path
    words: dict[str, list[str]]
    judge: str | None = None
    who: str = "anonymous"

    @cached_property
    def configs(self) -> dict[Method, RunConfig]:
        """Stage → its configuration; raises a UserError for a key that does not fit."""
        place = f"output_dir={self.run}"
        return {s: load_config(s, f, [place, *self.words[s]]).config for s, f in RECIPES[self.recipe].items()}

    def commands(self) -> list[tuple[str, list[str]]]:
        """(part, command) in the order of their execution."""
        run, dpo = str(self.run), str(self.run / "dpo")
        found: list[tuple[str, list[str]]] = [
            (method, [method, "--config", file, f"output_dir={run}", *self.words[method]])
            for method, file in RECIPES[self.recipe].items()
        ]
        found += [
            ("merge", ["merge", "--run", run, "--stage", "dpo", "--out", str(self.run / "merged"), "--overwrite"]),
            ("loss", ["eval", "loss", dpo]),
            ("preference", ["eval", "preference", dpo]),
        ]
        if self.judge is not None:
            found.append(("mt-bench", ["eval", "mt-bench", dpo, "--judge", self.judge]))
        return [*found, ("report", ["report", run])]


def plan_reproduction(
    recipe: str, words: Sequence[str] = (), *, out: Path | None = None, judge: str | None = None, who: str = "anonymous"
) -> Reproduction:
    """Parse the command line.

    Args:
        words: ``key=value`` or ``--key value`` for both stages; ``sft.key=value`` and ``dpo.key=value`` for one.
        out: the run's folder; the recipe's by default.

    Raises:
        UserError: no such recipe; a key that does not fit.
    """
    if recipe not in RECIPES:
        raise UserError(f"recipe {recipe}: there is no such recipe.", f"There are {', '.join(RECIPES)}.")
    scoped = scopes(words)
    run = out or Path(load_config("sft", RECIPES[recipe]["sft"]).config.output_dir)
    chosen = Reproduction(recipe, run, scoped, judge, who)
    assert set(chosen.configs) == set(STAGES)  # reads the keys, too
    return chosen


def changed(chosen: Reproduction) -> dict[str, Any]:
    """Keys that differ from the recipe's, with their values; those of one stage as ``STAGE.key``."""
    now = {stage: config.model_dump(mode="json") for stage, config in chosen.configs.items()}
    then = {s: load_config(s, file).config.model_dump(mode="json") for s, file in RECIPES[chosen.recipe].items()}
    found: dict[str, Any] = {}
    for key in (key for key in RunConfig.model_fields if key not in NEUTRAL):
        values = {stage: now[stage][key] for stage in now if now[stage][key] != then[stage][key]}
        if len(values) == 2 and values["sft"] == values["dpo"]:
            found[key] = values["sft"]
        else:
            found.update({f"{stage}.{key}": value for stage, value in values.items()})
    found.pop("dpo.model_name_or_path", None)  # DPO has the base of the stage below
    return found


def scopes(words: Sequence[str]) -> dict[str, list[str]]:
    """The words for each stage; ``--key value`` counts as one.

    Raises:
        UserError: a key that the recipe decides.
    """
    scoped: dict[str, list[str]] = {"sft": [], "dpo": []}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" not in word and rest:
            word = f"{word}={rest.pop(0)}"
        word = word.lstrip("-")
        stage, dot, own = word.partition(".")
        one = bool(dot) and stage in scoped
        word = own if one else word
        key = word.split("=")[0].split(".")[0].replace("-", "_")
        if key in PLACED:
            raise UserError(f"the command line: {key} is the recipe's decision.", "Choose the run's folder with --out.")
        for each in [stage] if one else scoped:
            scoped[each].append(word)
    return scoped


def run_reproduction(chosen: Reproduction, *, run: Callable[..., Ended] = child) -> dict[str, Any]:
    """Run the parts that are not done yet, and write ``results.json`` into the run's folder.

    Args:
        run: starts a command and waits for it.

    Returns:
        the content of results.json.

    Raises:
        UserError: a part failed.
        Interrupted: by a signal.
    """
    for config in chosen.configs.values():
        for spec in [*config.dataset, *config.eval_dataset]:
            open_source(spec)  # a missing one would otherwise be found hours later
    commands = chosen.commands()
    found: dict[str, Any] = {}
    for number, (part, words) in enumerate(commands, 1):
        reason = done(chosen, part)
        logger.info(f"[{number}/{len(commands)}] {command_line(words)}")
        if reason is not None:
            logger.info(reason)
        else:
            try:
                ended = run(words)
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted at {part}; the same command resumes from there.") from None
            if ended.code != 0:
                raise UserError(
                    f"`zephyr-lite {' '.join(words[:2])}` ended with exit code {ended.code}; see the error above.",
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
    stage = StageDir(chosen.run / "dpo")
    if part in ("loss", "preference", "mt-bench"):
        return f"{part} is done already" if evaluation(stage, part) is not None else None
    if part != "merge":
        return None
    merged = chosen.run / "merged"
    if merged_from(merged, chosen.run):
        return f"{merged} is done already"
    size, free = merged_bytes(chosen.configs["sft"]), shutil.disk_usage(chosen.run).free
    if free < size + DISK_RESERVE:
        return (
            f"left out: the model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free for {merged}; "
            f"{stage.adapter} is the whole chain as one adapter"
        )
    return None


def command_line(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["zephyr-lite", *words])


def results(chosen: Reproduction) -> dict[str, Any]:
    """The content of results.json, from the files of a run whose stages are complete and evaluated."""
    stages = {name: StageDir(chosen.run / name) for name in STAGES}
    infos = {name: stage.info() or {} for name, stage in stages.items()}
    loss, preference = (evaluation(stages["dpo"], kind) for kind in ("loss", "preference"))
    assert loss is not None and preference is not None
    against = preference["comparisons"][0]
    merged = chosen.run / "merged"
    found: dict[str, Any] = {
        "format": FORMAT,
        "recipe": chosen.recipe,
        "changed": changed(chosen),
        "who": chosen.who,
        "machines": machines(list(infos.values())),
        "base": infos["sft"]["base"],
        "versions": infos["dpo"]["versions"],
        "sft": _stage(stages["sft"], infos["sft"]),
        "dpo": _stage(stages["dpo"], infos["dpo"]),
        "eval_loss": {
            "rows": loss["data"]["rows"],
            "models": {name: model["loss"] for name, model in loss["models"].items()},
        },
        "preference": {
            "rows": preference["data"]["rows"],
            "against": against["against"],
            "accuracy": against["accuracy"],
            "margin_nats": against["margin_nats"],
        },
        "mt_bench": (evaluation(stages["dpo"], "mt-bench") or {}).get("models"),
        "merged": str(merged) if merged_from(merged, chosen.run) else None,
    }
    return {**found, "row": row(found)}


def evaluation(stage: StageDir, kind: str) -> dict[str, Any] | None:
    """The result of ``zephyr-lite eval KIND`` on a stage; None if there is none, or one of another adapter.

    Raises:
        UserError: the file is not a JSON object.
    """
    found = read_json(stage.path / "eval" / f"{kind}.json") or {}
    own = ((stage.info() or {}).get("own") or {}).get("sha256")
    adapters = found.get("adapters") or [{}]
    return found if own and adapters[-1].get("sha256") == own else None


def machines(infos: list[dict[str, Any]]) -> list[str]:
    """The cards that the stages were trained on; of a CPU, the number of threads."""
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
    """The line for the table in docs/recipe.md."""
    hours = [found[name]["step_hours"] for name in STAGES]
    cells = [
        found["who"],
        " + ".join(found["machines"]),
        found["base"]["name_or_path"].rstrip("/").rsplit("/", 1)[-1],
        _recipe(found["recipe"], list(found["changed"])),
        " + ".join(f"{value:.1f}" if value >= 0.95 else f"{value:.2f}" for value in hours),
        f"{found['sft']['tokens_per_second']:,.0f}",
        f"{found['dpo']['pairs_per_second']:,.2f}",
        f"{max(found[name]['peak_gib'] for name in STAGES):.1f}",
        " → ".join(f"{loss['value']:.3f}" for loss in found["eval_loss"]["models"].values()),
        f"{found['preference']['accuracy']['value']:.3f}",
        found["versions"]["zephyr-lite"],
    ]
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


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
