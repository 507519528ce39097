"""Malformed configurations, words and files of a run, and what is said of each (``tests/malformed.py`` explains a case)."""

# ruff: noqa: E501 (an exact message is best read in one piece)
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.malformed import Case, Fixtures
from zephyr_lite.config.load import LIST_KEYS, preset_configs

Make = Callable[[Path, Fixtures], list[str]]
UTF8 = "Save the file as UTF-8."
SAVED = "Save its content to a file first, and name that."
YAML = "Correct the line."


def config_of(content: str | bytes) -> Make:
    """A configuration of these bytes."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["sft", "--config", "run.yaml"]

    return make


def table_of(content: str) -> Make:
    """A table of ablations of this text."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "table.yaml").write_text(content)
        return ["ablate", "table.yaml"]

    return make


def words(*given: str) -> Make:
    return lambda tmp, fixtures: list(given)


def feedback(content: str) -> Make:
    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "job.yaml").write_text(content)
        return ["feedback", "--config", "job.yaml", "--dry-run"]

    return make


def broken_stage(content: str | bytes) -> Make:
    """A finished run whose sft stage has these bytes for a stage.json; dpo is asked to go on from it."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        (tmp / "runs").mkdir()
        shutil.copytree(fixtures.run(), tmp / "runs" / "t")
        (tmp / "runs/t/sft/stage.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["dpo", "output_dir=runs/t", f"dataset={fixtures.pairs}", "stage=again"]

    return make


CASES = [
    # -- YAML
    Case(
        "yaml: nested deep",
        config_of("memory: " + "[" * 5000),
        "run.yaml: not readable as YAML: it is nested too deeply.",
        YAML,
    ),
    Case(
        "yaml: a key twice",
        config_of("seed: 1\nlora_r: 2\nseed: 3\n"),
        "run.yaml line 3: not readable as YAML: duplicate key 'seed'.",
        YAML,
    ),
    Case(
        "yaml: a Python object",
        config_of("stage: !!python/object/apply:os.system [id]\n"),
        "run.yaml line 1: not readable as YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'.",
        YAML,
    ),
    Case(
        "yaml: Latin-1",
        config_of("system: grüß dich\n".encode("latin-1")),
        "run.yaml line 1: not UTF-8 (byte 0xfc).",
        UTF8,
    ),
    Case(
        "yaml: a list",
        config_of("- seed\n"),
        "run.yaml: expected `key: value` lines, found ['seed'].",
        "Write `seed: 42`, for instance; put keys that YAML reads as values (on, off, yes, no, numbers) in quotes. A file of rows is given as dataset=FILE.",
    ),
    Case(
        "yaml: a day that is none",
        config_of("system: 2024-13-45\n"),
        "run.yaml line 1: not readable as YAML: '2024-13-45' is not a valid timestamp; put it in quotes if it is a text.",
        YAML,
    ),
    Case(
        "yaml: a device",
        words("sft", "--config", "/dev/zero"),
        "/dev/zero: is a device or a pipe, not a file.",
        SAVED,
    ),
    Case(
        "yaml: a table without arms",
        table_of("arms: 5\n"),
        "table.yaml: arms: expected keys and values (found '5').",
    ),
    Case(
        "yaml: a job with an unknown key",
        feedback("promts: x\n"),
        "job.yaml: out, prompts, models, judge missing.",
        "Give --out, or out: in the file of --config.",
    ),
    Case(
        "yaml: a job's models are a number",
        feedback("prompts: {path: x}\nmodels: 5\njudge: http://h#m\nout: o\n"),
        "job.yaml: 5: no such folder, and no URL.",
        "Give a run's or a model's folder (runs/NAME, runs/NAME#base), or URL#MODEL as in "
        "http://localhost:11434/v1#llama3.2.",
    ),
    # -- the command line
    Case(
        "words: a key without a value",
        words("sft", "--seed"),
        "--seed needs a value.",
        "Write --seed=VALUE.",
    ),
    Case(
        "words: not a number",
        words("sft", "learning_rate=.nan"),
        "the command line: learning_rate: expected a finite number (found nan).",
        LIST_KEYS,
    ),
    Case(
        "words: faults of a file and of the words",
        lambda tmp, fixtures: [*config_of("lora_rr: 8\nengine: magic\n")(tmp, fixtures), "learning_rate=fast", "sed=1"],
        "run.yaml: there is no key 'lora_rr'. Did you mean 'lora_r'?\n"
        "run.yaml: engine: expected 'fused', 'trl' or 'unsloth' (found 'magic').\n"
        "the command line: there is no key 'sed'. Did you mean 'seed'?\n"
        "the command line: learning_rate: expected a number, without a unit (found 'fast').",
        LIST_KEYS,
    ),
    Case(
        "words: a stage outside of the run",
        words("sft", "stage=../../etc"),
        "the command line: stage: expected one word of letters, digits, _ and - (found '../../etc').",
        LIST_KEYS,
    ),
    Case(
        "words: a regular expression for modules",
        words("sft", "lora_target_modules=(q|k)_proj.*"),
        "the command line: lora_target_modules: expected module names such as q_proj; regular expressions are not read (found '(q|k)_proj.*').",
        LIST_KEYS,
    ),
    Case(
        "words: a nested key that is none",
        words("sft", "dataset.pth=x"),
        "the command line: there is no key 'dataset.pth'. Did you mean 'dataset.path'?",
        LIST_KEYS,
    ),
    Case(
        "words: no such configuration",
        words("sft", "--config", "mine.yaml"),
        "configuration mine.yaml: there is no such file.",
        f"Give a YAML file, or a shipped one: {', '.join(preset_configs())}.",
    ),
    # -- a run's own files
    Case(
        "run: a stage.json that was cut off",
        broken_stage('{"format": 1, "status": "compl'),
        "runs/t/sft/stage.json: not valid JSON (Unterminated string starting at: line 1 column 25 (char 24)).",
        "Restore the file, or start in another folder.",
    ),
    Case(
        "run: a stage.json that is a list",
        broken_stage("[]"),
        "runs/t/sft/stage.json: expected a JSON object, found a list.",
        "Restore the file, or start in another folder.",
    ),
    Case(
        "run: a stage.json of bytes",
        broken_stage(b"\xff\xfe\x00"),
        "runs/t/sft/stage.json: not valid JSON (not UTF-8 at byte 0).",
        "Restore the file, or start in another folder.",
    ),
]
