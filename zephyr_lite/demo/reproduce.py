"""``zephyr-lite reproduce``: a recipe from its first step to its row in the table of results.

Every part is a command as a user gives it, in a process of its own. What is finished is not done again, so the same command
goes on wherever it was stopped.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import RunConfig, load_config
from ..data.opening import open_source
from ..errors import Interrupted, UserError
from ..io.atomic import write_json
from ..io.run_dir import StageDir
from .child import Ended, child
from .results import HEADER, RULE, evaluation, merged_from, results, row
from .smoke_config import merged_bytes

Say = Callable[[str], None]
# name → the configurations of its stages
RECIPES = {
    "overnight": {"sft": "zephyr-7b/overnight-sft", "dpo": "zephyr-7b/overnight-dpo"},
    "full": {"sft": "zephyr-7b/sft", "dpo": "zephyr-7b/dpo"},
}
# what the recipe decides
PLACED = ("output_dir", "adapters", "stage")
RESERVE = 2**30  # bytes of the disk that a merge leaves free


@dataclass(frozen=True)
class Reproduction:
    """A recipe and where it goes.

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

    def commands(self) -> list[tuple[str, list[str]]]:
        """(part, command) in the order of their work."""
        run, files = str(self.run), RECIPES[self.recipe]
        found = [
            (method, [method, "--config", file, f"output_dir={run}", *self.words[method]])
            for method, file in files.items()
        ]
        dpo = str(self.run / "dpo")
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
    """Read what was asked for.

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
    chosen_configs(chosen)
    return chosen


def chosen_configs(chosen: Reproduction) -> dict[str, RunConfig]:
    """Stage → its configuration.

    Raises:
        UserError: a key that does not fit.
    """
    files = RECIPES[chosen.recipe]
    return {
        "sft": load_config("sft", files["sft"], [f"output_dir={chosen.run}", *chosen.words["sft"]]).config,
        "dpo": load_config("dpo", files["dpo"], [f"output_dir={chosen.run}", *chosen.words["dpo"]]).config,
    }


def changed(chosen: Reproduction) -> dict[str, Any]:
    """Keys that are not the recipe's, with their values; those of one stage as ``STAGE.key``."""
    files = RECIPES[chosen.recipe]
    ours = chosen_configs(chosen)
    plain = {"sft": load_config("sft", files["sft"]).config, "dpo": load_config("dpo", files["dpo"]).config}
    # where a run lies and what is told of it changes nothing in it
    skip = {*PLACED, "sync", "report_to", "push_to_hub", "samples", "sample_tokens", "save_steps", "save_total_limit"}
    found: dict[str, Any] = {}
    for key in RunConfig.model_fields:
        values = {
            stage: getattr(ours[stage], key)
            for stage in ours
            if getattr(ours[stage], key) != getattr(plain[stage], key)
        }
        if key in skip or not values:
            continue
        dumped = {stage: ours[stage].model_dump(mode="json", include={key})[key] for stage in values}
        if len(values) == 2 and dumped["sft"] == dumped["dpo"]:
            found[key] = dumped["sft"]
        else:
            found.update({f"{stage}.{key}": value for stage, value in dumped.items()})
    # the base of DPO is that of the stage below
    found.pop("dpo.model_name_or_path", None)
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
        # a key's dots come before the =, and so do a stage's
        one = bool(dot) and stage in scoped and "=" not in stage
        word = own if one else word
        key = word.split("=")[0].split(".")[0].replace("-", "_")
        if key in PLACED:
            raise UserError(f"the command line: {key} is the recipe's decision.", "Choose the run's folder with --out.")
        for each in [stage] if one else scoped:
            scoped[each].append(word)
    return scoped


def run_reproduction(chosen: Reproduction, *, say: Say, run: Callable[..., Ended] = child) -> dict[str, Any]:
    """Do what is not done yet, and write ``results.json`` into the run's folder.

    Args:
        run: starts a command and waits for it (``child.child``).

    Returns:
        what ``results.results`` found, with the row.

    Raises:
        UserError: a part failed.
        Interrupted: a signal came.
    """
    for config in chosen_configs(chosen).values():
        for spec in [*config.dataset, *config.eval_dataset]:
            open_source(spec)  # one that is missing would otherwise be found out after hours
    commands = chosen.commands()
    found: dict[str, Any] = {}
    for number, (part, words) in enumerate(commands, 1):
        reason = done(chosen, part)
        say(f"[{number}/{len(commands)}] {command_line(words)}")
        if reason is not None:
            say(reason)
        else:
            try:
                ended = run(words)
            except KeyboardInterrupt:
                raise Interrupted(f"interrupted at {part}; the same command goes on from there.") from None
            if ended.code != 0:
                raise UserError(
                    f"`zephyr-lite {' '.join(words[:2])}` ended with exit code {ended.code}; what it said stands above.",
                    "Once that is mended, the same command goes on from there.",
                )
        if part in ("preference", "mt-bench"):  # what follows may fail, and takes nothing of this away
            found = write_results(chosen)
    say(f"{chosen.run / 'results.json'} holds the results; the row for the table in the README:")
    for line in (HEADER, RULE, found["row"]):
        say(line)
    return found


def write_results(chosen: Reproduction) -> dict[str, Any]:
    """``results.json`` of what is there."""
    found = results(chosen.run, recipe=chosen.recipe, changed=changed(chosen), who=chosen.who)
    merged = chosen.run / "merged"
    found["merged"] = str(merged) if merged_from(merged, chosen.run) else None
    found["row"] = row(found)
    write_json(chosen.run / "results.json", found)
    return found


def done(chosen: Reproduction, part: str) -> str | None:
    """Why a part has nothing to do, or None. The stages' own commands know whether they are complete, and with what keys."""
    stage = StageDir(chosen.run / "dpo")
    if part in ("loss", "preference", "mt-bench"):
        return f"{part} is there already" if evaluation(stage, part) is not None else None
    if part != "merge":
        return None
    merged = chosen.run / "merged"
    if merged_from(merged, chosen.run):
        return f"{merged} is that already"
    size, free = merged_bytes(chosen_configs(chosen)["sft"]), shutil.disk_usage(chosen.run).free
    if free < size + RESERVE:
        return (
            f"left out: the model takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free for {merged}; "
            f"{stage.adapter} is the whole chain as one adapter"
        )
    return None


def command_line(words: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(["zephyr-lite", *words])
