"""Data sets as TRL and the alignment handbook name them, translated to ``dataset`` and ``eval_dataset``."""

from __future__ import annotations

import math
from typing import Any

from ..io.text import short

# keys of a data set in a mixture: the handbook's and TRL's -> ours
_ENTRY = {"id": "path", "config": "name"}
# columns that TRL passes to the chat template
_RENDERED = ("tools", "chat_template_kwargs")


def translate_datasets(values: dict[str, Any], result: dict[str, Any], faults: list[str], notes: list[str]) -> None:
    """Translate TRL's ``dataset_name`` and ``datasets``, the handbook's ``dataset_mixer`` {path: share} and
    ``dataset_mixture``; then the held-out rows and the text column."""
    given = [k for k in ("dataset", "dataset_name", "datasets", "dataset_mixer", "dataset_mixture") if values.get(k)]
    if len(given) > 1:
        faults.append(f"{', '.join(given)}: the data sets are named more than once. Keep one.")
    for key in ("dataset", "eval_dataset"):
        if key in values:
            result[key] = values.pop(key)
    mixer, splits = take(values, "dataset_mixer", dict, faults), take(values, "dataset_splits", list, faults)
    configs = take(values, "dataset_configs", list, faults)
    name, config = take(values, "dataset_name", str, faults), take(values, "dataset_config", str, faults)
    train, test = (take(values, f"dataset_{part}_split", str, faults) for part in ("train", "test"))
    mixture = dict(take(values, "dataset_mixture", dict, faults) or {})
    mixture.setdefault("datasets", values.pop("datasets", None))
    entries = take(mixture, "datasets", list, faults)
    size = mixture.pop("test_split_size", values.pop("test_split_size", None))
    mixture.pop("seed", None)  # rows are drawn with the run's seed
    faults += [f"there is no key 'dataset_mixture.{key}'." for key in mixture]
    if entries:
        result["dataset"] = [spec for entry in entries for spec in _entry(entry, faults)]
        result.setdefault("eval_dataset", None)
        notes.append("datasets and dataset_mixture are dataset here")
    elif mixer:
        names = [str(split) for split in splits or ["train"]]
        kinds = {kind: next((s for s in names if kind in s), None) for kind in ("train", "test")}
        if splits and (kinds["train"] is None or set(names) - set(kinds.values())):
            faults.append(
                f"dataset_splits: {short(splits)} is not one split of training and one of test. Write dataset."
            )
        common = [{"path": path} for path in mixer]
        if configs and len(configs) == len(mixer):
            common = [{**spec, "name": each} for spec, each in zip(common, configs)]
        elif configs:
            faults.append(f"dataset_configs: {len(configs)} names for {len(mixer)} data sets.")
        shares = zip(common, mixer.values())
        result["dataset"] = [{**spec, "split": kinds["train"], "weight": share} for spec, share in shares]
        result["eval_dataset"] = [{**spec, "split": kinds["test"]} for spec in common] if kinds["test"] else None
        notes.append("dataset_mixer is dataset, with weight, here")
    elif name is not None:
        spec = {"path": name, **({"name": config} if config else {})}
        if test is None and values.get("eval_strategy") in ("steps", "epoch"):
            test = "test"  # TRL's default
        result["dataset"] = [{**spec, "split": train or "train"}]
        result["eval_dataset"] = [{**spec, "split": test}] if test else None
        notes.append("dataset_name is dataset here")
    specs = _specs(result.get("dataset"))
    if size is not None:
        _hold_out(size, specs, result, faults, notes)
    column = take(values, "dataset_text_field", str, faults)
    if column in ("text", "messages", "conversations"):
        notes.append(f"dataset_text_field: a column {column} is found by itself")
    elif column is not None:
        if not specs:
            faults.append("dataset_text_field: names a column of dataset, which is not there. Name both.")
        for key in ("dataset", "eval_dataset"):
            if found := _specs(result.get(key)):
                named = [spec for spec in found if not isinstance(spec.get("columns"), dict)]
                result[key] = [{**spec, "columns": {"text": column}} if spec in named else spec for spec in found]
        notes.append(f"dataset_text_field is dataset.columns here: {{text: {column}}}")


def _specs(value: Any) -> list[dict[str, Any]]:
    """Data sets as keys and values; [] for values that the schema will refuse."""
    entries = [{"path": e} if isinstance(e, str) else e for e in (value if isinstance(value, list) else [value])]
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _entry(entry: Any, faults: list[str]) -> list[dict[str, Any]]:
    """A data set of a mixture in this project's keys, once for each of its files."""
    if not isinstance(entry, dict):
        faults.append(f"datasets: {short(entry)} is not keys and values such as {{path: a/b, split: train}}.")
        return []
    spec = {"split": "train", **{_ENTRY.get(key, str(key)): value for key, value in entry.items() if value is not None}}
    columns = spec.get("columns")
    faults += [f"datasets: columns: {c} is given to no chat template here." for c in _RENDERED if c in (columns or [])]
    if spec.pop("fraction", None) is not None:
        faults.append("datasets: fraction is a share of the mixture. Write weight: the share of its own rows.")
    if spec.pop("data_dir", None) is not None:
        faults.append("datasets: data_dir is not read. Write the folder or file itself as path.")
    files = spec.pop("data_files", [])
    if not files:
        return [spec]
    files = [files] if isinstance(files, str) else files
    if spec.get("path") not in ("json", "csv", "parquet") or not isinstance(files, list):
        faults.append("datasets: data_files are read as path: json, csv or parquet, and a file or a list of files.")
        return []
    return [{**spec, "path": file} for file in files]


def _hold_out(
    size: Any, specs: list[dict[str, Any]], result: dict[str, Any], faults: list[str], notes: list[str]
) -> None:
    """``test_split_size`` rows of the mixture (a share, below 1) become ``eval_dataset``."""
    rows = number(size)
    if rows is None or not 0 < rows < math.inf or (rows >= 1 and rows != int(rows)):
        faults.append(f"test_split_size: {short(size)} is neither a share below 1 nor a number of rows.")
    elif not specs:
        faults.append("test_split_size: holds rows of dataset out, which is not there. Name both.")
    else:
        share = rows if rows < 1 else math.ceil(rows / len(specs))
        result["dataset"] = [{**spec, "test_size": share} for spec in specs]
        # a number of held-out rows does not scale with the data set's weight
        own = [spec if rows < 1 else {**spec, "weight": 1.0} for spec in result["dataset"]]
        result["eval_dataset"] = [{**spec, "part": "test"} for spec in own]
        each = f", {share:,} of each data set" if rows >= 1 and len(specs) > 1 else ""
        notes.append(f"test_split_size {size} is dataset.test_size here{each}; the draw does not depend on seed")


def take(values: dict[str, Any], key: str, kind: type, faults: list[str]) -> Any:
    """Pop a key's value; None if it is missing, or of another type, which is a fault."""
    value = values.pop(key, None)
    if value is None or isinstance(value, kind):
        return value
    what = {dict: "keys and values", list: "a list", str: "a text", bool: "true or false"}[kind]
    faults.append(f"{key}: {short(value)} is not {what}.")
    return None


def number(value: Any) -> float | None:
    """A number, also one that YAML reads as a text (1e-8); None for anything else."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
