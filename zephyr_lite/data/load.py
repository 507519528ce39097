"""Rows from the hub, a folder or a file, in any known format, as one ``datasets.Dataset`` of messages.

``opening`` finds and reads the files, ``formats`` reads one row; this module selects, counts and mixes. No code that
comes with a data set is ever run.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.text import shown
from .formats import COLUMNS, PLAIN, TEXT, TURNS, Method, detect, mapping_hint, normalise
from .messages import RowError, message, with_reason
from .opening import Source, decoded, is_text, open_source
from .workers import map_rows

_COLUMNS = ("row", "where", "fault", "change", "kind", "unread")


@dataclass
class Rows:
    """Normalised rows of one mixture.

    Attributes:
        dataset: columns ``row``, the JSON of ``formats.Row.value`` (arguments of tools have no common schema), and
            ``where`` ("train.jsonl row 17", counted from 1).
        notes: for each source a line with its format and number of rows, and one with the columns that are not read.
        dropped: reason → places of the rows that were left out.
        changed: change → places of the rows it was made in.
        read: the number of rows read.
    """

    dataset: datasets.Dataset
    notes: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, list[str]] = field(default_factory=dict)
    read: int = 0

    def values(self) -> Iterator[dict[str, Any]]:
        """The normalised rows."""
        return (json.loads(text) for text in self.dataset["row"])


def load_rows(specs: Sequence[DatasetSpec], method: Method, *, seed: int, system: str | None = None) -> Rows:
    """Load, normalise and mix data sets.

    ``limit`` draws rows with the seed; ``weight`` below 1 draws a share of them, above 1 repeats them. Several sources
    are interleaved evenly, and the same arguments give the same order.

    Args:
        specs: the sources, at least one.
        method: ``sft`` gives conversations, ``dpo`` preference pairs.
        seed: of ``limit`` and ``weight``.
        system: a system turn for rows without one.

    Raises:
        UserError: a source does not exist, cannot be read, is empty, lacks the split or a column, is of the wrong kind
            for the method, or has no usable row.
    """
    rows = Rows(datasets.Dataset.from_dict({}))
    parts = [
        _one_source(spec, method, np.random.default_rng([seed, number]), system, rows)
        for number, spec in enumerate(specs)
    ]
    rows.dataset = parts[0]
    if len(parts) > 1:  # the k-th of a source's n rows comes at (k + ½) / n of the way
        places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
        rows.dataset = datasets.concatenate_datasets(parts).select(np.argsort(places, kind="stable"))
    return rows


def _one_source(
    spec: DatasetSpec, method: Method, rng: np.random.Generator, system: str | None, rows: Rows
) -> datasets.Dataset:
    """The rows of one source; notes and counts are added to ``rows``."""
    source = open_source(spec)
    label, total = source.label, len(source)
    if total == 0:
        raise UserError(f"{label}: empty; there is no row in it.")
    only = spec.columns if isinstance(spec.columns, list) else None
    mapping = {} if isinstance(spec.columns, list) else spec.columns
    _check_mapping(source, mapping or {name: name for name in only or [] if name in COLUMNS})
    others = [] if is_text(source.table) else [c for c in source.columns if c not in (*COLUMNS, *mapping.values())]
    raw = source.select_columns([*COLUMNS, *mapping.values()]).table
    if not raw.column_names:
        detect(source.columns, method, label)
    numbers = _selected(spec, total, label, rng)
    if len(numbers) < total:
        raw = raw.select(numbers)
    options = {
        "method": method,
        "label": label,
        "system": system,
        "mapping": dict(mapping),
        "only": only,
        "numbers": None if len(numbers) == total else numbers,
    }
    features = datasets.Features({name: datasets.Value("string") for name in _COLUMNS})
    mapped = map_rows(
        raw, _normalise, features, options=options, key=options, with_indices=True, desc=f"reading {label}"
    )
    faults, changes, kinds, unread = (
        np.asarray(mapped.with_format("numpy")[name][:], dtype=object) for name in ("fault", "change", "kind", "unread")
    )
    plain = kinds == PLAIN
    if not plain[faults == ""].all():  # conversations and texts: the texts are left out
        faults[plain] = "no conversation in columns text"
    kept = np.flatnonzero(faults == "")
    dropped: dict[str, list[str]] = {}
    for index in np.flatnonzero(faults != ""):
        dropped.setdefault(str(faults[index]), []).append(f"{label} row {numbers[index] + 1}")
    if len(kept) == 0:
        columns = list(_renamed(dict.fromkeys(source.columns), mapping, only))
        kind = detect(columns, method, label)
        raise UserError(
            f"{label}: none of {len(mapped)} rows can be used (read as {kind}): {summarise(dropped)}.",
            mapping_hint(columns, method),
        )
    for index in kept[changes[kept] != ""]:
        for change in str(changes[index]).split("\n"):
            rows.changed.setdefault(change, []).append(f"{label} row {numbers[index] + 1}")
    for reason, where in dropped.items():
        rows.dropped.setdefault(reason, []).extend(where)
    rows.read += len(mapped)
    note = (
        f"{label}: read as {' and '.join(name for name, _ in Counter(kinds[kept]).most_common())}, {len(mapped):,} rows"
    )
    note += f" of {total:,}" if len(mapped) < total else ""
    note += f", {len(mapped) - len(kept):,} left out" if len(kept) < len(mapped) else ""
    rows.notes.append(note + (f", weight {spec.weight:g}" if spec.weight != 1 else ""))
    if not_read := _not_read(others, set(unread[kept])):
        rows.notes.append(f"{label}: not read: {not_read}")
    mapped = mapped.select_columns(["row", "where"])
    if spec.weight >= 1:
        whole = int(spec.weight)
        share = round(len(kept) * (spec.weight - whole))
        kept = np.concatenate([*[kept] * whole, *([np.sort(rng.permutation(kept)[:share])] if share else [])])
    return mapped if np.array_equal(kept, np.arange(len(mapped))) else mapped.select(kept)


def _selected(spec: DatasetSpec, total: int, label: str, rng: np.random.Generator) -> np.ndarray:
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


def _not_read(columns: list[str], found: set[str]) -> str:
    """The names that were not read: ``columns id, source; message keys name``."""
    names = {"columns": set(columns), "message keys": set()}
    for text in found:
        for what, some in json.loads(text or "{}").items():
            names[what] |= {with_reason(name) if what == "message keys" else name for name in some}
    return "; ".join(f"{what} {shown(', '.join(sorted(some)), 1000)}" for what, some in names.items() if some)


def summarise(reasons: dict[str, list[str]], first: int = 3) -> str:
    """``reason: 12 (file row 3, file row 9, …)`` for each reason, the most frequent first."""
    items = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return "; ".join(
        f"{reason}: {len(where):,} ({', '.join(where[:first])}{', …' if len(where) > first else ''})"
        for reason, where in items
    )


def _normalise(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    method: Method,
    label: str,
    system: str | None,
    mapping: dict[str, str],
    only: list[str] | None,
    numbers: np.ndarray | None,
) -> dict[str, list[str]]:
    """A batch of raw rows as ``_COLUMNS``."""
    result: dict[str, list[str]] = {name: [] for name in _COLUMNS}
    for values, index in zip(decoded(batch, label), indices):
        number = index if numbers is None else int(numbers[index])
        cells = {**dict.fromkeys(_COLUMNS, ""), "where": f"{label} row {number + 1}"}
        try:
            row = normalise(_renamed(values, mapping, only), method)
            turns = row.value["messages" if method == "sft" else "prompt"]
            if system and turns[0]["role"] not in ("system", TEXT):
                turns.insert(0, message("system", system))
            text = json.dumps(row.value, ensure_ascii=False)
            text.encode("utf-8")
            cells["row"], cells["kind"], cells["change"] = text, row.kind, "\n".join(dict.fromkeys(row.changes))
            if row.unread_columns or row.unread_keys:
                cells["unread"] = json.dumps({"columns": row.unread_columns, "message keys": row.unread_keys})
        except RowError as error:
            cells["fault"] = str(error)
        except UnicodeEncodeError:
            cells["fault"] = "text that is not valid Unicode"
        for name, cell in cells.items():
            result[name].append(cell)
    return result


def _renamed(values: dict[str, Any], mapping: dict[str, str], only: list[str] | None) -> dict[str, Any]:
    """A row under this package's column names, without columns that the mapping replaces."""
    values = values if only is None else {column: value for column, value in values.items() if column in only}
    hidden = {*mapping, *mapping.values()}
    if {"completion", "output"} & set(mapping):  # the mapped format, not another one that the row has too
        hidden |= {*TURNS} | ({"output"} if "completion" in mapping else set())
    rest = {column: value for column, value in values.items() if column not in hidden}
    return {**rest, **{ours: values[theirs] for ours, theirs in mapping.items() if theirs in values}}


def _check_mapping(source: Source, mapping: dict[str, str]) -> None:
    for ours, theirs in mapping.items():
        if ours not in COLUMNS:
            raise UserError(
                f"{source.label}: columns: {ours!r} is not a column here.", f"Ours are {', '.join(COLUMNS)}."
            )
        if not source.has(theirs):
            raise UserError(
                f"{source.label}: columns: there is no column {theirs!r}.",
                f"There are {shown(', '.join(source.columns), 500)}.",
            )
    if len(set(mapping.values())) < len(mapping):
        raise UserError(f"{source.label}: columns: one column is named twice: {mapping}.")
