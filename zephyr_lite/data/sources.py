"""A data set's ``path`` (a file, a folder in one of several layouts, or a hub id) → its raw rows.

Text files become rows of JSON text (``row_files``). No code that comes with a data set is ever run.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from ..config.load import DatasetSpec
from ..config.strict_yaml import read_front_matter
from ..errors import UserError
from ..io.text import is_file, is_folder, looks_local, refuse_special, shown
from . import row_files
from .row_files import COMPRESSED, KINDS, TEXT_ROWS, kind_and_stem, raw_rows, read_rows
from .workers import interruptible

_SAMPLE = 1000  # rows whose keys are a text file's columns
_QUIET_BYTES = 50e6
_SPLIT = re.compile(r"(.*?)(\[[^\[\]]*:[^\[\]]*\])?", re.DOTALL)  # train[:10%] → train, [:10%]
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")
_NUMBERED = re.compile(r"(?:(.*?)[-_.])?\d+")
_SPLIT_FOLDER = re.compile(r"(train|test|valid|val|dev|eval)", re.IGNORECASE)
# JSON files without rows, in the hub's layout and in this package's folders
_NO_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "report", "journal")


@dataclass(frozen=True)
class Source:
    """The raw rows of one data set."""

    table: datasets.Dataset  # with columns ``TEXT_ROWS`` for text files; for others the file's own
    label: str  # in front of ``row N`` in messages

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int | slice | Sequence[int]) -> Any:
        """A row, or a list of rows."""
        return self[[index]][0] if isinstance(index, int) else raw_rows(self.table[index], self.label)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _SAMPLE):
            yield from self[start : start + _SAMPLE]

    @property
    def is_text(self) -> bool:
        return self.table.column_names == list(TEXT_ROWS)

    @cached_property
    def columns(self) -> list[str]:
        """The columns; of text files, those of the first rows."""
        if self.is_text:
            return list(dict.fromkeys(column for row in self[:_SAMPLE] for column in row))
        return list(self.table.column_names)

    def select_columns(self, columns: Sequence[str]) -> Source:
        """The source with these columns only, so that the others are not decoded; text rows stay whole."""
        if self.is_text:
            return self
        return Source(self.table.select_columns([c for c in self.table.column_names if c in columns]), self.label)


def local_path(spec: DatasetSpec) -> Path | None:
    """The file or folder that ``spec.path`` names; None: it is a hub id."""
    path = Path(spec.path).expanduser()
    refuse_special(path, spec.path)
    kind = kind_and_stem(path)[0]
    if is_file(path) and kind is None:
        raise UserError(
            f"{spec.path}: {path.suffix or 'a file without suffix'} is not read.",
            f"Give one of {', '.join(KINDS)}; text may be compressed ({', '.join(COMPRESSED)}).",
        )
    if is_file(path) or is_folder(path):
        return path
    if kind or looks_local(spec.path):
        raise UserError(f"{spec.path}: there is no such file or folder.", f"The working directory is {Path.cwd()}.")
    return None


def open_source(spec: DatasetSpec) -> Source:
    """The raw rows of a file (by its suffix), of a folder (saved by ``save_to_disk``, or with files, folders or a README
    that name the splits), or of a hub id."""
    path = local_path(spec)
    if path is None:
        return _open_hub(spec)
    splits = _splits_of_folder(path, spec) if is_folder(path) else {"train": [path]}
    wanted, part = _split_and_part(spec)
    if wanted is not None and wanted not in splits:
        for file in list(chain.from_iterable(splits.values())):
            if kind_and_stem(file)[1] == wanted:  # a shard named by itself
                splits[wanted] = [file]
    split = _choose_split(spec, wanted, list(splits))
    files = splits[split]
    if len({file.suffix.lower() for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{spec.path}: split {split!r} has files of several formats: {names}. Keep one.")
    label = f"{spec.path}[{split}{part or ''}]"
    if files == [path]:
        label = spec.path
    elif len(files) == 1 and files[0].name != "state.json":
        label = str(Path(spec.path) / files[0].relative_to(path))
    shards = _SHARD.search(kind_and_stem(files[0])[1])
    if shards is not None and len(files) < int(shards[1]):
        label += f" ({len(files)} of {int(shards[1])} shards)"
    table = _read_files(files, label)
    if part is not None:
        try:
            (found,) = datasets.ReadInstruction.from_spec(f"train{part}").to_absolute({"train": len(table)})
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{label}: the split cannot be read: {error}", "Write train[:1000] or train[:10%]."
            ) from None
        first, last = found.from_ or 0, len(table) if found.to is None else min(found.to, len(table))
        table = table.select(range(first, max(first, last)) if first < len(table) else [])
    return Source(table, label)


def _split_and_part(spec: DatasetSpec) -> tuple[str | None, str | None]:
    """``train`` and ``[:10%]`` of ``train[:10%]``."""
    found = _SPLIT.fullmatch(spec.split) if spec.split is not None else None
    return (found[1], found[2]) if found else (None, None)


def _choose_split(spec: DatasetSpec, wanted: str | None, there: Sequence[str]) -> str:
    names = shown(", ".join(sorted(there)), 1000)
    if wanted is None and len(there) > 1:
        likely = shown(next((name for name in sorted(there) if name.startswith("train")), there[0]))
        raise UserError(
            f"{spec.path}: which split? There are {names}.",
            f"Set split: {likely} (on the command line dataset.split={likely}).",
        )
    if wanted is not None and wanted not in there:
        raise UserError(
            f"{spec.path}: there is no split {wanted!r}.",
            f"There are {names}. Held-out rows of the training data: val_size: 0.05; none: eval_strategy: 'no'.",
        )
    return there[0] if wanted is None else wanted


def _open_hub(spec: DatasetSpec) -> Source:
    split = spec.split
    try:
        if split is None:
            there = datasets.get_dataset_split_names(spec.path, spec.name, revision=spec.revision)
            split = _choose_split(spec, None, there)
        table = datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision)
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, requests
        root = _root(error)
        if isinstance(root, OSError) and root.filename is not None:  # of the cache
            raise root from None
        raise UserError(
            f"{spec.path}: there is no such file or folder here, and the hub gave no data set of this name: "
            f"{shown(f'{type(root).__name__}: {root}', 300)}",
            "Check the name, the split and the configuration (name: NAME), and that the hub can be reached; a gated data "
            f"set's terms are accepted at https://huggingface.co/datasets/{spec.path}, then run `hf auth login`.",
        ) from None
    return Source(table, f"{spec.path}[{split}]")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# -- folders -------------------------------------------------------------------------------------------------------------


def _splits_of_folder(folder: Path, spec: DatasetSpec) -> dict[str, list[Path]]:
    """split → files."""
    if (folder / "dataset_dict.json").is_file():
        splits = {file.parent.name: [file] for file in folder.glob("*/state.json")}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        splits = {"train": [folder / "state.json"]}
    else:
        splits = _splits_of_readme(folder, spec) or _splits_by_name([folder, folder / "data"], spec)
    if not splits:
        below = _data_files([*folder.glob("*/*"), *folder.glob("*/*/*")])
        raise UserError(
            f"{spec.path}: no data in this folder.",
            f"There is some below it: dataset.path={below[0].parent}."
            if below
            else "Files are named by split: train_sft.jsonl, or data/train_sft-00000-of-00001.parquet "
            f"(one of {', '.join(KINDS)}).",
        )
    return splits


def _splits_of_readme(folder: Path, spec: DatasetSpec) -> dict[str, list[Path]]:
    """split → files, as the header of a hub repository's README names them; {} if it names no files that exist."""
    readme = folder / "README.md"
    header = read_front_matter(readme.read_text("utf-8", "replace"))[0] if readme.is_file() else {}
    listed = header.get("configs")
    configs = {
        str(config.get("config_name", "default")): config
        for config in (listed if isinstance(listed, list) else [])
        if isinstance(config, dict) and (config.get("data_files") or config.get("data_dir"))
    }
    default = next((name for name, config in configs.items() if config.get("default") or name == "default"), None)
    wanted = spec.name or default or (next(iter(configs)) if len(configs) == 1 else None)
    if wanted is None and configs:
        raise UserError(
            f"{spec.path}: which configuration? There are {shown(', '.join(configs), 1000)}.",
            f"Add dataset.name={shown(next(iter(configs)))}.",
        )
    if wanted not in configs:
        return {}
    config = configs[wanted]
    base = folder / str(config.get("data_dir", ""))
    if not config.get("data_files"):
        return _splits_by_name([base], spec)
    try:
        found = {
            split: [file for pattern in patterns for file in _data_files(base.glob(str(pattern)))]
            for split, patterns in datasets.data_files.sanitize_patterns(config["data_files"]).items()
        }
    except (NotImplementedError, ValueError) as error:  # pathlib's, of an absolute or an empty pattern
        raise UserError(f"{readme}: data_files: {error}.", "Name files below the folder, as in data/*.jsonl.") from None
    return {split: files for split, files in found.items() if files}


def _splits_by_name(places: list[Path], spec: DatasetSpec) -> dict[str, list[Path]]:
    """split → files named by split (train_sft.jsonl, data/train-00000-of-00002.parquet); numbered files (train_0.jsonl,
    train_1.jsonl) are one split, unless ``spec.split`` names one of them. Without such files, the files in folders named by
    split (train/part-0.jsonl)."""
    splits: dict[str, list[Path]] = {}
    places = [*places, *([places[0] / spec.name] if spec.name else [])]
    for place in places:
        named: dict[str, list[Path]] = {}
        for file in _data_files(place.glob("*")):
            named.setdefault(_SHARD.sub("", kind_and_stem(file)[1]), []).append(file)
        bases = {stem: found[1] or "train" for stem in named if (found := _NUMBERED.fullmatch(stem))}
        several = {base for base, count in Counter(bases.values()).items() if count > 1}
        for stem, files in named.items():
            base = bases.get(stem)
            joined = base in several and stem != _split_and_part(spec)[0]
            splits.setdefault(base if base is not None and joined else stem, []).extend(files)
    if not splits:
        folders = [p for place in places for p in place.glob("*") if p.is_dir() and _SPLIT_FOLDER.match(p.name)]
        splits = {path.name: files for path in folders if (files := _data_files(path.rglob("*")))}
    return splits


def _data_files(files: Iterable[Path]) -> list[Path]:
    """The files with rows, ordered by the numbers in their names: part-2 before part-10."""

    def key(file: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]

    found = [
        file
        for file in files
        if not file.name.startswith(".") and file.stem not in _NO_DATA and kind_and_stem(file)[0] and file.is_file()
    ]
    return sorted(found, key=key)


# -- files ---------------------------------------------------------------------------------------------------------------


def _read_files(files: list[Path], label: str) -> datasets.Dataset:
    """The files' rows as one table, cached by datasets under the files' names, sizes and times."""
    if files[0].name == "state.json":
        return datasets.load_from_disk(str(files[0].parent)).with_format(None)
    kind = kind_and_stem(files[0])[0]
    states, size = [], 0
    for file in files:
        stat = file.stat()
        size += stat.st_size
        # the inode's time too, because cp -p, rsync -t and archives set the other
        states.append((str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    # the code too: datasets would not notice other code under the same name
    fingerprint = hashlib.sha256(repr((kind, states)).encode() + Path(row_files.__file__).read_bytes()).hexdigest()[:32]
    try:
        with interruptible(quiet=size < _QUIET_BYTES):
            if kind == "parquet" and len({str(pq.read_schema(file)) for file in files}) == 1:
                escaped = [re.sub(r"([*?\[])", r"[\1]", str(file)) for file in files]  # datasets' wildcards
                return datasets.load_dataset(kind, fingerprint, data_files={"train": escaped}, split="train")
            return datasets.Dataset.from_generator(
                read_rows,
                TEXT_ROWS,
                gen_kwargs={"files": tuple(map(str, files)), "kind": kind},
                fingerprint=fingerprint,
            )
    except Exception as error:  # datasets raises the errors of every parser
        root = _root(error)
        if isinstance(root, UserError) or (isinstance(root, OSError) and root.errno is not None):  # the cache's
            raise root from None
        if "corresponds to no data" in str(root):
            return datasets.Dataset.from_dict({})
        raise UserError(
            f"{label}: cannot be read: {shown(f'{type(root).__name__}: {root}'.rstrip('.'), 300)}.",
            "The file is damaged, was cut off or is a Git LFS pointer: make it or fetch it again.",
        ) from None
