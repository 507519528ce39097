"""A server's key: read from the environment, used in one header, and shown nowhere."""

from __future__ import annotations

import os
import re

from ..errors import UserError
from ..io.redact import SHORT, hide, is_plain, remember
from .types import EndpointSpec

SHOWN = "[key]"


class Key:
    """Holds a key without showing it: not in a message, a representation, or a traceback with its variables."""

    __slots__ = ("_read",)

    def __init__(self, value: str) -> None:
        self._read = lambda: value

    def __repr__(self) -> str:
        return SHOWN

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a key is not written anywhere")

    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._read()}"}

    def redact(self, text: str) -> str:
        """The text without the key; one that is a word (servers of one's own take any, such as ``not-needed``) stays."""
        return text if len(self._read()) < SHORT or is_plain(self._read()) else self._without(text)

    def _without(self, text: str) -> str:
        return hide(text, self._read(), SHOWN)

    def redact_error(self, text: str) -> str:
        """A server's complaint without the key, without any piece of it, and without what a server makes of it
        (``sk-ab****yz``)."""
        value = self._read()
        text = self._without(text)
        starts = range(len(value) - SHORT + 1)
        pieces = {value[i : i + SHORT] for i in starts}
        covered = [False] * len(text)
        for i in range(len(text) - SHORT + 1):
            if text[i : i + SHORT] in pieces:
                covered[i : i + SHORT] = [True] * SHORT
        kept = "".join("\0" if hidden else letter for letter, hidden in zip(text, covered))
        return re.sub(r"\0+", SHOWN, re.sub(r"\S*\*{3,}\S*", SHOWN, kept))


def read_key(spec: EndpointSpec) -> Key | None:
    """The key of an endpoint, or None where it needs none.

    Raises:
        UserError: the variable is not set, or holds what no header can.
    """
    if spec.api_key_env is None:
        return None
    # somebody may have put the key itself where its variable's name belongs: only what looks like a name is repeated
    looks_like_a_name = re.fullmatch(r"[A-Z][A-Z0-9_]{0,60}", spec.api_key_env) is not None
    shown = spec.api_key_env if looks_like_a_name else "named in api_key_env"
    key = Key(os.environ.get(spec.api_key_env, "").strip())
    if not key._read():
        raise UserError(
            f"endpoint {spec.name}: the environment variable {shown} is not set.",
            f"export {shown if looks_like_a_name else 'NAME'}=… with the key, and name the variable (not the key) in api_key_env.",
        )
    if not all("!" <= letter <= "~" for letter in key._read()):
        raise UserError(
            f"endpoint {spec.name}: the environment variable {shown} holds a space, or a letter outside ASCII: no key does.",
            "Set it again, to the key alone.",
        )
    remember(key._read())
    return key
