"""The Hugging Face hub in memory, as far as ``sync`` uses it: repositories whose commits are whole or not there at all."""

from __future__ import annotations

import importlib
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import errors
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

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

    def list_repo_tree(self, repo, path_in_repo=None, *, recursive=False):
        self._begin("list_repo_tree", repo)
        prefix = f"{path_in_repo}/" if path_in_repo else ""
        found = {path: len(data) for path, data in self.hub.tree(repo).items() if path.startswith(prefix)}
        if prefix and not found:
            raise http_error(404, kind=RemoteEntryNotFoundError)
        folders = set()
        for path, size in found.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                yield SimpleNamespace(path=path, size=size)
        yield from (SimpleNamespace(path=path, tree_id="t") for path in sorted(folders))

    def hf_hub_download(self, repo, filename, *, local_dir):
        self._begin("hf_hub_download", repo)
        if filename not in self.hub.tree(repo):
            raise http_error(404, kind=RemoteEntryNotFoundError)
        target = Path(local_dir) / filename
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.hub.tree(repo)[filename])
        return str(target)

    def snapshot_download(self, repo, *, allow_patterns, local_dir):
        self._begin("snapshot_download", repo)
        for name in self.hub.tree(repo):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                self.hf_hub_download(repo, name, local_dir=local_dir)

    def create_commit(self, repo, operations, *, commit_message):
        self._begin("create_commit", repo)
        assert commit_message
        tree = dict(self.hub.tree(repo))
        breaks = self.hub.breaks.pop(0) if self.hub.breaks else None
        for place, operation in enumerate(operations):
            if breaks is not None and place == breaks[0]:
                raise breaks[1]
            path = operation.path_in_repo
            if hasattr(operation, "path_or_fileobj"):
                source = operation.path_or_fileobj
                tree[path] = source if isinstance(source, bytes) else Path(source).read_bytes()
            else:
                assert operation.is_folder and any(name.startswith(path) for name in tree)
                tree = {name: data for name, data in tree.items() if not name.startswith(path)}
        self.hub.repos[repo].append(tree)

    def super_squash_history(self, repo):
        self._begin("super_squash_history", repo)
        self.hub.repos[repo] = self.hub.repos[repo][-1:]
        self.hub.squashed += 1
