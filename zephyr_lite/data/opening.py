"""Open the raw rows of a data set's ``path``: a file, a folder in one of several layouts, or a hub id."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import datasets
import pyarrow.parquet

from ..config.load import DatasetSpec
from ..config.strict_yaml import read_front_matter
from ..errors import UserError
from ..io.text import is_file, is_folder, refuse_special, shown
from . import text_files
from .workers import interruptible, quiet

BUILDERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2")  # of text files
_SAMPLE = 1000  # rows whose keys are a text file's columns
_QUIET_BYTES = 50e6
_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]+)?$")
_NUMBER = re.compile(r"^(?:(.*?)[-_.])?(\d+)$")
_SPLIT_FOLDER = re.compile(r"(train|test|valid|val|dev|eval)", re.IGNORECASE)
# JSON files without rows, in the hub's layout and in this package's folders
_NO_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "report", "journal")


@dataclass(frozen=True)
class Source:
    """The raw rows of one data set.

    Attributes:
        table: ``text_files.FEATURES`` for text files; for others the file's own columns.
        label: the name in front of ``row N`` in messages.
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
        """The source with these columns only, so that the others are not decoded; text rows stay whole."""
        if is_text(self.table):
            return self
        return Source(self.table.select_columns([c for c in self.table.column_names if c in columns]), self.label)


def is_text(table: datasets.Dataset) -> bool:
    return table.column_names == list(text_files.FEATURES)


def decoded(batch: Mapping[str, Sequence[Any]], label: str) -> list[dict[str, Any]]:
    """The rows of a batch of a source's table.

    Raises:
        UserError: a row cannot be read; names its place.
    """
    if list(batch) == list(text_files.FEATURES):
        return [text_files.parse(*row) for row in zip(*(batch[name] for name in text_files.FEATURES))]
    try:
        columns = {name: batch[name] for name in batch}
    except UnicodeDecodeError:  # Arrow does not check text
        raise UserError(f"{label}: text that is not UTF-8.", "Make the file again, in UTF-8.") from None
    return [
        {name: text_files.without_nulls(value) for name, value in zip(columns, row)} for row in zip(*columns.values())
    ]


def kind_of(path: Path) -> str | None:
    """json, csv, tsv or parquet, by a file's suffixes; None for other files."""
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
        UserError: it does not exist, cannot be read, or has no such split.
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


# -- folders -------------------------------------------------------------------------------------------------------------


def _open_folder(folder: Path, spec: DatasetSpec) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = {file.parent.name: [file] for file in sorted(folder.glob("*/state.json"))}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        splits = {"train": [folder / "state.json"]}
    else:
        splits = _splits_of_readme(folder, spec) or _splits_by_name(folder, spec.name)
    if not splits:
        below = [file.parent for file in _data_files([*folder.glob("*/*"), *folder.glob("*/*/*")])]
        raise UserError(
            f"{spec.path}: no data in this folder.",
            f"There is some below it: dataset.path={below[0]}."
            if below
            else "Files are named by split: train_sft.jsonl, or data/train_sft-00000-of-00001.parquet "
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
    """split → files, as the header of a hub repository's README names them; {} if it names no files that exist."""
    readme = folder / "README.md"
    header = read_front_matter(readme.read_text("utf-8", "replace"))[0] if readme.is_file() else {}
    configs = header.get("configs")
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    configs = [c for c in configs if c.get("data_files") or c.get("data_dir")]
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
    found = {
        split: [file for pattern in patterns for file in _data_files(base.glob(str(pattern)))]
        for split, patterns in datasets.data_files.sanitize_patterns(config["data_files"]).items()
    }
    return {split: files for split, files in found.items() if files}


def _splits_by_name(folder: Path, name: str | None) -> dict[str, list[Path]]:
    """split → files named by split (train_sft.jsonl, data/train-00000-of-00002.parquet); numbered files (train_0.jsonl,
    train_1.jsonl) are one split. Without such files, the files in folders named by split (train/part-0.jsonl)."""
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
    """The files with rows, ordered by the numbers in their names: part-2 before part-10."""

    def key(file: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]

    visible = (file for file in files if not file.name.startswith("."))
    return sorted((f for f in visible if kind_of(f) and f.stem not in _NO_DATA and f.is_file()), key=key)


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
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{label}: split {split!r} cannot be read: {error}", "Write it as train[:1000] or train[:10%]."
        ) from None
    first, last = part.from_ or 0, len(table) if part.to is None else min(part.to, len(table))
    return table.select(range(first, last) if first < last else [])


# -- files ---------------------------------------------------------------------------------------------------------------


def _read_files(files: list[Path], label: str) -> datasets.Dataset:
    """The files' rows as one table, cached by datasets under the files' names, sizes and times."""
    kind = "saved" if files[0].name == "state.json" else kind_of(files[0])
    assert kind is not None
    state = hashlib.sha256(repr((kind, [_file_state(file) for file in files])).encode())
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its log would repeat the error
    try:
        with quiet(sum(file.stat().st_size for file in files) < _QUIET_BYTES), interruptible():
            if kind == "saved":
                return datasets.load_from_disk(str(files[0].parent)).with_format(None)
            if kind == "parquet" and _same_schema(files):
                return datasets.load_dataset(
                    kind, state.hexdigest()[:16], data_files={"train": list(map(_escaped, files))}, split="train"
                )
            # datasets would not notice other code under the same name
            state.update(Path(text_files.__file__).read_bytes())
            return datasets.Dataset.from_generator(
                text_files.read_rows,
                text_files.FEATURES,
                gen_kwargs={"files": tuple(map(str, files)), "kind": kind},
                fingerprint=state.hexdigest()[:32],
            )
    except Exception as error:  # datasets raises the errors of every parser
        root = _root(error)
        if isinstance(root, UserError):
            raise root from None
        if isinstance(root, OSError) and root.errno is not None:
            cache = datasets.config.HF_DATASETS_CACHE
            raise UserError(
                f"{root.filename or cache}: {root.strerror}; rows are cached in {cache}.",
                "Make it writable, or name another folder in the environment variable HF_DATASETS_CACHE.",
            ) from None
        reason = " ".join(f"{type(root).__name__}: {root}".split())[:300]
        if any(sign in reason for sign in ("corresponds to no data", "atch_size must be greater than 0", "BatchSize")):
            raise UserError(f"{label}: empty; there is no row in it.") from None
        raise UserError(
            f"{label}: not readable as {kind.capitalize()}: {reason.rstrip('.')}.",
            "The file is damaged or was cut off: make or fetch it again.",
        ) from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _file_state(file: Path) -> tuple[Any, ...]:
    """Values that change with a file; the inode's time too, because ``cp -p``, ``rsync -t`` and archives set the other."""
    stat = file.stat()
    return str(file.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _same_schema(files: list[Path]) -> bool:
    for file in files:
        text_files.refuse_pointer(file)
    schemas = [pyarrow.parquet.read_schema(file) for file in files]
    return all(schema.equals(schemas[0]) for schema in schemas)


def _escaped(file: Path) -> str:
    """A path without datasets' wildcards."""
    return re.sub(r"([*?\[])", r"[\1]", str(file))


# -- the hub -------------------------------------------------------------------------------------------------------------


def _open_hub(spec: DatasetSpec) -> Source:
    try:
        split = spec.split
        if split is None:
            there = datasets.get_dataset_split_names(spec.path, spec.name, revision=spec.revision)
            split = _choose_split(spec, {name: [] for name in there})
        return Source(
            datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision), f"{spec.path}[{split}]"
        )
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, requests
        root = _root(error)
        if isinstance(root, OSError) and (root.filename is not None or root.errno == errno.ENOSPC):  # of the cache
            raise root from None
        raise _hub_error(spec, root) from None


def _hub_error(spec: DatasetSpec, error: BaseException) -> UserError:
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
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
