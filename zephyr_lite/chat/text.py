"""Tokens → text as they come: a character's bytes may lie in several tokens."""

from __future__ import annotations

from collections.abc import Callable

# What a decoder writes for bytes that are no character, or not yet one.
_UNFINISHED = "\ufffd"
# A character has four bytes at most: more tokens than this without one are no beginning of a character.
_HELD = 8


class TextStream:
    """The pieces of an answer's text. Together they are the decoded answer without the white space around it.

    Args:
        decode: ids → text, without special tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        # what was given out ends at ``_done``; decoding starts a little before, since a first token loses its space
        self._begin = self._done = 0
        self._begun = False
        self._space = ""

    def push(self, token: int) -> str:
        """What can be shown now that this token is there; often nothing."""
        self._tokens.append(token)
        return self._next(last=len(self._tokens) - self._done >= _HELD)

    def finish(self) -> str:
        """What was held back."""
        return self._next(last=True)

    def _next(self, last: bool) -> str:
        before = self._decode(self._tokens[self._begin : self._done])
        now = self._decode(self._tokens[self._begin :])
        if not last and now.endswith(_UNFINISHED):
            return ""
        piece = now[len(before) :]
        if piece:
            self._begin, self._done = self._done, len(self._tokens)
        return self._trimmed(piece)

    def _trimmed(self, piece: str) -> str:
        """Without white space before the first word; what may turn out to be the end's waits for the next piece."""
        text = self._space + piece if self._begun else piece.lstrip()
        if not text:
            return ""
        self._begun = True
        shown = text.rstrip()
        self._space = text[len(shown) :]
        return shown
