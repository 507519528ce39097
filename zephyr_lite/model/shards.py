"""A base's safetensors files: which ones transformers reads, and whether they are in the folder that they belong to."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.safetensors import SafetensorsFile
from ..io.text import read_object, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
CONVERT = "Only safetensors are read; convert the weights with transformers' save_pretrained first."
FETCH = "Fetch the model again."


def local_folder(name: str) -> Path | None:
    """The folder of that name, with ``~`` expanded; None where there is none.

    Raises:
        UserError: the name is no path.
    """
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except RuntimeError:  # ~ of an unknown user
        return None
    except OSError as error:
        raise UserError(f"{shown(name)}: cannot be looked up: {error.strerror}.", "Check the path.") from None


def pickles(folder: Path, *patterns: str) -> str:
    """Names of the first three pickles in a folder; "" where there are none."""
    found = sorted({path.name for pattern in patterns or PICKLES for path in folder.glob(pattern)})
    return ", ".join(shown(name) for name in found[:3]) + (", …" if len(found) > 3 else "")


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder is a snapshot in the hub's cache, whose files are links into ``blobs``."""
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


def again(path: Path) -> str:
    """Hint for a broken file of a base or an adapter: how to get it again."""
    if not in_hub_cache(path.parent):
        return "Copy the file again from where the model came from."
    both = f"{path} and {path.resolve()}" if path.is_symlink() else f"{path}"
    return f"Delete {both} in the hub's cache; the next start fetches the file again."


def checked_place(path: Path) -> Path:
    """The path, if it is a file in its own folder, or a link from a snapshot of the hub's cache to its blob.

    Raises:
        UserError: the file is missing, or a link that leads out of its folder.
    """
    try:
        found, folder = path.resolve(strict=True), path.parent.resolve()
    except (OSError, RuntimeError):
        raise UserError(f"{path} is missing, or a link to nowhere.", FETCH) from None
    blobs = folder.parent.parent / "blobs" if in_hub_cache(folder) else folder
    if not (found.is_relative_to(folder) or found.is_relative_to(blobs)):
        raise UserError(
            f"{path}: is a link out of its folder, to {shown(found, 200)}.", "Put the file itself into the folder."
        )
    if not found.is_file():
        raise UserError(f"{path}: is not a file.", FETCH)
    return path


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: ``model.safetensors``, or else those of its index; none where both are missing.

    Raises:
        UserError: the index is broken, or a file is not in the folder.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_symlink() or single.exists():
        return [checked_place(single)]
    if not index.is_symlink() and not index.exists():
        return []
    weight_map = read_object(checked_place(index), hint=again(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map.", again(index))
    for tensor, name in weight_map.items():
        where = f"{index}: puts tensor {shown(tensor)} into {shown(name)!r}"
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(
                f"{where}, which is no name of a file in this folder.",
                "Use a copy of the model from a place that you trust.",
            )
        if not name.endswith(".safetensors"):
            raise UserError(f"{where}, which is no safetensors file.", CONVERT)
    return [checked_place(folder / name) for name in sorted(set(weight_map.values()))]


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """File name → file with its header checked, of every file that ``weight_files`` gives.

    Raises:
        UserError: there is none, or a file is broken.
    """
    files = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
    if not files:
        found = pickles(folder) or "no weights"
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} there (found {found}).", CONVERT)
    return files
