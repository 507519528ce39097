"""Secrets of the environment: replaced by ``***`` in everything that is printed, logged or written about a run.

Secret are the values of environment variables with such names (``HF_TOKEN``, ``OPENAI_API_KEY``, ``…_PASSWORD``), every
token of the hub, the keys that a server's configuration names (``remember``), and passwords in URLs. A value that is a
plain word, a number, a model's special token or a path (``DB_PASSWORD=postgres``, ``EOS_TOKEN=<|im_end|>``) is none:
configurations and templates hold it too, and are read again.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any
from urllib.parse import quote

from ..errors import UserError

HIDDEN = "***"
SHORT = 8  # a shorter value may be a part of other text
# names like HF_TOKEN, NGROK_AUTHTOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, AZURE_STORAGE_KEY, PGPASSWORD, MYSQL_PWD
_SECRET_NAME = re.compile(
    r"(?:API_?KEY|_KEY|(?:^|_|AUTH)TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|._PASS|._PWD|(?:^|_)CREDENTIALS?)$"
)
_IN_URL = re.compile(r"(?<=://)([^\s/:@'\"]*):[^\s/@'\"]+@")
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")  # ``hf auth login`` stores one in a file
# a word; words joined as in names of keys and files; a number or a date; a special token of a tokenizer
_PLAIN = re.compile(
    r"[^\W\d_]{1,15}|(?=.{1,23}$)[^\W\d_]{1,15}(?:[-_./ ][^\W\d_]{1,15})+|[-+]?\d[\d.,:/-]{0,14}|<[|/]?[a-zA-Z_]{1,30}\|?>"
)

_remembered: set[str] = set()


def remember(value: str) -> None:
    """Hide this value too in this process: a key from a variable with another name."""
    _remembered.add(value)


def redact(text: str) -> str:
    """The text with every secret of this process replaced by ``***``."""
    for value in _secrets():
        for form in _forms(value):
            text = text.replace(form, HIDDEN)
    return _IN_URL.sub(rf"\1:{HIDDEN}@", _HUB_TOKEN.sub(HIDDEN, text))


def find_secret(text: str) -> str | None:
    """The kind of secret that a text holds, in words that do not repeat it; None: none."""
    for value, name in _secrets().items():
        if any(form in text for form in _forms(value)):
            return f"the value of the environment variable {name}" if name else "a token or key of yours"
    if _HUB_TOKEN.search(text):
        return "a token of the hub"
    return "a password in a URL" if _IN_URL.search(text) else None


def refuse_secrets(values: Any, where: str, key: str = "") -> None:
    """Refuse settings that hold a secret: they are written into files and compared when a run is resumed.

    Args:
        values: nested dicts and lists.
        where: they come from.
        key: of ``values`` themselves.

    Raises:
        UserError: names the key, and never the secret.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            refuse_secrets(str(name), where, key or "a key")
            refuse_secrets(value, where, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(value, where, key)
    elif isinstance(values, str) and (what := find_secret(values)) is not None:
        raise UserError(
            f"{where}: {redact(key)} holds {what}. It would be written into files.",
            "Give a value without it. If it is no secret, unset that variable for this command (env -u NAME zephyr-lite …).",
        )


def _secrets() -> dict[str, str]:
    """The values to hide → their variable, the longest first: one may be a part of another. Words, numbers, special tokens
    and existing paths, which other text may hold as well, are none."""
    found = dict.fromkeys(_remembered, "")
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()):
            found[value.strip()] = name
    secrets = {}
    for value in sorted(found, key=len, reverse=True):
        path = os.path.expanduser(value)
        is_path = path.startswith("/") and os.path.lexists(path)
        if len(value) >= SHORT and _PLAIN.fullmatch(value) is None and not is_path:
            secrets[value] = found[value]
    return secrets


def _forms(value: str) -> tuple[str, ...]:
    """A value as it is written as such, in JSON, in a Python repr and in a URL."""
    escaped = json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]
    return value, *escaped, quote(value, errors="replace"), quote(value, safe="", errors="replace")
