"""Finding and opening what a data set's ``path`` names: a file, a folder in one of several layouts, or a hub id."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import datasets
import pyarrow.parquet
import yaml

from ..config.load import DatasetSpec
from ..errors import UserError
from ..io.reading import is_file, is_folder, refuse_special
from ..io.strict_json import shown
from .text_files import SCHEMA, file_state, parse, read_table, refuse_pointer, without_nulls
from .workers import interruptible

BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst", ".bz2")  # of text files
_SAMPLE = 1000  # rows whose keys are a JSONL's columns, for messages
_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")
_NUMBER = re.compile(r"^(?:(.*?)[-_.])?(\d+)$")
_SPLIT_FOLDER = re.compile(r"(train|test|valid|val|dev|eval)", re.IGNORECASE)
# beside the data, in the hub's layout and in the folders that the data commands make
_NO_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "report", "journal")


@dataclass(frozen=True)
class Source:
    """The raw rows of one data set.

    Attributes:
        table: of text files: ``text_files.SCHEMA``; else the file's own columns.
        label: the name that stands before ``row N`` in messages.
    """

    table: datasets.Dataset
    label: str

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice | Sequence[int]) -> Any:
        if isinstance(index, int):
            return self[[index]][0]
        return decoded(self.table[index], self.label)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _SAMPLE):
            yield from self[start : start + _SAMPLE]

    @cached_property
    def columns(self) -> list[str]:
        """The columns; of text files, those of the first rows."""
        if is_text(self.table):
            return list(dict.fromkeys(column for row in self[:_SAMPLE] for column in row))
        return list(self.table.column_names)

    def has(self, column: str) -> bool:
        return column in self.columns or (is_text(self.table) and any(column in row for row in self))

    def select_columns(self, columns: Sequence[str]) -> Source:
        """Without the others of an Arrow table, which need not be decoded; a text's rows stay whole."""
        if is_text(self.table):
            return self
        return Source(self.table.select_columns([c for c in self.table.column_names if c in columns]), self.label)


def is_text(table: datasets.Dataset) -> bool:
    return table.column_names == SCHEMA.names


def decoded(batch: Mapping[str, Sequence[Any]], label: str) -> list[dict[str, Any]]:
    """Rows of a batch of a source's table.

    Raises:
        UserError: a row cannot be read; names its place.
    """
    if list(batch) == SCHEMA.names:
        return [parse(*row) for row in zip(*(batch[name] for name in SCHEMA.names))]
    try:
        columns = {name: batch[name] for name in batch}
    except UnicodeDecodeError:  # Arrow takes any bytes for text
        raise UserError(f"{label}: text that is not UTF-8.", "Make the file again, in UTF-8.") from None
    return [{name: without_nulls(value) for name, value in zip(columns, row)} for row in zip(*columns.values())]


def kind_of(path: Path) -> str | None:
    """json, csv, tsv or parquet, by a file's suffixes; None for what is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        kind = BUILDERS.get(suffixes[0]) if len(suffixes) == 2 else None
        return kind if kind in ("json", "csv", "tsv") else None
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def stem_of(path: Path) -> str:
    """A file's name without its suffixes."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def open_source(spec: DatasetSpec) -> Source:
    """The raw rows of a file (by its suffix), of a folder (saved by ``save_to_disk``, or with files, folders or a README
    that name the splits), or of a hub id.

    Raises:
        UserError: nothing of the kind is there, it cannot be read, or it has no such split.
    """
    path = Path(spec.path).expanduser()
    refuse_special(path, spec.path)
    if is_file(path):
        if kind_of(path) is None:
            raise UserError(
                f"{spec.path}: {path.suffix or 'a file without suffix'} is not read.",
                f"Give one of {', '.join(BUILDERS)}; text may be compressed ({', '.join(COMPRESSED)}).",
            )
        if spec.split and _base_split(spec.split) != "train":
            raise UserError(
                f"{spec.path}: there is no split {spec.split!r}; a single file has no splits.",
                "Leave split out, or name a folder with one file for each split.",
            )
        return Source(_sliced(_read_files([path], spec.path), spec.split, spec.path), spec.path)
    if is_folder(path):
        return _open_folder(path, spec)
    if kind_of(path) or spec.path.startswith((".", "/", "~", "\\")) or spec.path.count("/") > 1:
        raise UserError(f"{spec.path}: there is no such file or folder.", f"The working directory is {Path.cwd()}.")
    return _open_hub(spec)


def _open_folder(folder: Path, spec: DatasetSpec) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = {file.parent.name: [file] for file in sorted(folder.glob("*/state.json"))}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        splits = {"train": [folder / "state.json"]}
    else:
        splits = _splits_of_readme(folder, spec) or _splits_by_name(folder, spec.name)
    if not splits:
        below = [file.parent for file in _data_files([*folder.glob("*/*"), *folder.glob("*/*/*")])]
        there = f"There is some below it: dataset.path={below[0]}." if below else ""
        raise UserError(
            f"{spec.path}: no data in this folder.",
            there
            or "Files are named by split: train_sft.jsonl, or data/train_sft-00000-of-00001.parquet "
            f"(one of {', '.join(BUILDERS)}).",
        )
    split = _choose_split(spec, splits)
    files = splits.get(split) or splits[_base_split(split)]
    if len({file.suffix.lower() for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{spec.path}: split {split!r} has files of several formats: {names}. Keep one.")
    one = len(files) == 1 and files[0].name != "state.json"
    label = str(Path(spec.path) / files[0].relative_to(folder)) if one else f"{spec.path}[{split}]"
    shards = {int(found[1]) for file in files if (found := _SHARD.search(stem_of(file)))}
    if len(shards) == 1 and len(files) < max(shards):
        label += f" ({len(files)} of {max(shards)} shards)"
    return Source(_sliced(_read_files(files, label), None if split in splits else split, label), label)


def _splits_of_readme(folder: Path, spec: DatasetSpec) -> dict[str, list[Path]]:
    """The files that the header of a hub repository's README names: split → files; none where it names none here."""
    try:
        header = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        values = yaml.safe_load(header[1]) if len(header) == 3 and not header[0].strip() else None
        configs = [c for c in (values or {}).get("configs", []) if c.get("data_files") or c.get("data_dir")]
        names = [str(config.get("config_name", "default")) for config in configs]
        wanted = spec.name or next((n for n, c in zip(names, configs) if c.get("default") or n == "default"), None)
        if wanted is None and len(names) > 1:
            raise UserError(
                f"{spec.path}: which configuration? There are {shown(', '.join(names), 1000)}.",
                f"Add dataset.name={shown(names[0])}.",
            )
        config = next((c for n, c in zip(names, configs) if wanted in (None, n)), None)
        if config is None:
            return {}
        base = folder / str(config.get("data_dir", ""))
        if not config.get("data_files"):
            return _splits_by_name(base, None)
        patterns = datasets.data_files.sanitize_patterns(config["data_files"])
        found = {
            split: [file for pattern in some for file in _data_files(base.glob(str(pattern)))]
            for split, some in patterns.items()
        }
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, AttributeError, TypeError, NotImplementedError):
        return {}  # no README, or none that describes data
    return {split: files for split, files in found.items() if files}


def _splits_by_name(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """Files named by split (train_sft.jsonl, data/train-00000-of-00002.parquet), of which numbered ones (train_0.jsonl,
    train_1.jsonl) are one split; or else folders named by split (train/part-0.jsonl)."""
    splits: dict[str, list[Path]] = {}
    places = list(dict.fromkeys([folder, folder / "data", *([folder / name] if name else [])]))
    for place in places:
        named: dict[str, list[Path]] = {}
        for file in _data_files(place.glob("*")):
            named.setdefault(_SHARD.sub("", stem_of(file)), []).append(file)
        bases = {stem: match[1] or "train" for stem in named if (match := _NUMBER.match(stem))}
        for stem, files in named.items():
            siblings = [other for other, base in bases.items() if base == bases.get(stem)]
            splits.setdefault(bases[stem] if len(siblings) > 1 else stem, []).extend(files)
    if not splits:
        folders = [
            path for place in places for path in place.glob("*") if path.is_dir() and _SPLIT_FOLDER.match(path.name)
        ]
        splits = {path.name: files for path in folders if (files := _data_files(path.rglob("*")))}
    return splits


def _data_files(files: Iterable[Path]) -> list[Path]:
    """Those of them that hold rows, in the order of the numbers in their names: part-2 before part-10."""

    def key(file: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]

    shown_files = (file for file in files if not file.name.startswith("."))
    return sorted((f for f in shown_files if kind_of(f) and f.stem not in _NO_DATA and f.is_file()), key=key)


def _base_split(split: str) -> str:
    """``train`` of ``train[:10%]``."""
    return split.split("[", 1)[0]


def _choose_split(spec: DatasetSpec, splits: dict[str, list[Path]]) -> str:
    there = sorted(splits)
    if spec.split is None:
        if len(there) == 1:
            return there[0]
        likely = next((name for name in there if name.startswith("train")), there[0])
        raise UserError(
            f"{spec.path}: which split? There are {shown(', '.join(there), 1000)}.",
            f"Say so: split: {shown(likely)} (on the command line dataset.split={shown(likely)}).",
        )
    for split in (spec.split, _base_split(spec.split)):
        if split in splits:
            return spec.split
        # one of several numbered files
        if one := [file for files in splits.values() for file in files if stem_of(file) == split]:
            splits[split] = one
            return spec.split
    raise UserError(f"{spec.path}: there is no split {spec.split!r}.", f"There are {shown(', '.join(there), 1000)}.")


def _sliced(table: datasets.Dataset, split: str | None, label: str) -> datasets.Dataset:
    """The part that ``train[:10%]`` names."""
    found = _SLICE.search(split or "")
    if found is None:
        return table
    try:
        (part,) = datasets.ReadInstruction.from_spec(f"train{found[0]}").to_absolute({"train": len(table)})
        first, last = part.from_ or 0, len(table) if part.to is None else part.to
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{label}: split {split!r} cannot be read: {error}", "Write it as train[:1000] or train[:10%]."
        ) from None
    last = min(last, len(table))
    return table.select(range(first, last) if first < last else [])


def _read_files(files: list[Path], label: str) -> datasets.Dataset:
    if files[0].name == "state.json":  # of save_to_disk
        try:
            return datasets.load_from_disk(str(files[0].parent)).with_format(None)
        except Exception as error:  # of whatever kind Arrow raises
            raise UserError(f"{label}: not readable: {_root(error)}.", "Save it again, or copy it again.") from None
    kind = kind_of(files[0])
    assert kind is not None
    if kind in ("json", "csv", "tsv"):
        return read_table(files, kind)
    # its log would repeat the error that is about to be explained
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        for file in files:
            refuse_pointer(file)
        schemas = [pyarrow.parquet.read_schema(file) for file in files]
        if any(not schema.equals(schemas[0]) for schema in schemas):  # datasets wants the same columns in all files
            return read_table(files, kind)
        size = sum(file.stat().st_size for file in files)
        with quiet(size < 50e6), interruptible():
            return datasets.load_dataset(
                kind, _state(files), data_files={"train": [_escaped(file) for file in files]}, split="train"
            )
    except UserError:
        raise
    except Exception as error:  # the builders raise whatever their parsers raise
        signs = ("corresponds to no data", "atch_size must be greater than 0", "BatchSize must be")
        if any(sign in _root(error) for sign in signs):
            raise UserError(f"{label}: empty; there is no row in it.") from None
        raise UserError(
            f"{label}: not readable as {kind.capitalize()}: {_root(error).rstrip('.')}.",
            "The file is damaged or was cut off: make or fetch it again.",
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _state(files: list[Path]) -> str:
    """A name for the files as they are now, under which datasets keeps what it reads of them.

    By itself it goes by the path and the time of modification, which ``cp -p``, ``rsync -t`` and archives set: other rows
    under the old name and time would be taken for those that were there before.
    """
    return hashlib.sha256(repr([file_state(file) for file in files]).encode()).hexdigest()[:16]


def _escaped(file: Path) -> str:
    """A path that datasets does not take for a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", str(file))


def _open_hub(spec: DatasetSpec) -> Source:
    try:
        if spec.split is None:
            there = datasets.get_dataset_split_names(spec.path, spec.name, revision=spec.revision)
            split = _choose_split(spec, {name: [] for name in there})
        else:
            split = spec.split
        loaded = datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision)
        return Source(loaded, f"{spec.path}[{split}]")
    except UserError:
        raise
    except Exception as error:
        raise _hub_error(spec, error) from None


def _hub_error(spec: DatasetSpec, error: Exception) -> UserError:
    text = _root(error)
    if "split" in text.lower() and spec.split is not None:
        names = re.findall(r"'([^']+)'", text.split("one of", 1)[-1]) or [text]
        return UserError(f"{spec.path}: there is no split {spec.split!r}.", f"There are {', '.join(names)}.")
    if "config name" in text.lower() or "BuilderConfig" in text:
        return UserError(f"{spec.path}: name {spec.name!r} does not fit: {text}", "Say which one: name: NAME.")
    if "gated" in text.lower() or "401" in text or "403" in text:
        return UserError(
            f"{spec.path}: the hub refuses access: {text}",
            f"Accept its terms at https://huggingface.co/datasets/{spec.path}, then run `hf auth login`.",
        )
    return UserError(
        f"{spec.path}: there is no such file or folder here, and the hub gave no data set of this name: {text}",
        "Check the name, and that the hub can be reached (HF_HUB_OFFLINE, HF_ENDPOINT); a local path may begin with ./",
    )


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def quiet(quiet: bool) -> Iterator[None]:
    """No progress bars for what takes a moment; as before afterwards."""
    if not quiet or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
