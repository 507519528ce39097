"""The reference of all keys, made from the schema: for ``zephyr-lite keys`` and for docs/configuration.md."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from itertools import groupby
from textwrap import fill
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ..errors import UserError
from .compat import unknown_key
from .foreign_keys import ACCEPTED, ALIASES, REFUSED, TRANSLATED
from .load import LIST_KEYS, load_config
from .schema import DPO_DEFAULTS, DatasetSpec, MemorySpec, RunConfig
from .strict_yaml import dump_yaml

# the first key of each part of the schema → the part's heading
_PARTS = {
    "model_name_or_path": "Model and output",
    "dataset": "Rows",
    "adapters": "The base and its adapters",
    "batch_size": "Optimization",
    "beta": "Preference optimization (dpo)",
    "eval_steps": "Evaluation, checkpoints, trackers, memory",
}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", type(None): "null"}
REQUIRED = "required"
_THEIRS = "Keys of TRL, transformers, alignment-handbook, LLaMA-Factory and Axolotl"
# keys that the published recipe sets to other values than the defaults, because they depend on a run's length
_RECIPE = ("eval_steps", "save_steps")


class Key(NamedTuple):
    """A row of the reference, in Markdown."""

    name: str
    values: str
    default: str
    meaning: str


def keys_by_part() -> dict[str, list[Key]]:
    """{heading: keys}, in the schema's order; then the keys of a data set and of ``memory``."""
    parts: dict[str, list[Key]] = {}
    for name, info in RunConfig.model_fields.items():
        heading = _PARTS[name] if name in _PARTS else list(parts)[-1]
        parts.setdefault(heading, []).append(_key(name, info))
    for parent, heading, model in (("dataset", "A data set", DatasetSpec), ("memory", "Memory", MemorySpec)):
        parts[heading] = [_key(f"{parent}.{name}", info) for name, info in model.model_fields.items()]
    return parts


def keys_as_lines(word: str | None, width: int) -> Iterator[str]:
    """The reference for a terminal.

    Args:
        word: show only the keys that have it in their name or meaning, other tools' keys included.
        width: the columns of a line.
    """
    wanted, deeper = (word or "").lower(), " " * 6
    found: dict[str, list[str]] = {}
    for heading, keys in keys_by_part().items():
        for key in keys:
            if wanted.replace("-", "_") in key.name or wanted in key.meaning.lower():
                default = key.default if key.default == REQUIRED else f"default {key.default}"
                facts = f"  {key.name}: {key.values}; {default}"
                found.setdefault(heading, []).extend((facts, deeper + _plain(key.meaning)))
    if word is None:
        found[_THEIRS] = ["  `zephyr-lite keys NAME` says what a key of theirs does here."]
    elif others := [f"  {name}: {what}" for name, what in _others(wanted)]:
        found[_THEIRS] = others
    if not found:
        raise UserError(unknown_key(wanted, RunConfig.model_fields), LIST_KEYS)
    for heading, lines in found.items():
        yield from ([""] if heading != next(iter(found)) else []) + [heading]
        yield from (fill(line, width, subsequent_indent=deeper, break_on_hyphens=False) for line in lines)


def keys_as_markdown() -> str:
    """The reference for docs/configuration.md."""
    lines: list[str] = []
    for heading, keys in keys_by_part().items():
        lines += ["", f"### {heading}", "", "| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {key.values} | {key.default} | {key.meaning} |" for key in keys]
    lines += ["", "### Other tools' names", "", "| there | here |", "|---|---|"]
    lines += [f"| `{theirs}` | `{ours}` |" for theirs, ours in (ALIASES | TRANSLATED).items()]
    lines += ["", "### Accepted, and without effect", "", "| key | why |", "|---|---|"]
    for why, items in groupby(ACCEPTED.items(), key=lambda item: item[1]):
        lines.append(f"| {', '.join(f'`{key}`' for key, _ in items)} | {why} |")
    lines += ["", "### Refused, except null and the values without effect", ""]
    lines += ["| key | accepted | why not others |", "|---|---|---|"]
    lines += [f"| `{key}` | {_accepted(key)} | {why} |" for key, (_, why) in REFUSED.items()]
    return "\n".join(lines).strip() + "\n"


def _others(word: str) -> Iterator[tuple[str, str]]:
    """Other tools' keys with the word in their name, or in the name of the key here; and what each does here."""
    name = word.replace("-", "_")
    yield from ((key, f"{ours} here") for key, ours in (ALIASES | TRANSLATED).items() if name in key or word in ours)
    yield from ((key, f"accepted, and without effect: {why}") for key, why in ACCEPTED.items() if name in key)
    for key, (_, why) in ((key, verdict) for key, verdict in REFUSED.items() if name in key):
        yield key, f"refused, except {', '.join(filter(None, ('null', _accepted(key))))}: {why}"


def _accepted(key: str) -> str:
    """The values of a refused key that are accepted."""
    values = (str(value).lower() if isinstance(value, bool) else str(value) for value in REFUSED[key][0])
    return ", ".join(filter(None, values))


def _plain(markdown: str) -> str:
    """Without code marks and links; the page of a link to another one stays."""
    markdown = re.sub(r"\[([^\]]+)\]\((\w+\.md)[^)]*\)", r"\1 (docs/\2)", markdown)
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", markdown).replace("`", "")


def _key(name: str, info: FieldInfo) -> Key:
    kinds = _types(info.annotation)
    nothing = [_WORDS[type(None)]] if _WORDS[type(None)] in kinds else []
    kinds = [kind for kind in kinds if kind not in nothing]
    values = ", ".join([", ".join(kinds) + _limits(info), *nothing])
    default = REQUIRED if info.is_required() else _default(name, info)
    return Key(name, values, default, info.description or "")


def _default(name: str, info: FieldInfo) -> str:
    """A key's default; then dpo's and the recipe's, where they differ."""
    sft, dpo = _value(name, info.default), _value(name, DPO_DEFAULTS.get(name, info.default))
    text = sft if sft == dpo else f"{sft} (dpo: {dpo})"
    if name in _RECIPE:
        recipe = [_value(name, getattr(load_config(m, f"zephyr-7b/{m}").config, name)) for m in ("sft", "dpo")]
        text += f" (recipe: {' and '.join(dict.fromkeys(recipe))})"
    return text


def _types(annotation: Any) -> list[str]:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return list(map(str, inner))
    if origin is Annotated:
        return _types(inner[0])
    if origin in (Union, types.UnionType):
        return [word for each in inner for word in _types(each)]
    if origin is list:
        if inner[0] is DatasetSpec:
            return ["data sets"]
        return ["list of these" if get_origin(inner[0]) is Literal else f"list of {_types(inner[0])[0]}s"]
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
