"""The configuration of a run: one flat set of keys for both stages (``schema``), YAML files, ``key=value`` overrides.

Keys have the names of TRL, PEFT and transformers. A YAML file of TRL, the alignment handbook, LLaMA-Factory or Axolotl
runs unchanged, or is refused with the reason (``compat``). Unknown keys are refused, with the nearest known one. All
faults are reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from ..errors import UserError
from ..io.redact import refuse_secrets
from ..io.text import comma_list, expected, is_file, refuse_special, short
from .compat import BATCH_PARTS, rename, tool_of, unknown_key
from .foreign_keys import ALIASES, SFT_WEIGHTS, TRANSLATED
from .schema import DPO_DEFAULTS, LOSS_DEFAULTS, OWN_KEYS, DatasetSpec, MemorySpec, RunConfig
from .strict_yaml import dump_yaml, read_word, read_yaml

Method = Literal["sft", "dpo"]
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NOT_HELD_OUT = "nothing is held out (set val_size=0.05 or eval_dataset): the held-out loss will not be computed"
PLACED = ("output_dir", "adapters", "stage")  # set by a command that runs several stages
WORDS = "the command line"  # the place of faults in key=value words
LIST_KEYS = "`zephyr-lite keys` lists all keys and their values."

# what is expected, where the type says too little
_EXPECTED = {
    "stage": "expected one word of letters, digits, _ and -",
    "memory.vram": "expected a size with its unit, such as 8GiB",
    "memory.host": "expected a size with its unit, such as 8GiB",
    "memory": "expected auto, or some of its keys: memory.vram=8GiB, in a file {vram: 8GiB}",
    "dataset": "expected a path, or keys and values such as {path: rows.jsonl, split: train}",
    "eval_dataset": "expected a path, or keys and values such as {path: rows.jsonl, split: train}",
    "lora_target_modules": "expected all-linear, or module names such as q_proj; regular expressions are not read",
    "loss_type": "expected a loss, or a list of several without kto; `zephyr-lite keys loss_type` lists them",
}


@dataclass
class Loaded:
    """A resolved configuration."""

    config: RunConfig
    given: set[str]  # the keys that the file or the command line set; the others are defaults
    notes: list[str] = field(default_factory=list)  # one line for each key that was renamed or has no effect
    tool: str | None = None  # that the file is for, if it is another's
    announce: bool = False  # print what the run downloads and writes, before it does
    typed: set[str] = field(default_factory=set)  # the keys that the command line set
    automatic: set[str] = field(default_factory=set)  # keys whose values the rows decide (``train.small_data``)


def find_config(name: str, kind: str = "stages") -> Path:
    """A YAML file by its path, or a shipped one by its name (``zephyr-7b/sft``).

    Args:
        kind: of the shipped files; see ``preset_configs``.
    """
    path = Path(name)
    refuse_special(path, name)
    if is_file(path):
        return path
    shipped = preset_configs(kind)
    if name.removesuffix(".yaml") not in shipped:
        raise UserError(
            f"{'table' if kind == 'tables' else 'configuration'} {name[:300]}: there is no such file.",
            f"Give a YAML file, or a shipped one: {', '.join(shipped)}.",
        )
    return shipped[name.removesuffix(".yaml")]


def preset_configs(kind: str = "stages") -> dict[str, Path]:
    """{name: path} of the shipped YAML files.

    Args:
        kind: ``stages`` (the configurations of training commands), ``tables`` (ablations) or ``feedback``; the names
            of the last two leave their folder out.
    """
    root = CONFIGS if kind == "stages" else CONFIGS / kind
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}
    others = ("tables/", "feedback/") if kind == "stages" else ()
    return {name: path for name, path in found.items() if not name.startswith(others)}


def load_config(
    method: Method, file: str | None = None, overrides: list[str] | None = None, base: dict[str, Any] | None = None
) -> Loaded:
    """Resolve defaults, then ``base`` (inherited settings), then the YAML file, then the overrides.

    Args:
        method: the stage, for its defaults.
        file: a YAML file or a shipped configuration's name.
        overrides: ``key=value``, ``nested.key=value``, ``--key value`` or ``--key=value`` words.
        base: settings inherited from the stage before; they do not count as given.

    Raises:
        UserError: a file or words that cannot be read; or unknown keys and invalid values, all of them in one message.
    """
    path = find_config(file) if file else None
    notes: list[str] = []
    faults: dict[str, list[str]] = {str(path): [], WORDS: []}
    own, is_dpo = RunConfig.model_fields, method == "dpo"
    defaults = {**(DPO_DEFAULTS if is_dpo else {}), **(base or {})}
    written = read_yaml(path) if path is not None else {}
    given = rename(written, notes, faults[str(path)], file=True, dpo=is_dpo)
    elsewhere: Method = "sft" if is_dpo else "dpo"
    if given.get("stage") == elsewhere:
        raise UserError(
            f"{path}: stage: {written['stage']}: this file is for zephyr-lite {elsewhere}, and not for {method}.",
            "Give the other command, or another file.",
        )
    words = _read_words(overrides or [], faults[WORDS])
    flat = {key: value for key, value in words if "." not in key}
    if not flat.keys().isdisjoint(BATCH_PARTS):  # one of them on the command line is multiplied with the file's other
        flat = {key: written[key] for key in BATCH_PARTS if key in written} | flat
    if flat.keys() & SFT_WEIGHTS and "loss_type" in written:  # it is added to the file's loss
        flat = {"loss_type": written["loss_type"], **flat}
    said = rename(flat, notes, faults[WORDS], dpo=is_dpo)
    for key, other in (("warmup_ratio", "warmup_steps"), ("loss_type", "loss_weights")):
        if key in said:  # the file's other key would override it, or belongs to another value
            given.pop(other, None)
    replaced = "dataset" in said or any(key == "dataset.path" for key, _ in words)
    unset = "eval_dataset" not in said if replaced else "dataset" in given and "eval_dataset" not in given
    if unset:
        given["eval_dataset"] = None  # the recipe's held-out rows do not belong to it
    given |= said
    # dataset.path resets the data set, so it is applied before its other keys, in any order of words
    nested = sorted((word for word in words if "." in word[0]), key=lambda word: not word[0].endswith(".path"))
    typed = {*said, *(key.partition(".")[0] for key, _ in nested)}
    for key, value in nested:
        if fault := _set_nested(given, key, value, defaults):
            faults[WORDS].append(fault)
    for key in OWN_KEYS[elsewhere]:
        if key in typed:
            faults[WORDS].append(f"{key}: a key of {elsewhere}, which {method} does not read. Remove it.")
        elif given.get(key, own[key].default) != own[key].default:
            notes.append(f"{key} changes nothing here: only {elsewhere} reads it")
        if is_dpo or key in typed:
            given.pop(key, None)
    if is_dpo:
        own_file = path is not None and not path.is_relative_to(CONFIGS)
        losses = given.get("loss_type")
        if losses == "sft":
            fault = "loss_type: sft alone is the training of zephyr-lite sft. Run that, or add sft to another loss: sigmoid,sft."
            faults[WORDS if "loss_type" in typed else str(path)].append(fault)
        for loss in losses if isinstance(losses, list) else [losses]:  # the recipe's values are those of sigmoid
            tuned = {
                k: v for k, v in LOSS_DEFAULTS.get(str(loss), {}).items() if k not in (given if own_file else typed)
            }
            notes += [f"{key}: {value:g}, the default with loss_type {loss}" for key, value in tuned.items()]
            given.update(tuned)
    values = {**defaults, **given}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for place, fault in _explain(error, values).items():
            if place or not any(faults.values()):  # keys that do not go together may be a consequence of another fault
                keys = {place.partition(".")[0]} if place else set(re.findall(r"\w+", fault))
                faults[WORDS if path is None or keys & typed else str(path)].append(fault)
    if any(faults.values()):
        lines = [f"{where}: {fault}" for where, found in faults.items() for fault in found]
        raise UserError("\n".join(lines), LIST_KEYS)
    refuse_secrets(config.model_dump(mode="json"), "the configuration")
    notes += [
        f"{spec.path}: the rows of eval_dataset are trained on too, so the evaluation loss is not a held-out loss"
        for spec in config.eval_dataset
        if spec in config.dataset
    ]
    if unset and not config.eval_dataset:
        notes.append(NOT_HELD_OUT)
    return Loaded(config, set(given), notes, tool_of(written), typed=typed)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to the same values."""
    return dump_yaml(config.model_dump(mode="json"))


def _split_words(words: Iterable[str]) -> list[tuple[str, str]]:
    """(key, text of its value) of each override."""
    result = []
    remaining = iter(words)
    for word in remaining:
        key, equals, text = word.partition("=")
        if not equals and word.startswith("--"):
            text = next(remaining, "--")
            if text.startswith("--"):
                raise UserError(f"{word} needs a value.", f"Write {word}=VALUE.")
        elif not equals:
            hint = "Write no spaces around the =, and quote a value with spaces: system='Be brief.'"
            if word.endswith((".yaml", ".yml")):
                hint = f"Write --config {short(word)}."
            raise UserError(f"{short(word)} is neither key=value nor --key value.", hint)
        result.append((key.lstrip("-"), text))
    return result


def _read_words(words: Iterable[str], faults: list[str]) -> list[tuple[str, Any]]:
    """(key, value) of each override; a line in ``faults`` for each value that cannot be read."""
    result = []
    for key, text in _split_words(words):
        key = key.replace("-", "_")
        field = RunConfig.model_fields.get(ALIASES.get(key, key))
        try:
            value = read_word(text, numbers=field is None or field.annotation not in (str, str | None))
        except ValueError as error:
            faults.append(f"{key}: {error}.")
        else:
            result.append((key, value))
    return result


def words_by_scope(words: Iterable[str]) -> dict[str, list[str]]:
    """The words of a command that runs several stages: ``key=value`` for all of them, under "", or for the one that reads the
    key (``OWN_KEYS``), and ``SCOPE.key=value``."""
    scoped: dict[str, list[str]] = {}
    for key, text in _split_words(words):
        head, dot, tail = key.partition(".")
        scope = head if dot and head.replace("-", "_") not in RunConfig.model_fields else ""
        key = tail if scope else key
        name = key.replace("-", "_")
        ours = (ALIASES | TRANSLATED).get(name, name).partition(" ")[0]
        scope = scope or next((method for method, keys in OWN_KEYS.items() if ours in keys), "")
        refuse_placed([key.partition(".")[0].replace("-", "_")], WORDS)
        scoped.setdefault(scope, []).append(f"{key}={text}")
    return scoped


def refuse_placed(keys: Iterable[str], where: str) -> None:
    """Raise a UserError if a key is one of ``PLACED``, which a command that runs several stages sets itself."""
    if placed := [key for key in keys if key in PLACED]:
        raise UserError(f"{where}: {placed[0]} is set by this command.", "Choose the folder with --out.")


def _set_nested(target: dict[str, Any], key: str, value: Any, defaults: dict[str, Any]) -> str | None:
    """Set ``dataset.split``, ``memory.keep`` or ``lr_scheduler_kwargs.num_cycles`` in place, or ``dataset.columns.prompt`` in
    the map of columns; returns what is wrong with the key."""
    head, _, rest = key.partition(".")
    rows = head in ("dataset", "eval_dataset")
    if not rows and head not in ("memory", "lr_scheduler_kwargs"):
        return unknown_key(key, RunConfig.model_fields)
    current = target.get(head, defaults.get(head))
    if rows and head not in target and head not in defaults:
        current = [spec.model_dump(exclude_defaults=True) for spec in RunConfig.model_fields[head].default]
    if isinstance(current, list):
        if len(current) > 1:
            return f"{key}: {head} has {len(current)} entries; change them in the file."
        current = current[0] if current else {}
    if isinstance(current, str) and rows:
        current = {"path": current}
    current = dict(current) if isinstance(current, dict) else {}
    if rest == "path":
        current = {"path": value}  # split, limit and columns were of the other path
    elif rest.startswith("columns."):
        named = current.get("columns")
        current["columns"] = {**(named if isinstance(named, dict) else {}), rest.removeprefix("columns."): value}
    else:
        current[rest] = comma_list(value) if rest == "columns" else value
    target[head] = current
    return None


def _explain(error: ValidationError, values: dict[str, Any]) -> dict[str, str]:
    """{place: what is wrong there}; "" is the place of keys that do not go together."""
    found: dict[str, str] = {}
    for item in error.errors():
        # without pydantic's names of the types that a value may have
        parts = [part for part in item["loc"] if not (isinstance(part, str) and ("[" in part or part == "bool"))]
        several = values.get(str(parts[0])) if parts else None
        if parts[1:2] == [0] and not (isinstance(several, list) and len(several) > 1):
            del parts[1]  # the only entry of a list, which the user may have written without one
        place = ".".join(map(str, parts))
        key = ".".join(part for part in parts if isinstance(part, str))
        place = key if key in _EXPECTED else place
        if item["type"] == "extra_forbidden":
            fields = MemorySpec.model_fields if parts[0] == "memory" else DatasetSpec.model_fields
            known = [".".join(map(str, [*parts[:-1], key])) for key in fields]
            found[place] = unknown_key(place, known if len(parts) > 1 else RunConfig.model_fields)
        elif place in found and key not in _EXPECTED:  # a value of several types is wrong for each
            what = expected(item).replace("expected ", "")
            if what not in found[place]:
                found[place] = found[place].replace("expected ", f"expected {what} or ", 1)
        else:
            what = _EXPECTED.get(key) or expected(item)
            value = f" (found {short(item['input'])})" if place and item["type"] != "missing" else ""
            found[place] = f"{place}: {what}{value}." if place else f"{what}."
    return found
