"""The messages that a model writes as the user: what is taken of a reply, and which ones repeat another."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from ..client.client import Request, RequestFailed
from ..client.cost import Client

MAX_CHARACTERS = 6000
_LABEL = re.compile(r"^\W{0,3}(?:user|human|message|prompt|question)\W{0,3}:\W{0,3}\s*", re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)?)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}
_WORD = re.compile(r"\w+")
_RUN = 8  # words in a row that are no coincidence
_REPEATED = 0.8  # of a message's shingles that an earlier turn has too


def read_message(text: str) -> str:
    """The message in a reply, without reasoning, a label, a preamble or quotation marks around it.

    Raises:
        RequestFailed: it holds no message, or one that is too long.
    """
    text = text.rpartition("</think>")[2].strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    text = _LABEL.sub("", text, count=1).strip()
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    if sum(character.isalnum() for character in text) < 6:
        raise RequestFailed("a message of less than six letters")
    if len(text) > MAX_CHARACTERS:
        raise RequestFailed(f"a message of more than {MAX_CHARACTERS:,} characters")
    return text


async def ask_message(client: Client, request: Request, quoted: Sequence[str] = (), turns: Sequence[str] = ()) -> str:
    """The user's message in the reply to a request.

    Args:
        quoted, turns: examples, which the message may repeat, and the dialogue so far, which it may quote. The rest of the
            request is instruction, of which it may hold no eight words in a row.

    Raises:
        RequestFailed, BudgetSpent: there is no reply, or it holds no usable message.
    """
    reply = await client.ask(request)
    if reply.finish_reason == "length":
        raise RequestFailed("a message cut at max_tokens")
    text = read_message(reply.text)
    if any(repeats(text, turn) for turn in turns):
        raise RequestFailed("a message that repeats an earlier turn")
    instruction = "\n".join(message["content"] for message in request.messages)
    for shown in filter(None, (*quoted, *turns)):
        instruction = instruction.replace(shown, "\n")
    if _runs(text) & _runs(instruction):
        raise RequestFailed("a message that hands its instructions back")
    return text


def shingles(text: str) -> set[str]:
    """Words and pairs of words in lower case; of a text of few words (or a script without spaces) runs of three
    characters."""
    words = _WORD.findall(text.lower())
    if len(words) >= 4:
        return {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    joined = " ".join(words)
    return {joined[i : i + 3] for i in range(max(1, len(joined) - 2))}


def repeats(text: str, turn: str) -> bool:
    """Whether a message is an earlier turn, or hardly more than a part of one."""
    if "".join(text.lower().split()) == "".join(turn.lower().split()):
        return True
    own, its = shingles(text), shingles(turn)
    return len(own) >= 2 * _RUN and len(own & its) >= _REPEATED * len(own)


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row, in lower case."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


class Openings:
    """The openings taken so far, compared by the Jaccard similarity of their shingles.

    Two sets of similarity s share one of the first ⌊(1 - s) n⌋ + 1 elements of each, in any fixed order (Chaudhuri et al.
    2006); only openings that share such an element are compared.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._taken: list[tuple[str, set[str]]] = []
        self._index: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, text: str) -> str | None:
        """Take a text that is new and return None; or return the earliest one that it is too similar to."""
        mine = shingles(text)
        ordered = sorted(mine, key=lambda s: (" " not in s, s))  # pairs of words are rarer than words, and come first
        prefix = ordered[: len(mine) - math.ceil(self._similarity * len(mine) - 1e-9) + 1]
        for number in sorted({number for each in prefix for number in self._index[each]}):
            earlier, its = self._taken[number]
            shared = len(mine & its)
            if shared >= self._similarity * (len(mine) + len(its) - shared):
                return earlier
        for each in prefix:
            self._index[each].append(len(self._taken))
        self._taken.append((text[:500], mine))
        return None
