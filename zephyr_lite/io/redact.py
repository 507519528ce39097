"""Secrets of the environment: replaced by ``***`` in everything that is printed, logged or written about a run.

Secret are the values of environment variables with such names (``HF_TOKEN``, ``OPENAI_API_KEY``, ``…_PASSWORD``), the
tokens that ``hf auth login`` stores, the keys that a server's configuration names (``remember``), and passwords in URLs.
A value that is a plain word, a number, a model's special token or a path (``DB_PASSWORD=postgres``,
``EOS_TOKEN=<|im_end|>``) is none: configurations and templates hold it too, and are read again.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import UserError

HIDDEN = "***"
# a shorter value may be a part of other text
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
    """Hide this value too in this process: a key from a variable with another name."""
    if len(value) >= SHORT:
        _remembered.add(value)


def redact(text: str) -> str:
    """The text with every secret of this process replaced by ``***``."""
    for value in secrets():
        text = hide(text, value, HIDDEN)
    return _IN_URL.sub(rf"\1:{HIDDEN}@", text)


def find_secret(text: str) -> str | None:
    """What secret a text holds, in words that do not repeat it; None: none."""
    for value in secrets():
        if hide(text, value, "") != text:
            names = sorted(name for name, each in os.environ.items() if each.strip() == value and _is_secret(name))
            return f"the value of the environment variable {names[0]}" if names else "a token or key of yours"
    return "a password in a URL" if _IN_URL.search(text) else None


def refuse_secrets(values: Any, where: str) -> None:
    """Refuse settings that hold a secret: they are written into files and compared when a run is resumed.

    Args:
        values: nested dicts and lists.
        where: they come from.

    Raises:
        UserError: names the key, and never the secret.
    """
    for key, text in _texts(values):
        if (what := find_secret(text)) is not None:
            raise UserError(
                f"{where}: {redact(key)} holds {what}. It would be written into files.",
                "Give a value without it. If it is no secret, unset that variable for this command (env -u NAME zephyr-lite …).",
            )


def _texts(values: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested values, keys included."""
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
    """Whether a value is a word, number, special token or existing path, which other text may hold as well."""
    path = os.path.expanduser(value)
    return _PLAIN.fullmatch(value) is not None or (path.startswith("/") and os.path.lexists(path))


def hide(text: str, value: str, shown: str) -> str:
    """Replace a value in a text, also where it is written as in JSON, in a Python repr or in a URL."""
    forms = (
        value,
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        quote(value, errors="replace"),
        quote(value, safe="", errors="replace"),
    )
    for form in dict.fromkeys(forms):
        text = text.replace(form, shown)
    return text


def secrets() -> list[str]:
    """The values to hide, the longest first: one may be a part of another."""
    found = {value.strip() for name, value in os.environ.items() if _is_secret(name)} | _remembered | _hub_tokens()
    return sorted((value for value in found if len(value) >= SHORT and not is_plain(value)), key=len, reverse=True)


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name.upper()) is not None


def _hub_tokens() -> set[str]:
    """Tokens in huggingface_hub's files (the paths of its constants.py; importing it takes a third of a second)."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    token = Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))))
    stored = Path(os.environ.get("HF_STORED_TOKENS_PATH") or token.with_name("stored_tokens"))
    found = set()
    for file in (token, stored):
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            continue
        # a token alone, or sections of ``hf_token = …``
        found |= {line.rpartition("hf_token =")[2].strip() for line in lines if not line.startswith("[")}
    return found
