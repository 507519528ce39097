"""The files of bases and adapters: found or downloaded without pickles, and refused where they lead out of their folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError
from ..io.safetensors import SafetensorsFile
from ..io.text import looks_local, read_object, shown
from .families import FAMILIES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# the files of a base
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model*", "*.txt"]
# a second copy of the weights, in Mistral's own format
IGNORED = ["consolidated*"]
CONVERT = "Only safetensors are read; convert the weights with transformers' save_pretrained first."
# names of a language model's tensors in a multimodal checkpoint → in the text model's own
TEXT_NAMES = {
    r"^(?:model\.)?(?:language|text)_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language|text)_model\.(?:model\.)?": "model.",
}
# keys of config.json that make transformers run a kernel of the hub, where they name a repository
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def local_folder(name: str) -> Path | None:
    """The folder of that name, with ``~`` expanded; None where there is none."""
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (RuntimeError, OSError):  # ~ of an unknown user, a name that is too long
        return None


def named_folder(kind: str, name: str) -> Path | None:
    """The folder of that name; None: it is a hub id.

    Args:
        kind: model or adapter, for the message.
    """
    if (folder := local_folder(name)) is not None:
        return folder
    with suppress(HFValidationError):
        validate_repo_id(name)
        if name.count("/") == 1 and not looks_local(name):
            return None
    raise UserError(
        f"{kind} {shown(name)}: there is no such folder.",
        "Give a folder, or a hub id (OWNER/NAME). If a base was moved: model_name_or_path=FOLDER in training, --base FOLDER "
        "elsewhere.",
    )


def fetch_base(name_or_path: str, revision: str = "main", *, weights: bool = True) -> Path:
    """The folder of a base: a local one as it is, or a snapshot downloaded from the hub.

    Args:
        weights: False for the tokenizer and ``config.json`` alone.
    """
    if (folder := named_folder("model", name_or_path)) is not None:
        return folder
    patterns = [pattern for pattern in PATTERNS if weights or "safetensors" not in pattern]
    folder = download("model", name_or_path, revision, patterns)
    if weights and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model {name_or_path}: has no safetensors file on the hub; pickles (*.bin, *.pt) are never fetched.",
            "Give a model that has safetensors, or convert this one with save_pretrained and name the folder.",
        )
    return folder


def download(kind: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A snapshot of the files of a hub repository that match the patterns.

    Args:
        kind: model or adapter, for messages.
    """
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=IGNORED))
    except GatedRepoError:
        raise UserError(
            f"{kind} {name}: its owner asks you to accept terms first.",
            f"Open https://huggingface.co/{name}, accept, then run `hf auth login`.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else shown(what, 300)
        raise UserError(
            f"{kind} {name}: there is no such folder, it is not in the hub's cache, and could not be downloaded ({why}).",
            "Check the name and the connection; for a private repository run `hf auth login`; or give a folder.",
        ) from None


def pickles(folder: Path) -> str:
    """Names of the first three pickles in a folder; "no weights" where there are none."""
    found = sorted({path.name for pattern in PICKLES for path in folder.glob(pattern)})
    return ", ".join(shown(name) for name in found[:3]) or "no weights"


def in_hub_cache(folder: Path) -> bool:
    """Whether a folder is a snapshot in the hub's cache: its files are links into ``blobs``."""
    return folder.parent.name == "snapshots" and (folder.parent.parent / "blobs").is_dir()


def again(path: Path) -> str:
    """Hint for a broken file of a base or an adapter: how to get it again."""
    if in_hub_cache(path.parent):
        return f"Delete {path} and {path.resolve()} in the hub's cache; the next start fetches the file again."
    return "Copy the file again from where the model came from."


def checked_place(path: Path) -> Path:
    """The path, if it is a file in its own folder, or a link from a snapshot of the hub's cache to its blob."""
    found, folder = path.resolve(), path.parent.resolve()
    blobs = folder.parent.parent / "blobs" if in_hub_cache(folder) else folder
    if not (found.is_relative_to(folder) or found.is_relative_to(blobs)):
        raise UserError(
            f"{path}: is a link out of its folder, to {shown(found, 200)}.", "Put the file itself into the folder."
        )
    if not found.is_file():
        raise UserError(f"{path}: is not a file.", "Fetch the model again.")
    return path


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: ``model.safetensors``, or else those of its index."""
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single):
        return [checked_place(single)]
    if not os.path.lexists(index):
        raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} there (found {pickles(folder)}).", CONVERT)
    weight_map = read_object(checked_place(index), hint=again(index)).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    wrong = [n for n in names if not isinstance(n, str) or Path(n).name != n or not n.endswith(".safetensors")]
    if wrong or not names:
        found = f"names {shown(wrong[0])!r}" if wrong else "has no weight_map"
        raise UserError(
            f"{index}: {found}; weight_map maps each tensor to a safetensors file of this folder.",
            "Use a copy of the model from a place that you trust.",
        )
    return [checked_place(folder / name) for name in sorted(set(names))]


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """File name → file with its header checked, of every file that ``weight_files`` gives. Of a multimodal checkpoint
    they have the tensors of its text model, by the text model's names."""
    shards = {path.name: SafetensorsFile(path) for path in weight_files(folder)}
    if has_text_model(check_config_file(folder)):
        for file in shards.values():
            file.rename(text_name)
    return shards


def has_text_model(told: dict[str, Any]) -> bool:
    """Whether a config.json is a multimodal model's around a text model that the fused engine knows: only the text model
    is read then, everywhere."""
    text = told.get("text_config")
    return isinstance(text, dict) and text.get("model_type") in FAMILIES


def text_name(name: str) -> str | None:
    """The text model's name of a multimodal checkpoint's tensor; None: it belongs to another part."""
    for pattern, new in TEXT_NAMES.items():
        name, count = re.subn(pattern, new, name)
        if count:
            return name
    return name if name.startswith("lm_head.") else None


def check_config_file(folder: Path) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: it is missing or no JSON object, has no model_type, or would make transformers read or run something
            outside of the folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json, so it is not a model.", "Give a model's folder or hub id.")
    found = read_object(path, hint=again(path))
    if not isinstance(found.get("model_type"), str):
        raise UserError(f"{path}: has no model_type, so it is no model's configuration.", again(path))
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: holds adapter_config.json beside config.json; transformers would load that adapter too.",
            "Move adapter_config.json and its weights into a folder of their own, and name that one under adapters.",
        )
    for part in (found, *(part for part in found.values() if isinstance(part, dict))):
        for key in (*_KERNELS, "transformers_weights"):
            if key in part and (key not in _KERNELS or "/" in str(part[key])):
                raise UserError(
                    f"{path}: {key} is {shown(part[key])}; only the weights in the folder are read, and no code of a model "
                    "is run.",
                    f"Remove {key} from the file.",
                )
    return found
