"""The rows of one or several data sets as normalised messages."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.text import counted, shown
from .formats import COLUMNS, PLAIN, TEXT, TURNS, Method, detect, mapping_hint, normalise
from .messages import RowError, message
from .row_files import raw_rows
from .sources import open_source
from .workers import map_rows

PLACES = 5  # of rows, that a report names for each reason
# a normalised row: its JSON ("" if it was left out), its place, and {"fault"} or {"kind", "changes", …} as JSON
_NORMALISED = datasets.Features(dict.fromkeys(("row", "where", "facts"), datasets.Value("string")))


class NothingHeldOut(UserError):
    """``val_size: auto`` holds nothing out of so few rows."""


@dataclass
class Rows:
    """Normalised rows of one mixture."""

    # columns: row, the JSON of ``formats.Row.value`` (arguments of tools have no common schema); where, "train.jsonl row 17"
    dataset: datasets.Dataset
    notes: list[str] = field(default_factory=list)  # each source's format, number of rows, and unread columns
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason → places of the rows that were left out
    changed: dict[str, list[str]] = field(default_factory=dict)  # change → places of the rows it was made in
    read: int = 0  # rows

    def values(self) -> Iterator[dict[str, Any]]:
        """The normalised rows."""
        return (json.loads(text) for text in self.dataset["row"])


def load_rows(specs: Sequence[DatasetSpec], method: Method, *, seed: int, system: str | None = None) -> Rows:
    """Load, normalise and mix data sets.

    ``val_size`` holds rows of all sources out by their content; ``limit`` draws rows with the seed; ``weight`` below 1 draws
    a share of them, above 1 repeats them. Several sources are interleaved evenly, and the same arguments give the same order.

    Args:
        specs: the sources, at least one.
        method: ``sft`` gives conversations, ``dpo`` preference pairs, ``kto`` these and answers with labels.
        seed: of ``limit`` and ``weight``.
        system: a system turn for rows without one.

    Raises:
        UserError: a source does not exist, cannot be read, is empty, lacks the split or a column, is of the wrong kind
            for the method, or has no usable row.
    """
    rows = Rows(datasets.Dataset.from_dict({}))
    rngs = [np.random.default_rng([seed, number]) for number in range(len(specs))]
    parts = [_load_source(spec, method, rng, system, rows) for spec, rng in zip(specs, rngs)]
    if specs[0].val_size is not None:
        _take_side(specs, parts, rngs, rows)
    if specs[0].part != "test":
        parts = [_repeated(part, spec.weight, rng) for part, spec, rng in zip(parts, specs, rngs)]
    rows.dataset = parts[0]
    if len(parts) > 1:  # the k-th of a source's n rows comes at (k + ½) / n of the way
        places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
        rows.dataset = datasets.concatenate_datasets(parts).select(np.argsort(places, kind="stable"))
    return rows


def _load_source(
    spec: DatasetSpec, method: Method, rng: np.random.Generator, system: str | None, rows: Rows
) -> datasets.Dataset:
    """The usable rows of one source; notes and counts are added to ``rows``."""
    source = open_source(spec)
    label, total = source.label, len(source)
    if total == 0:
        raise UserError(f"{label}: empty; there is no row in it.")
    only = spec.columns if isinstance(spec.columns, list) else None
    mapping = spec.columns if isinstance(spec.columns, dict) else {}
    if len({*mapping.values()}) < len(mapping):
        raise UserError(f"{label}: columns: one column is named twice: {mapping}.", "Name each column once.")
    for ours, theirs in (mapping or {name: name for name in only or [] if name in COLUMNS}).items():
        if ours not in COLUMNS:
            raise UserError(f"{label}: columns: {ours!r} is not a column here.", f"Ours are {', '.join(COLUMNS)}.")
        if theirs not in source.columns and not (source.is_text and any(theirs in row for row in source)):
            raise UserError(
                f"{label}: columns: there is no column {theirs!r}.",
                f"There are {shown(', '.join(source.columns), 500)}.",
            )
    raw = source.select_columns([*COLUMNS, *mapping.values()]).table
    if not raw.column_names:
        detect(source.columns, method, label)  # raises
    numbers = np.arange(total) if spec.val_size is not None else _drawn_rows(spec, total, label, rng)
    raw = raw if len(numbers) == total else raw.select(numbers)
    options = {"method": method, "label": label, "system": system, "mapping": mapping, "only": only, "numbers": numbers}
    mapped = map_rows(raw, _normalise, _NORMALISED, options, options, f"reading {label}", with_indices=True)
    facts = [json.loads(text) for text in mapped["facts"]]
    kinds = Counter(fact["kind"] for fact in facts if "kind" in fact)
    decoded = [] if source.is_text else source.columns
    not_read = {"columns": set(decoded) - {*COLUMNS, *mapping.values()}, "message keys": set[str]()}
    good: list[int] = []
    dropped: dict[str, list[str]] = {}
    for index, (fact, where) in enumerate(zip(facts, mapped["where"])):
        if fact.get("kind") == PLAIN and len(kinds) > 1:  # conversations and texts: the texts are left out
            fact = {"fault": "no conversation in columns text"}
        if "fault" in fact:
            dropped.setdefault(fact["fault"], []).append(where)
            continue
        good.append(index)
        for change in fact["changes"]:
            rows.changed.setdefault(change, []).append(where)
        for what, names in not_read.items():
            names.update(fact[what])
    if not good:
        columns = list(_renamed(dict.fromkeys(source.columns), mapping, only))
        kind = detect(columns, method, label)
        raise UserError(
            f"{label}: none of {len(mapped)} rows can be used (read as {kind}): {summarise(dropped)}.",
            mapping_hint(columns, method),
        )
    for reason, where in dropped.items():
        rows.dropped.setdefault(reason, []).extend(where)
    rows.read += len(mapped)
    if len(kinds) > 1:
        del kinds[PLAIN]
    known = " and ".join(dict(kinds.most_common()))
    note = f"{label}: read as {known}, {counted(len(mapped), 'row')}"
    note += f" of {total:,}" if len(mapped) < total else ""
    note += f", {len(mapped) - len(good):,} left out" if len(good) < len(mapped) else ""
    note += f", weight {spec.weight:g}" if spec.weight != 1 else ""
    rows.notes.append(note)
    if unread := [f"{what} {shown(', '.join(sorted(names)), 1000)}" for what, names in not_read.items() if names]:
        rows.notes.append(f"{label}: not read: {'; '.join(unread)}")
    return mapped.select_columns(["row", "where"]).select(np.asarray(good))


def _repeated(part: datasets.Dataset, weight: float, rng: np.random.Generator) -> datasets.Dataset:
    """A source's rows as often as a ``weight`` above 1 says."""
    if weight <= 1:
        return part
    rows = np.arange(len(part))
    share = round(len(part) * (weight - int(weight)))
    return part.select(np.concatenate([*[rows] * int(weight), np.sort(rng.permutation(rows)[:share])]))


def _take_side(
    specs: Sequence[DatasetSpec], parts: list[datasets.Dataset], rngs: Sequence[np.random.Generator], rows: Rows
) -> None:
    """Replace the sources by their rows on the side of ``part``, from which ``limit`` and ``weight`` then draw. The rows with
    the smallest hashes are held out, each once.

    Raises:
        UserError: nothing is left on one side, ``NothingHeldOut`` if val_size is auto.
    """
    size, part = specs[0].val_size, specs[0].part
    assert size is not None
    hashes = [[_hashes(text) for text in each["row"]] for each in parts]
    keys = sorted({key for each in hashes for key, _ in each})
    total, distinct = sum(map(len, hashes)), len({row for each in hashes for _, row in each})
    if size == "auto":
        count = min(max(round(0.05 * len(keys)), 5), 300, len(keys) // 5)
        if count == 0 and part == "test":
            raise NothingHeldOut(f"{specs[0].path}: too few rows to hold any out.", "Set val_size to a number.")
    elif not 0 < (count := round(len(keys) * size) if size < 1 else int(size)) < len(keys):
        raise UserError(
            f"{specs[0].path}: val_size holds {count:,} of {len(keys):,} different rows out.",
            "Set val_size=0 to train on all rows, or a number that leaves rows on both sides.",
        )
    held_out, seen, rows.read = set(keys[:count]), set[bytes](), 0
    for place, (spec, each, rng) in enumerate(zip(specs, hashes, rngs)):
        side = []
        for index, (key, row) in enumerate(each):
            if (key in held_out) == (part == "test") and not (part == "test" and row in seen):
                side.append(index)
            seen.add(row)
        drawn = _drawn_rows(spec, len(side), spec.path, rng)
        parts[place] = parts[place].select(np.asarray(side, dtype=np.int64)[drawn])
        rows.read += len(drawn)
    twice = total - distinct
    how = ", which are not trained on"
    if part == "train":
        how = " are held out, and not learned; val_size=0 trains on all"
        if twice:
            how += f"; {twice:,} row{'s are copies' if twice > 1 else ' is a copy'} of others, on the same side"
    if count:
        what = "rows" if len(keys) == total else "different rows"
        rows.notes.append(f"{count:,} of {len(keys):,} {what}{how}")


def _hashes(text: str) -> tuple[bytes, bytes]:
    """Of what decides the side of a row (a conversation, or the prompt of a pair), and of the whole row."""
    row = json.loads(text)
    parts = json.dumps(row.get("prompt", row)), text
    key, whole = (hashlib.sha256(each.encode()).digest()[:16] for each in parts)
    return key, whole


def _drawn_rows(spec: DatasetSpec, total: int, label: str, rng: np.random.Generator) -> np.ndarray:
    """The rows that ``test_size``, ``limit`` and a ``weight`` below 1 leave, ascending.

    The held-out rows depend on the number of rows alone: drawn with the run's seed, they would be trained on in a run
    with another seed.
    """
    numbers = np.arange(total)
    if spec.test_size is not None:
        held_out = round(total * spec.test_size) if spec.test_size < 1 else int(spec.test_size)
        if not 0 < held_out < total:
            raise UserError(
                f"{label}: test_size {spec.test_size:g} holds out {held_out:,} of {total:,} rows.",
                "Choose one that leaves rows to train on, and rows to hold out.",
            )
        drawn = np.random.default_rng(total).permutation(total)
        numbers = np.sort(drawn[:held_out] if spec.part == "test" else drawn[held_out:])
    if spec.limit is not None and spec.limit < len(numbers):
        numbers = np.sort(rng.permutation(numbers)[: spec.limit])
    if spec.weight < 1:
        numbers = np.sort(rng.permutation(numbers)[: max(1, round(len(numbers) * spec.weight))])
    return numbers


def summarise(reasons: dict[str, list[str]], first: int | None = 3) -> str:
    """``reason: 12 (file row 3, file row 9, …)`` for each reason, the most frequent first. ``first``: None: all places."""
    items = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return "; ".join(
        f"{reason}: {len(where):,} ({', '.join(where[:first])}{', …' if where[:first] != where else ''})"
        for reason, where in items
    )


def first_places(reasons: Mapping[str, list[str]], first: int = PLACES) -> dict[str, Any]:
    """``reasons`` for JSON: of each the number of its places, and the first few."""
    return {reason: {"count": len(where), "first": where[:first]} for reason, where in reasons.items()}


def _normalise(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    method: Method,
    label: str,
    system: str | None,
    mapping: dict[str, str],
    only: list[str] | None,
    numbers: np.ndarray,
) -> dict[str, list[str]]:
    """A batch of raw rows as ``_NORMALISED``."""
    result: dict[str, list[str]] = {"row": [], "where": [], "facts": []}
    for values, index in zip(raw_rows(batch, label), indices):
        text = ""
        try:
            row = normalise(_renamed(values, mapping, only), method)
            turns = row.value["messages" if method == "sft" else "prompt"]
            if system and turns[0]["role"] not in ("system", TEXT):
                turns.insert(0, message("system", system))
            text = json.dumps(row.value, ensure_ascii=False)
            facts: dict[str, Any] = {"kind": row.kind, "changes": row.changes}
            facts |= {"columns": row.unread_columns, "message keys": row.unread_keys}
        except RowError as error:
            facts = {"fault": str(error)}
        result["row"].append(text)
        result["where"].append(f"{label} row {numbers[index] + 1}")
        result["facts"].append(json.dumps(facts))
    return result


def _renamed(values: dict[str, Any], mapping: dict[str, str], only: list[str] | None) -> dict[str, Any]:
    """A row under this package's column names, without columns that the mapping replaces."""
    if not mapping and only is None:
        return values
    hidden = {*mapping, *mapping.values()}
    if {"completion", "output"} & set(mapping):  # the mapped format, not another one that the row has too
        hidden |= {*TURNS} | ({"output"} if "completion" in mapping else set())
    rest = {c: value for c, value in values.items() if c not in hidden and (only is None or c in only)}
    return {**rest, **{ours: values[theirs] for ours, theirs in mapping.items() if theirs in values}}
