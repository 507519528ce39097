"""YAML with the safe loader, without duplicate keys and without YAML 1.1's numbers of base 8 and 60."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..io.text import read_text, short

FILE_BYTES = 2**20
# of PyYAML; the others are of the constructors: a date of the 99th month, a tag that the value does not fit
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _BaseError(yaml.MarkedYAMLError):
    """A number of base 8 or 60."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number, unless only YAML 1.1 reads it as one: there 010 is 8, and 1:30 is 90."""
    if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
        problem = (
            f"{short(node.value)} is a number of base 8 or 60 in YAML; drop leading zeros, or put a text in quotes"
        )
        raise _BaseError(problem=problem, problem_mark=node.start_mark)
    return loader.construct_yaml_int(node) if node.tag.endswith("int") else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def read_yaml(path: Path) -> dict[str, Any]:
    """The ``key: value`` lines of a YAML file."""
    text = read_text(path, limit=FILE_BYTES)
    try:
        values = yaml.load(text, _Loader)
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "problem", error)
        raise UserError(f"{path}{line}: not readable as YAML: {problem}.", "Correct the line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not set(map(type, values)) <= {str}:
        raise UserError(
            f"{path}: expected `key: value` lines, found {short(values)}.",
            "Write `seed: 42`, for instance; put keys that YAML reads as values (on, off, yes, no, numbers) in quotes. A "
            "file of rows is given as dataset=FILE.",
        )
    return values


def read_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """A model card's front matter (YAML between two lines of ``---``) and the text below it.

    Front matter that is missing or cannot be read is {}.
    """
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if match is None or len(match[1]) > FILE_BYTES:
        return {}, text
    try:
        values = yaml.load(match[1], _Loader)
    except _UNREADABLE:
        values = None
    return (values if isinstance(values, dict) else {}), text[match.end() :]


def read_word(text: str, *, numbers: bool = True) -> Any:
    """One value of the command line, read as in a file; a value that is not YAML is a text.

    Args:
        numbers: False for a key with a text value: a folder called 2024, a revision called 0012345.

    Raises:
        ValueError: a number of base 8 or 60.
    """
    if not text.strip():
        return None
    try:
        value = yaml.load(text, _Loader)
    except _UNREADABLE as error:
        if numbers and isinstance(error, _BaseError):
            raise ValueError(error.problem) from None
        value = text
    if not numbers and not isinstance(value, bool | str | None):
        return text
    if numbers and isinstance(value, str) and re.search(r"\d", value):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 5e-6 as a text
            return float(value)
    return value


def dump_yaml(values: Any) -> str:
    """``key: value`` lines, in the given order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
