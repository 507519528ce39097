"""Writes the list of all configuration keys into ``docs/configuration.md``, between its two marks."""

from __future__ import annotations

import types
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from zephyr_lite.config.compat import ACCEPTED, ALIASES, REFUSED, TRANSLATED
from zephyr_lite.config.load import load_config
from zephyr_lite.config.schema import DPO_DEFAULTS, DatasetSpec, MemorySpec, RunConfig
from zephyr_lite.config.strict_yaml import dump_yaml

BEGIN, END = "<!-- keys: made by python docs/list_keys.py -->", "<!-- end of keys -->"
# the first key of each part of the schema → the part's heading
PARTS = {
    "model_name_or_path": "Model and output",
    "dataset": "Rows",
    "adapters": "The base and its adapters",
    "batch_size": "Optimization",
    "beta": "Preference optimization (dpo)",
    "eval_steps": "Evaluation, checkpoints, trackers, memory",
}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}
# keys that the shipped recipe sets to other values than the defaults, because they depend on a run's length
_SHIPPED = ("eval_steps", "save_steps")


def keys_as_markdown() -> str:
    """Every key of the schema with its values, default and meaning; then other tools' keys."""
    lines: list[str] = []
    for name, info in RunConfig.model_fields.items():
        if name in PARTS:
            lines += [
                "",
                f"### {PARTS[name]}",
                "",
                "| key | values | default (sft; dpo) | meaning |",
                "|---|---|---|---|",
            ]
        lines.append(f"| `{name}` | {values_of(info)} | {default_of(name, info)} | {info.description} |")
    lines += ["", "### A data set", "", _nested("dataset", DatasetSpec)]
    lines += ["", "### Memory", "", _nested("memory", MemorySpec)]
    lines += ["", "### Other tools' names", "", "| there | here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in (ALIASES | TRANSLATED).items()]
    lines += ["", "### Accepted, and without effect", "", "| key | why |", "|---|---|"]
    for why, items in groupby(ACCEPTED.items(), key=lambda item: item[1]):
        lines.append(f"| {', '.join(f'`{key}`' for key, _ in items)} | {why} |")
    lines += ["", "### Refused, except null and the values without effect", ""]
    lines += ["| key | accepted | why not others |", "|---|---|---|"]
    for key, (harmless, why) in REFUSED.items():
        accepted = ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in harmless)
        lines.append(f"| `{key}` | {accepted.strip(', ')} | {why} |")
    return "\n".join(lines).strip() + "\n"


def values_of(info: FieldInfo) -> str:
    """A key's type and limits, in words."""
    kinds = [each for each in _types(info.annotation) if each != _WORDS[type(None)]]
    nothing = [_WORDS[type(None)]] if len(kinds) < len(_types(info.annotation)) else []
    return ", ".join([", ".join(kinds) + _limits(info), *nothing])


def default_of(name: str, info: FieldInfo) -> str:
    """A key's default; after a semicolon dpo's, if it differs; then the shipped recipe's, if it differs."""
    sft, dpo = _value(name, info.default), _value(name, DPO_DEFAULTS.get(name, info.default))
    text = sft if sft == dpo else f"{sft}; {dpo}"
    if name in _SHIPPED:
        shipped = [_value(name, getattr(load_config(m, f"zephyr-7b/{m}").config, name)) for m in ("sft", "dpo")]
        text += f"; shipped: {' and '.join(dict.fromkeys(shipped))}"
    return text


def _nested(parent: str, model: type[BaseModel]) -> str:
    lines = ["| key | values | default | meaning |", "|---|---|---|---|"]
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else _value(name, info.default)
        lines.append(f"| `{parent}.{name}` | {values_of(info)} | {default} | {info.description} |")
    return "\n".join(lines)


def _types(annotation: Any) -> list[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return list(map(str, inner))
    if origin in (Union, types.UnionType):
        return [word for each in inner for word in _types(each)]
    if origin is list:
        return ["data sets" if inner[0] is DatasetSpec else f"list of {_WORDS[inner[0]]}s"]
    if origin is dict:
        return ["map"]
    return ["auto", "keys"] if annotation is MemorySpec else [_WORDS[annotation]]


def _limits(info: FieldInfo) -> str:
    """The smallest and the largest value, without limits that only prevent overflow."""
    found = []
    for limit in info.metadata:
        for sign, word in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            number = getattr(limit, sign, None)
            if number is not None and abs(number) < 2**16:
                found.append(f"{word} {number:g}")
    return f" {' and '.join(found)}" if found else ""


def _value(name: str, value: Any) -> str:
    """A default as written in YAML."""
    if name in ("dataset", "eval_dataset"):
        first = value if isinstance(value, dict) else value[0].model_dump()
        return f"{first['path'].split('/')[-1]}, {first['split']}"
    if isinstance(value, MemorySpec):
        return "auto"
    return dump_yaml(value).splitlines()[0]


if __name__ == "__main__":
    path = Path(__file__).parent / "configuration.md"
    text = path.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{path} lacks the two marks around the list"
    path.write_text(f"{before}{BEGIN}\n\n{keys_as_markdown()}\n{END}{after}", "utf-8")
