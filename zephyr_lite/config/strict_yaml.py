"""YAML that somebody wrote or downloaded: the safe loader, without keys written twice, and without what grows when it is
read: nesting and aliases are limited."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..io.reading import read_text
from ..io.words import short

FILE_BYTES = 2**20
NESTING = 30
NODES = 20_000  # with every alias written out
WORD = 65_536  # letters of one value on the command line


class _Fault(yaml.MarkedYAMLError):
    """What this loader refuses beyond the safe one."""


class _BaseFault(_Fault):
    """A number of another base than it looks like."""


class _Loader(yaml.SafeLoader):
    _deep = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._deep += 1
        if self._deep > NESTING:
            raise _Fault(problem=f"nested more than {NESTING} deep", problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._deep -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            OverflowError,
        ):  # of int(), date(), a table of words
            kind = str(node.tag).rpartition(":")[2]
            what = f"{short(node.value)} is read as {kind}, and is none; put it in quotes if it is a text"
            raise _Fault(problem=what, problem_mark=node.start_mark) from None

    def construct_document(self, node: Any) -> Any:
        self._size(node, {}, set())
        return super().construct_document(node)

    def _size(self, node: Any, known: dict[int, int], above: set[int]) -> int:
        """How many nodes there are with every alias written out; keys that stand twice are refused on the way."""
        if id(node) in above:
            raise _Fault(problem="an alias of what it stands in", problem_mark=node.start_mark)
        if id(node) in known:
            return known[id(node)]
        above.add(id(node))
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(self._size(child, known, above) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if (key.tag, key.value) in seen:
                        raise _Fault(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
                    seen.add((key.tag, key.value))
                total += self._size(key, known, above) + self._size(value, known, above)
        if total > NODES:
            raise _Fault(problem=f"more than {NODES:,} values, every alias written out", problem_mark=node.start_mark)
        above.discard(id(node))
        known[id(node)] = total
        return total


def _number(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number, unless it is one of base 8 or 60, which only YAML 1.1 takes for one: 010 is 8 there, 1:30 is 90."""
    if ":" in node.value or re.fullmatch(r"[-+]?0[0-7_]+", node.value):
        what = f"{short(node.value)} is a number of base 8 or 60 in YAML; drop leading zeros, or put a text in quotes"
        raise _BaseFault(problem=what, problem_mark=node.start_mark)
    return loader.construct_yaml_int(node) if node.tag.endswith("int") else loader.construct_yaml_float(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def read_yaml(path: Path) -> dict[str, Any]:
    """The ``key: value`` lines of a YAML file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    text = read_text(path, limit=FILE_BYTES)
    try:
        values = _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path} line {mark.line + 1}" if mark is not None else str(path)
        what = " ".join(part for part in (error.context, error.problem) if part)
        rows = path.suffix.lower() in (".jsonl", ".csv", ".parquet")
        hint = f"It looks like a file of rows; those are given as dataset={path}." if rows else "Mend the line."
        raise UserError(f"{place}: not readable as YAML: {what}.", hint) from None
    except yaml.reader.ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise UserError(
            f"{path} line {number}: not readable as YAML: the control character U+{error.character:04X}.",
            "Remove it.",
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected `key: value` lines, found {type(values).__name__}.", "Write `seed: 42`, for instance."
        )
    for key in values:
        if not isinstance(key, str):
            raise UserError(
                f"{path}: expected `key: value` lines, found the key {short(key)}, which is no word.",
                "YAML reads on, off, yes, no, numbers and dates as such: put the key in quotes if it is meant as a word.",
            )
    return values


def read_front_matter(text: str) -> tuple[dict[str, Any], str]:
    """A model card's front matter (YAML between two lines of ``---``) and the text below it.

    A card is a stranger's prose: front matter that is none, or that cannot be read, is {}.
    """
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if match is None or len(match[1]) > FILE_BYTES:
        return {}, text
    try:
        values = _load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError, UserError):
        values = None
    return (values if isinstance(values, dict) else {}), text[match.end() :]


def read_word(text: str, *, numbers: bool = True) -> Any:
    """One value of the command line, as it would be read in a file; what is no YAML is a text.

    Args:
        numbers: False for a key whose value is a text: a folder called 2024, a revision called 0012345.

    Raises:
        UserError: a number of base 8 or 60.
    """
    if not text.strip():
        return None
    try:
        value = _load(text)
    except _BaseFault as error:
        if numbers:
            raise UserError(f"the command line: {error.problem}.") from None
        value = text
    except yaml.YAMLError:
        value = text
    if not numbers and not isinstance(value, bool | str | None):
        return text
    if numbers and isinstance(value, str):  # YAML 1.1 reads 5e-6 as a word
        with contextlib.suppress(ValueError):
            value = float(value) if any(c.isdigit() for c in value) else value
    return value


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump_yaml(values: dict[str, Any]) -> str:
    """``key: value`` lines, in the given order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
