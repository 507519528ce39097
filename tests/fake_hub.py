"""The Hugging Face hub in memory, as far as ``sync`` uses it: repositories whose commits are whole or not there at all."""

from __future__ import annotations

import importlib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

# the library that the hub's own speaks through has changed its name more than once
httpx: Any = importlib.import_module(errors.HTTPError.__module__.split(".")[0])
REQUEST = httpx.Request("POST", "https://huggingface.co/api")


def http_error(status, headers=None, kind=HfHubHTTPError):
    """As the hub's library raises it."""
    return kind(f"{status} of the server", response=httpx.Response(status, headers=headers or {}, request=REQUEST))


class FakeHub:
    """What all clients see.

    Attributes:
        repos: name → commits, each a tree {path: bytes}.
        private: names of private repositories.
        faults: what the next calls raise, in this order.
        breaks: for the next commits: after so many files, this error.
        calls: names of the methods that were called.
    """

    def __init__(self):
        self.repos, self.private, self.faults, self.breaks, self.calls, self.squashed = {}, set(), [], [], [], 0

    def tree(self, repo):
        return self.repos[repo][-1]

    def __call__(self):
        return Api(self)

    def snapshots(self, cache):
        """``huggingface_hub.snapshot_download`` with this folder as its cache."""

        def download(repo, *, revision=None, allow_patterns, ignore_patterns=()):
            Api(self).snapshot_download(repo, allow_patterns=allow_patterns, local_dir=cache / repo)
            return str(cache / repo)

        return download


class Api:
    def __init__(self, hub):
        self.hub = hub

    def _begin(self, name, repo=None):
        self.hub.calls.append(name)
        if self.hub.faults:
            raise self.hub.faults.pop(0)
        if repo is not None and repo not in self.hub.repos:
            raise http_error(404, kind=RepositoryNotFoundError)

    def create_repo(self, repo, *, private, exist_ok):
        self._begin("create_repo")
        assert exist_ok
        if repo not in self.hub.repos:
            self.hub.repos[repo] = [{".gitattributes": b""}]
            if private:
                self.hub.private.add(repo)

    def repo_info(self, repo):
        self._begin("repo_info", repo)
        return SimpleNamespace(private=repo in self.hub.private)

    def snapshot_download(self, repo, *, allow_patterns, local_dir):
        self._begin("snapshot_download", repo)
        for name, data in self.hub.tree(repo).items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                target = Path(local_dir) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, allow_patterns, path_in_repo="", delete_patterns=()
    ):
        self._begin("upload_folder", repo_id)
        assert commit_message
        prefix = f"{path_in_repo}/" if path_in_repo else ""
        files = {p.relative_to(folder_path).as_posix(): p for p in sorted(Path(folder_path).rglob("*")) if p.is_file()}
        added = {name: p for name, p in files.items() if any(fnmatch(name, pattern) for pattern in allow_patterns)}
        tree = {
            name: data
            for name, data in self.hub.tree(repo_id).items()
            if not (name.startswith(prefix) and any(fnmatch(name.removeprefix(prefix), p) for p in delete_patterns))
        }
        breaks = self.hub.breaks.pop(0) if self.hub.breaks else None
        for place, (name, path) in enumerate(added.items()):
            if breaks is not None and place == breaks[0]:
                raise breaks[1]
            tree[prefix + name] = path.read_bytes()
        self.hub.repos[repo_id].append(tree)

    def super_squash_history(self, repo):
        self._begin("super_squash_history", repo)
        self.hub.repos[repo] = self.hub.repos[repo][-1:]
        self.hub.squashed += 1
