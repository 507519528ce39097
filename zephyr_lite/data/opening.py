"""Finding and opening what a data set's ``path`` names, and naming the place where it cannot be read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.json.json import JsonConfig

from ..config import DatasetSpec
from ..errors import UserError
from ..reading import is_file, is_folder, refuse_special
from ..strict_json import shown
from .screening import LINE_BYTES, read_line, screen
from .workers import interruptible

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NAMES = {".jsonl": "JSONL", ".json": "JSON", ".csv": "CSV", ".parquet": "Parquet"}
CURES = {
    "json": "One object {…} a line, or one array of them.",
    "csv": "Every row has as many cells as the header; a cell with commas, quotes or newlines stands in double quotes.",
    "parquet": "The file is damaged or was cut off: make or fetch it again.",
}
# files of so many bytes together are read by several processes, a file each
PARALLEL_BYTES = 100e6
_SPLIT = re.compile(r"\w+(\.\w+)*")
_SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")


def open_source(spec: DatasetSpec) -> tuple[datasets.Dataset, str]:
    """The raw rows, and the name that stands before ``row N`` in messages.

    A file by its suffix; a folder in the hub's layout, its files named by split; otherwise a hub id.

    Raises:
        UserError: nothing of the kind is there, it cannot be read, or it has no such split.
    """
    path = Path(spec.path).expanduser()
    refuse_special(path, spec.path)
    if is_file(path):
        if path.suffix.lower() not in BUILDERS:
            raise UserError(
                f"{spec.path}: {path.suffix or 'a file without suffix'} is not read.",
                f"Give one of {', '.join(BUILDERS)}.",
            )
        if spec.split and _base_split(spec.split) != "train":
            raise UserError(
                f"{spec.path}: there is no split {spec.split!r}; a single file has no splits.",
                "Leave split out, or name a folder with one file for each split.",
            )
        return _read_files([path], spec.split or "train", spec.path), spec.path
    if is_folder(path):
        return _open_folder(path, spec)
    if path.suffix.lower() in BUILDERS or spec.path.startswith((".", "/", "~", "\\")) or spec.path.count("/") > 1:
        raise UserError(f"{spec.path}: there is no such file or folder.", f"The working directory is {Path.cwd()}.")
    return _open_hub(spec)


def _open_folder(folder: Path, spec: DatasetSpec) -> tuple[datasets.Dataset, str]:
    splits: dict[str, list[Path]] = {}
    for place in dict.fromkeys([folder, folder / "data", *([folder / spec.name] if spec.name else [])]):
        for file in sorted(place.glob("*")):
            if file.is_file() and file.suffix.lower() in BUILDERS:
                splits.setdefault(_SHARD.sub("", file.stem), []).append(file)
    # files beside the data, in the hub's layout and in the folders that the data commands make
    for extra in ("dataset_info", "dataset_infos", "state", "report", "journal"):
        splits.pop(extra, None)
    if not splits:
        raise UserError(
            f"{spec.path}: no data in this folder.",
            "Files are named by split: train_sft.jsonl, or data/train_sft-00000-of-00001.parquet "
            f"(one of {', '.join(BUILDERS)}).",
        )
    split = _choose_split(spec, sorted(splits))
    files = splits[split if split in splits else _base_split(split)]
    if len({file.suffix.lower() for file in files}) > 1:
        raise UserError(f"{spec.path}: split {split!r} lies there in several formats: {_names(files)}. Keep one.")
    label = str(Path(spec.path) / files[0].relative_to(folder)) if len(files) == 1 else f"{spec.path}[{split}]"
    return _read_files(files, split, label), label


def _names(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)


def _base_split(split: str) -> str:
    """``train`` of ``train[:10%]``."""
    return split.split("[", 1)[0]


def _choose_split(spec: DatasetSpec, there: list[str]) -> str:
    if spec.split is None:
        if len(there) == 1:
            return there[0]
        likely = next((name for name in there if name.startswith("train")), there[0])
        raise UserError(
            f"{spec.path}: which split? There are {shown(', '.join(there), 1000)}.",
            f"Say so: split: {shown(likely)} (on the command line dataset.split={shown(likely)}).",
        )
    if spec.split not in there and _base_split(spec.split) not in there:
        raise UserError(
            f"{spec.path}: there is no split {spec.split!r}.", f"There are {shown(', '.join(there), 1000)}."
        )
    return spec.split


def _read_files(files: list[Path], split: str, label: str) -> datasets.Dataset:
    builder = BUILDERS[files[0].suffix.lower()]
    counts = [screen(file, builder) for file in files]
    options: dict[str, Any] = {"keep_default_na": False} if builder == "csv" else {}  # "NA" may be an answer
    if builder == "json" and "parse_agent_traces" in JsonConfig.__dataclass_fields__:
        options["parse_agent_traces"] = False  # columns called type and message are no coding agent's log
    # its log would repeat the error that is about to be explained
    verbosity = datasets.logging.get_verbosity()
    name = _base_split(split)
    if not _SPLIT.fullmatch(name):  # a file may have a name that datasets does not take for a split
        name, split = "train", "train" + "".join(_SLICE.findall(split))
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        size = sum(file.stat().st_size for file in files)
        if len(files) > 1 and size > PARALLEL_BYTES:
            options["num_proc"] = min(len(files), os.cpu_count() or 1)
        with quiet(size < 50e6), interruptible():
            loaded = datasets.load_dataset(
                builder,
                _state(files),
                data_files={name: [_escaped(file) for file in files]},
                split=split,
                **options,
            )
    except Exception as error:  # the builders raise whatever their parsers raise
        for file in files:
            if builder == "json":
                find_broken_json(file)
            elif builder == "csv":
                _refuse_other_encodings(file)
        # the second is Parquet's way of saying it
        if any(
            sign in _root(error)
            for sign in ("corresponds to no data", "atch_size must be greater than 0", "BatchSize must be")
        ):
            raise UserError(f"{label}: empty; there is no row in it.") from None
        said = _root(error).removeprefix("ParserError: Error tokenizing data. C error: ").rstrip(".")
        raise UserError(f"{label}: not readable as {NAMES[files[0].suffix.lower()]}: {said}.", CURES[builder]) from None
    finally:
        datasets.logging.set_verbosity(verbosity)
    if builder == "csv" and len(loaded.column_names) == 1:
        for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
            if separator in loaded.column_names[0]:
                raise UserError(
                    f"{label}: {name} stand between the columns: {loaded.column_names[0][:60]!r}.",
                    "Save the file with commas between them.",
                )
    expected = None if None in counts or "[" in split else sum(count or 0 for count in counts)
    if expected is not None and len(loaded) != expected:
        # what Arrow refuses goes to pandas, which takes the lists of a single row for columns
        for file in files:
            find_broken_json(file)
        raise UserError(f"{label}: {expected:,} lines were read as {len(loaded):,} rows.", CURES["json"])
    return loaded


def _state(files: list[Path]) -> str:
    """A name for the files as they are now, under which datasets keeps what it reads of them.

    By itself it goes by the path and the time of modification, which ``cp -p``, ``rsync -t`` and archives set: other rows
    under the old name and time would be taken for those that were there before. The time of the inode's change cannot be set.
    """
    stats = [file.stat() for file in files]
    return hashlib.sha256(repr([(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]).encode()).hexdigest()[:16]


def _escaped(file: Path) -> str:
    """A path that datasets does not take for a pattern."""
    return re.sub(r"([*?\[])", r"[\1]", str(file))


def _refuse_other_encodings(file: Path) -> None:
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(LINE_BYTES), b""), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} line {number}: not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}).",
                    "Save the file as UTF-8.",
                ) from None


def find_broken_json(file: Path) -> None:
    """Raise a UserError with the line at which a JSON or JSONL file cannot be read; return if there is none."""
    with file.open("rb") as opened:
        start = opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        _find_broken_array(file)
        return
    kinds: dict[str, tuple[str, int]] = {}
    with file.open("rb") as opened:
        for number, line in enumerate(iter(lambda: opened.readline(LINE_BYTES), b""), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            place = f"{file} line {number}"
            row = read_line(line.rstrip(b"\r\n"), place)
            try:
                json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f"{place}: text that is not valid Unicode (half a surrogate pair).", "Mend the line, or remove it."
                ) from None
            for key, value in row.items():
                if value is None:
                    continue
                kind = type(value).__name__
                before, first = kinds.setdefault(key, (kind, number))
                if before != kind:
                    raise UserError(
                        f"{place}: column {key!r} is {kind}, but {before} in line {first}.",
                        "A column has one type in all rows: mend the line, or remove it.",
                    )


def _find_broken_array(file: Path) -> None:
    data = file.read_bytes()
    try:
        json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file} line {number}: not UTF-8.", "Save the file as UTF-8.") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply.", "No row of a chat is: mend or remove it.") from None
    except ValueError as error:
        number = getattr(error, "lineno", 1)
        raise UserError(f"{file} line {number}: broken JSON: {error}.", "Mend the line, or remove it.") from None


def _open_hub(spec: DatasetSpec) -> tuple[datasets.Dataset, str]:
    try:
        if spec.split is None:
            there = datasets.get_dataset_split_names(spec.path, spec.name, revision=spec.revision)
            split = _choose_split(spec, list(there))
        else:
            split = spec.split
        loaded = datasets.load_dataset(spec.path, spec.name, split=split, revision=spec.revision)
        return loaded, f"{spec.path}[{split}]"
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
