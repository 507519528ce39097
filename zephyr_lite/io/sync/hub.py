"""A private repository of the Hugging Face hub as the place for copies.

Each state of a stage is one commit: the new checkpoint comes and the old one goes together, or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from ...errors import UserError
from ..atomic import make_folder
from ..manifest import FORMAT, MANIFEST, file_sha256
from ..redact import redact
from .place import PlaceError

# the history of what was deleted counts towards the account's storage
SQUASH_EVERY = 20  # commits
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


class HubPlace:
    """See ``place.Place``.

    Args:
        repo: OWNER/NAME; made private where it is not there yet.

    Raises:
        UserError: that is no repository's name, there is no token, or the hub is switched off.
    """

    def __init__(self, repo: str) -> None:
        self.repo = repo
        self.name = f"hub:{repo}"
        if not _REPO.fullmatch(repo):
            raise UserError(f"sync {self.name}: is no repository's name.", "Write hub:OWNER/NAME.")
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"sync {self.name}: HF_HUB_OFFLINE is set.", "Unset it, or name a folder.")
        if get_token() is None:
            raise UserError(
                f"sync {self.name}: there is no token of the hub.",
                "Run `hf auth login`, or set HF_TOKEN (with write access).",
            )
        self.api = HfApi()
        self.commits = 0

    def prepare(self) -> None:
        disable_progress_bars()  # a bar of another thread would run through the lines of training
        with _named():
            self.api.create_repo(self.repo, private=True, exist_ok=True)

    def names(self, folder: str) -> list[str]:
        with _named():
            try:
                found = [entry.path for entry in self.api.list_repo_tree(self.repo, folder or None)]
            except (EntryNotFoundError, RepositoryNotFoundError):
                return []
        names = {path.rsplit("/", 1)[-1] for path in found}
        return sorted(name for name in names if not name.startswith("."))

    def read(self, path: str) -> bytes | None:
        with _named(), tempfile.TemporaryDirectory() as folder:
            try:
                return Path(self.api.hf_hub_download(self.repo, path, local_dir=folder)).read_bytes()
            except (EntryNotFoundError, RepositoryNotFoundError):
                return None

    def put(self, folder: str, add: Mapping[str, Path | bytes], delete: Sequence[str]) -> None:
        with _named():
            operations: list[Any] = []
            for name, source in add.items():
                if isinstance(source, Path) and source.is_dir():
                    operations += _folder_operations(f"{folder}/{name}", source)
                else:
                    # read at once: the log of metrics grows
                    content = source if isinstance(source, bytes) else source.read_bytes()
                    operations.append(CommitOperationAdd(f"{folder}/{name}", content))
            operations += [CommitOperationDelete(f"{folder}/{name}/", is_folder=True) for name in delete]
            self.api.create_commit(self.repo, operations, commit_message=f"{folder}: {', '.join(add)}"[:200])
            self.commits += 1
            if self.commits % SQUASH_EVERY == 0:
                with contextlib.suppress(HfHubHTTPError):  # only tidiness
                    self.api.super_squash_history(self.repo)

    def fetch(self, path: str, target: Path) -> None:
        with _named():
            try:
                found = [e.path for e in self.api.list_repo_tree(self.repo, path, recursive=True) if hasattr(e, "size")]
            except EntryNotFoundError:
                found = []
            aside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")  # as ``files.sweep`` knows it
            try:
                for name in found or [path]:
                    place = target / name.removeprefix(f"{path}/") if found else target
                    if not place.is_relative_to(target) or ".." in place.parts:
                        raise PlaceError("no plain file", f"{name} leads out of its folder")
                    make_folder(place.parent)
                    os.replace(self.api.hf_hub_download(self.repo, name, local_dir=aside), place)
            finally:
                shutil.rmtree(aside, ignore_errors=True)


def _folder_operations(name: str, folder: Path) -> list[Any]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    operations: list[Any] = [CommitOperationAdd(f"{name}/{inner}", str(path)) for inner, path in files.items()]
    if MANIFEST not in files:
        told = {inner: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for inner, p in files.items()}
        manifest = json.dumps({"format": FORMAT, "files": told}).encode()
        operations.append(CommitOperationAdd(f"{name}/{MANIFEST}", manifest))
    return operations


@contextmanager
def _named() -> Iterator[None]:
    """The hub's and the network's errors, by their kind."""
    try:
        yield
    except (PlaceError, UserError):
        raise
    except HfHubHTTPError as error:
        response: Any = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        wait = None
        with contextlib.suppress(AttributeError, TypeError, ValueError):
            wait = float(response.headers.get("Retry-After"))
        if status == 429:
            kind = "rate limit (429)"
        elif status in (401, 403):
            kind = f"not permitted ({status})"
        elif status == 404:
            kind = "not there (404)"
        elif isinstance(status, int) and status >= 500:
            kind = f"server error ({status})"
        else:
            kind = f"refused ({status})" if status else "network"
        raise PlaceError(kind, _line(error), wait) from None
    except Exception as error:  # httpx, urllib3, xet: whichever the hub's library uses underneath
        raise PlaceError("network" if _is_network(error) else type(error).__name__, _line(error)) from None


def _is_network(error: Exception) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or bool(names & {"TransportError", "RequestException"})


def _line(error: Exception) -> str:
    return redact(" ".join(str(error).split())[:200] or type(error).__name__)
