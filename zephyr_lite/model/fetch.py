"""Folders of bases and adapters: local ones, or snapshots downloaded from the hub without pickles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from ..errors import UserError
from ..io.text import shown
from .shards import local_folder, pickles

# the files of a base
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model*", "*.txt"]
# a second copy of the weights, in Mistral's own format
IGNORED = ["consolidated*"]
_CONVERT = "Only safetensors are read; convert the weights with save_pretrained first."


def fetch_base(name_or_path: str, revision: str = "main", *, weights: bool = True) -> Path:
    """The folder of a base: a local one as it is, or a snapshot downloaded from the hub.

    Args:
        weights: False for the tokenizer and ``config.json`` alone.

    Raises:
        UserError: neither exists, it has no safetensors, the hub cannot be reached, or its terms were not accepted.
    """
    if (folder := local_folder(name_or_path)) is not None:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: holds no config.json, so it is not a model.", "Give a model's folder or hub id."
            )
        if weights and not any(folder.glob("*.safetensors")):
            raise UserError(
                f"{folder}: holds no safetensors file (found {pickles(folder) or 'no weights at all'}).", _CONVERT
            )
        return folder
    patterns = [pattern for pattern in PATTERNS if weights or "safetensors" not in pattern]
    fetched = download("model", name_or_path, revision, patterns)
    if weights and not any(fetched.glob("*.safetensors")):
        raise UserError(
            f"model {name_or_path}: has no safetensors file on the hub; pickles (*.bin, *.pt) are never fetched.",
            "Give a model that has safetensors, or convert this one with save_pretrained and name the folder.",
        )
    return fetched


def download(kind: str, name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A snapshot of the files of a hub repository that match the patterns.

    Args:
        kind: model or adapter, for messages.

    Raises:
        UserError: the name is no hub id, or the hub does not give the repository.
    """
    weights = any("safetensors" in pattern for pattern in patterns)
    needed = "" if weights else "Its tokenizer and config.json are needed, no weights. "
    no_id = UserError(
        f"{kind} {shown(name)}: there is no such folder, and it is no hub id (OWNER/NAME).",
        "If it was moved, give its new folder (a base: model_name_or_path=FOLDER in training, --base FOLDER elsewhere).",
    )
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise no_id
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=IGNORED))
    except HFValidationError:
        raise no_id from None
    except GatedRepoError:
        raise UserError(
            f"{kind} {name}: its owner asks you to accept terms first.",
            f"Open https://huggingface.co/{name}, accept, then run `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{kind} {name}: neither a folder here nor a repository on the hub.",
            "Check the name; log in if it is private.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{kind} {name}: not in the hub's cache, and the hub could not be reached ({type(error).__name__}).",
            needed + "Check the connection and HF_HUB_OFFLINE, or name a folder (model_name_or_path=FOLDER).",
        ) from None
