"""Rows from the hub, a folder or a file, in whatever format, as one ``datasets.Dataset`` of messages.

``datasets`` reads, caches and maps; this module finds the files, names the place of what cannot be read, and mixes.
No code that comes with a data set is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.strict_json import shown
from .formats import COLUMNS, PLAIN, TEXT, Method, detect, mapping_hint, normalise
from .messages import RowError, message, with_reason
from .opening import Source, decoded, is_text, open_source, quiet
from .workers import interruptible

PARALLEL_ROWS = 2000  # below this, starting processes costs more than it saves
# not of a file that is only read, though the system names none
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_COLUMNS = ("row", "where", "fault", "change", "kind", "unread")


@dataclass
class Rows:
    """Normalised rows of one mixture.

    Attributes:
        dataset: columns ``row``, the JSON of ``formats.Row.value`` (its arguments of tools have no common schema), and
            ``where`` ("train.jsonl row 17", counted from 1).
        notes: for each source a line with what it was read as and how many rows, and one with what was not read.
        dropped: reason → the places of the rows that were left out.
        changed: what was changed in a row that stayed → the places.
        read: how many rows were looked at.
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

    ``limit`` takes rows by a seeded draw; ``weight`` below 1 a seeded share of them, above 1 repeats them. Several
    sources are spread evenly through each other: the same arguments give the same order.

    Args:
        specs: the sources, at least one.
        method: ``sft`` gives conversations, ``dpo`` preference pairs.
        seed: of the draws.
        system: a system turn for the rows that have none.

    Raises:
        UserError: a source does not exist, cannot be read, is empty, has no such split or column, is of the wrong
            kind for the method, or no row of it can be used.
    """
    rows = Rows(datasets.Dataset.from_dict({}))
    parts = []
    for number, spec in enumerate(specs):
        parts.append(_one_source(spec, method, np.random.default_rng([seed, number]), system, rows))
    if len(parts) == 1:
        rows.dataset = parts[0]
        return rows
    # the k-th row of a source of n rows stands at (k + ½) / n of the way
    places = np.concatenate([(np.arange(len(part)) + 0.5) / len(part) for part in parts])
    order = np.argsort(places, kind="stable")
    rows.dataset = datasets.concatenate_datasets(parts).select(order)
    return rows


def _one_source(
    spec: DatasetSpec, method: Method, rng: np.random.Generator, system: str | None, rows: Rows
) -> datasets.Dataset:
    with own_faults_only(spec):
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
        numbers = _part(spec, total, label)
        if spec.limit is not None and spec.limit < len(numbers):
            numbers = np.sort(rng.permutation(numbers)[: spec.limit])
        if spec.weight < 1:
            numbers = np.sort(rng.permutation(numbers)[: max(1, round(len(numbers) * spec.weight))])
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
        with quiet(len(raw) <= PARALLEL_ROWS), interruptible():
            mapped = raw.map(
                _normalise,
                with_indices=True,
                batched=True,
                remove_columns=raw.column_names,
                fn_kwargs=options,
                new_fingerprint=cache_key(raw, options),
                features=datasets.Features({name: datasets.Value("string") for name in _COLUMNS}),
                num_proc=processes(len(raw)),
                desc=f"reading {label}",
            )
    faults, changes, kinds, unread = (
        np.asarray(mapped.with_format("numpy")[name][:], dtype=object) for name in ("fault", "change", "kind", "unread")
    )
    plain = kinds == PLAIN
    if not plain[faults == ""].all():  # a text among conversations is none of them
        faults[plain] = "no conversation in columns text"
    kept = np.flatnonzero(faults == "")
    dropped_here: dict[str, list[str]] = {}
    for index in np.flatnonzero(faults != ""):
        dropped_here.setdefault(str(faults[index]), []).append(_place(label, numbers, int(index)))
    if len(kept) == 0:
        columns = _renamed(dict.fromkeys(source.columns), mapping, only)
        kind = detect(list(columns), method, label)
        raise UserError(
            f"{label}: none of {len(mapped)} rows can be used (read as {kind}): {summarise(dropped_here)}.",
            mapping_hint(list(columns), method),
        )
    for index in kept[changes[kept] != ""]:
        for change in str(changes[index]).split("\n"):
            rows.changed.setdefault(change, []).append(_place(label, numbers, int(index)))
    for reason, where in dropped_here.items():
        rows.dropped.setdefault(reason, []).extend(where)
    rows.read += len(mapped)
    whole = int(spec.weight) if spec.weight >= 1 else 1
    share = spec.weight - whole if spec.weight >= 1 else 0.0
    chosen = [kept] * whole
    if round(len(kept) * share):
        chosen.append(np.sort(rng.permutation(kept)[: round(len(kept) * share)]))
    kind = " and ".join(name for name, _ in Counter(kinds[kept]).most_common())
    rows.notes.append(_note(label, kind, len(mapped), total, len(kept), spec.weight))
    if not_read := _not_read(others, set(unread[kept])):
        rows.notes.append(f"{label}: not read: {not_read}")
    mapped = mapped.select_columns(["row", "where"])
    indices = np.concatenate(chosen)
    return mapped if len(indices) == len(mapped) == len(kept) else mapped.select(indices)


def _not_read(columns: list[str], found: set[str]) -> str:
    """What a source holds beside what was read: ``columns id, source; message keys name``."""
    names = {"columns": set(columns), "message keys": set()}
    for text in found:
        for what, some in json.loads(text or "{}").items():
            names[what] |= {with_reason(name) if what == "message keys" else name for name in some}
    return "; ".join(f"{what} {shown(', '.join(sorted(some)), 1000)}" for what, some in names.items() if some)


def _part(spec: DatasetSpec, total: int, label: str) -> np.ndarray:
    """The rows of the data set that this part of it has, ascending.

    The draw depends on the number of rows alone: with the run's seed in it, another seed would train on rows that were
    held out.
    """
    if spec.test_size is None:
        return np.arange(total)
    held_out = round(total * spec.test_size) if spec.test_size < 1 else int(spec.test_size)
    if not 0 < held_out < total:
        raise UserError(
            f"{label}: test_size {spec.test_size:g} holds out {held_out:,} of {total:,} rows.",
            "Choose one that leaves rows to train on, and rows to hold out.",
        )
    drawn = np.random.default_rng(total).permutation(total)
    return np.sort(drawn[:held_out] if spec.part == "test" else drawn[held_out:])


@contextmanager
def own_faults_only(spec: DatasetSpec) -> Iterator[None]:
    """What fails in the cache that datasets keeps is not the fault of the file with the rows, and the path is named.

    Raises:
        UserError: a file other than the source's cannot be made, read or written, or the disk is full.
    """
    try:
        yield
    except (OSError, UserError) as error:
        fault = _system_fault(error)
        path = Path(str(fault.filename)) if fault is not None and fault.filename else None
        if fault is None or (path is None and fault.errno not in _DISK) or (path and _is_of(path, spec)):
            raise
        cache = datasets.config.HF_DATASETS_CACHE
        raise UserError(
            f"{path or cache}: {fault.strerror or fault}; rows that were read are kept in {cache}.",
            "Make it writable, or name another folder in the environment variable HF_DATASETS_CACHE.",
        ) from None


def _system_fault(error: BaseException | None) -> OSError | None:
    """The system's error at the root of what became of it."""
    found = None
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            found = error
        error = error.__cause__ or error.__context__
    return found


def _is_of(path: Path, spec: DatasetSpec) -> bool:
    source = Path(spec.path).expanduser().absolute()
    return source in (path.absolute(), *path.absolute().parents)


def _note(label: str, kind: str, looked: int, total: int, kept: int, weight: float) -> str:
    text = f"{label}: read as {kind}, {looked:,} rows"
    if looked < total:
        text += f" of {total:,}"
    if kept < looked:
        text += f", {looked - kept:,} left out"
    return text + (f", weight {weight:g}" if weight != 1 else "")


def summarise(reasons: dict[str, list[str]], first: int = 3) -> str:
    """``reason: 12 (file row 3, file row 9, …)`` for each reason, the most frequent first."""
    items = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return "; ".join(
        f"{reason}: {len(where):,} ({', '.join(where[:first])}{', …' if len(where) > first else ''})"
        for reason, where in items
    )


def processes(rows: int) -> int | None:
    """How many processes prepare so many rows; None for this one alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 16) if rows > PARALLEL_ROWS and cores > 1 else None


def cache_key(source: datasets.Dataset, options: dict[str, Any]) -> str:
    """The fingerprint of what this package makes of a data set.

    datasets' own hash of a mapped function takes the function's name for its code, and a tokenizer changes its hash
    when it is used: an update would read what an older version had made, and a second start would read nothing.
    """
    values = sorted((key, v.tobytes() if isinstance(v, np.ndarray) else v) for key, v in options.items())
    digest = hashlib.sha256(repr((source._fingerprint, values)).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _place(label: str, numbers: np.ndarray, index: int) -> str:
    return f"{label} row {int(numbers[index]) + 1}"


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
    result: dict[str, list[str]] = {name: [] for name in _COLUMNS}
    for values, index in zip(decoded(batch, label), indices):
        number = index if numbers is None else int(numbers[index])
        cells = {**dict.fromkeys(_COLUMNS, ""), "where": f"{label} row {number + 1}"}
        try:
            row = normalise(_renamed(values, mapping, only), method)
            turns = row.value["messages" if method == "sft" else "prompt"]
            if system and turns[0]["role"] not in ("system", TEXT):
                turns.insert(0, message("system", system))
            cells["row"] = json.dumps(row.value, ensure_ascii=False)
            cells["row"].encode("utf-8")
            if row.unread_columns or row.unread_keys:
                cells["unread"] = json.dumps({"columns": row.unread_columns, "message keys": row.unread_keys})
            cells["kind"], cells["change"] = row.kind, "\n".join(dict.fromkeys(row.changes))
        except RowError as error:
            cells["fault"] = str(error)
        except UnicodeEncodeError:
            cells["row"], cells["fault"] = "", "text that is not valid Unicode"
        for name, cell in cells.items():
            result[name].append(cell)
    return result


def _renamed(values: dict[str, Any], mapping: dict[str, str], only: list[str] | None) -> dict[str, Any]:
    """A row under our columns' names; a column of such a name that another takes the place of is left out."""
    values = values if only is None else {column: value for column, value in values.items() if column in only}
    hidden = {*mapping, *mapping.values()}
    if {"completion", "output"} & set(mapping):  # the format that was asked for, not another that the row has too
        hidden |= {"messages", "conversations", "conversation"} | ({"output"} if "completion" in mapping else set())
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
