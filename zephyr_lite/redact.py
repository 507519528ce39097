"""Secrets of the environment are shown nowhere: what is printed, logged or written into a run's folder goes through here.

Which values are secret is known by their variables' names (``HF_TOKEN``, ``OPENAI_API_KEY``, ``…_PASSWORD``), by the
files in which ``hf auth login`` keeps its tokens, by what a server's configuration named (``endpoints.keys``), and by
their place in a URL (``https://user:password@host``).
"""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

HIDDEN = "***"
# a value this short may be a part of honest text
SHORT = 8
# names like HF_TOKEN, HUGGING_FACE_HUB_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, CLEARML_API_SECRET_KEY, PGPASSWORD
_SECRET_NAME = re.compile(
    r"(?:API_?KEY|ACCESS_KEY|SECRET_KEY|PRIVATE_KEY|(?:^|_)TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE)$"
)
_IN_URL = re.compile(r"(?<=://)([^\s/:@'\"]*):[^\s/@'\"]+@")


_remembered: set[str] = set()


def remember(value: str) -> None:
    """Hide this value too, in this process: a key that a configuration keeps in a variable of another name."""
    if len(value) >= SHORT:
        _remembered.add(value)


def redact(text: str) -> str:
    """The text without any secret of this process's environment: each is replaced by ``***``.

    The environment is read at every call (a variable may be set later), which takes some 30 µs.
    """
    for value in secrets():
        text = hide(text, value, HIDDEN)
    return _IN_URL.sub(rf"\1:{HIDDEN}@", text) if "://" in text else text


def hide(text: str, value: str, shown: str) -> str:
    """``shown`` in place of a value as it is, as it stands in JSON, and as it stands in a URL."""
    for form in _forms(value):
        text = text.replace(form, shown)
    return text


def secrets() -> list[str]:
    """The values that are hidden, the longest first: one may be a part of another."""
    found = {value.strip() for name, value in os.environ.items() if _is_secret(name)}
    found |= _remembered
    for file in _token_files():
        found.update(_tokens_in(file))
    return sorted((value for value in found if len(value) >= SHORT), key=lambda value: (-len(value), value))


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name.upper()) is not None


@lru_cache(maxsize=64)
def _forms(value: str) -> tuple[str, ...]:
    # ascii and not: both kinds of JSON are written; repr is how values stand in messages
    inner = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
    return tuple(
        dict.fromkeys((value, *inner, quote(value, errors="replace"), quote(value, safe="", errors="replace")))
    )


def _token_files() -> list[Path]:
    """Where huggingface_hub keeps tokens (its constants.py); read without importing it, which takes a third of a second."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    home = os.path.expandvars(os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")))
    token = os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    stored = os.environ.get("HF_STORED_TOKENS_PATH") or os.path.join(os.path.dirname(token), "stored_tokens")
    return [Path(token), Path(stored)]


def _tokens_in(file: Path) -> tuple[str, ...]:
    try:
        stat = file.stat()
    except (OSError, ValueError):
        return ()
    return _read_tokens(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _read_tokens(file: Path, changed: int, size: int) -> tuple[str, ...]:
    """A file with a token alone, or sections of ``hf_token = …``; anew when it changed."""
    if size > 2**20:
        return ()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ()
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) == 1:
        return (lines[0],)
    return tuple(line.split("=", 1)[1].strip() for line in lines if line.startswith("hf_token") and "=" in line)
