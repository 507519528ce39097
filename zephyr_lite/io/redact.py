"""Secrets of the environment are shown nowhere: what is printed, logged or written into a run's folder goes through here.

Which values are secret is known by their variables' names (``HF_TOKEN``, ``OPENAI_API_KEY``, ``…_PASSWORD``), by the
files in which ``hf auth login`` keeps its tokens, by what a server's configuration named (``endpoints.keys``), and by
their place in a URL (``https://user:password@host``).

Honest data must survive that. A value that is a plain word, a number or a model's special token (``DB_PASSWORD=postgres``,
``EOS_TOKEN=<|im_end|>``) is hidden where it is printed, but not in files: it stands in keys, templates and numbers that a run
reads again. The same holds of a value that everybody sees in this machine's paths and names. A configuration that holds a
real secret is refused before anything is written (``config.load_config``), so that hiding never changes it.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import UserError

HIDDEN = "***"
# a value this short may be a part of honest text
SHORT = 8
# names like HF_TOKEN, NGROK_AUTHTOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_KEY, PGPASSWORD, MYSQL_PWD
_SECRET_NAME = re.compile(
    r"(?:API_?KEY|_KEY|(?:^|_|AUTH)TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|._PASS|._PWD|(?:^|_)CREDENTIALS?)$"
)
_IN_URL = re.compile(r"(?<=://)([^\s/:@'\"]*):[^\s/@'\"]+@")
# a word; words joined as in names of keys and files; a number or a date; a special token of a tokenizer
_PLAIN = re.compile(
    r"[^\W\d_]{1,15}|(?=.{1,23}$)[^\W\d_]{1,15}(?:[-_./ ][^\W\d_]{1,15})+|[-+]?\d[\d.,:/-]{0,14}|<[|/]?[a-zA-Z_]{1,30}\|?>"
)

_remembered: set[str] = set()


def remember(value: str) -> None:
    """Hide this value too, in this process: a key that a configuration keeps in a variable of another name."""
    if len(value) >= SHORT:
        _remembered.add(value)


def redact(text: str) -> str:
    """The text without any secret of this process's environment: each is replaced by ``***``. For what is written.

    The environment is read at every call (a variable may be set later), which takes some 50 µs.
    """
    return _without([value for value in secrets() if not is_plain(value)], text)


def redact_shown(text: str) -> str:
    """As ``redact``, plain words too: for what is printed, and read by nobody but people."""
    return _without(secrets(), text)


def find_secret(text: str) -> str | None:
    """Whether ``redact`` would change a text, and then what stands in it: the name of the variable, in words; else None."""
    for value in secrets():
        if not is_plain(value) and hide(text, value, "") != text:
            names = sorted(name for name, each in os.environ.items() if each.strip() == value and _is_secret(name))
            return f"the value of the environment variable {names[0]}" if names else "a token or key of yours"
    return "a password in a URL" if "://" in text and _IN_URL.search(text) else None


def refuse_secrets(values: Any, where: str) -> None:
    """For settings that are written into a folder and compared when somebody goes on there: hidden they would be others.

    Args:
        values: of plain types, nested at will.
        where: they come from.

    Raises:
        UserError: a text in them holds a secret; names the key, and never the secret.
    """
    for key, text in _texts(values):
        if (what := find_secret(text)) is not None:
            raise UserError(
                f"{where}: {redact_shown(key)} holds {what}. It would be written into files.",
                "Give a value without it. If it is no secret, unset that variable for this command (env -u NAME zephyr-lite …).",
            )


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested values, keys of mappings too."""
    if isinstance(values, str):
        yield key, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield key or "a key", str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, key)


def is_plain(value: str) -> bool:
    """Whether a value is a word or a number that honest files hold, the name of a file (with the key in it), or stands in
    this machine's own names and paths."""
    if _PLAIN.fullmatch(value) is not None or any(value in name for name in _public_names()):
        return True
    try:
        return value.startswith(("/", "~/")) and os.path.lexists(os.path.expanduser(value))
    except ValueError:
        return False


def _public_names() -> list[str]:
    """What every process of this machine sees, and every absolute path holds."""
    names = [socket.gethostname(), os.path.expanduser("~")]
    with suppress(OSError, KeyError, ImportError):  # a user without a name
        names.append(getpass.getuser())
    with suppress(OSError):  # a working directory that was removed
        names.append(os.getcwd())
    return names


def _without(values: list[str], text: str) -> str:
    for value in values:
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
