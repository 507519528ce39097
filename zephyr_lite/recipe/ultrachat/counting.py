"""Counting how words are written inside sentences, for a block of dialogues at once, on arrays of words.

A word stands inside a sentence if a single space (or a comma and a space) divides it from the word before. Runs of fewer
than three such words, and runs with more capitals than small letters, are headings or shouting as often as sentences,
and are left out. Everything is counted by dialogue: a title repeated ten times in one story is one vote.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .words import Words, members, mix, ngrams, words_of

_SPACE, _COMMA = ord(" "), ord(",")
_LEAST_WORDS = 3


@dataclass
class WordCounts:
    """Counts of one block, in dialogues.

    Attributes:
        lower: uint64, sorted: hashes of words in lower case.
        times: int32: of each.
        forms: words with a capital.
        pairs: neighbours that both have a capital, joined by a space.
        both: the same in lower case, in any case.
    """

    lower: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    forms: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    both: Counter[str] = field(default_factory=Counter)

    def pack(self) -> bytes:
        """As bytes."""
        texts = json.dumps([self.forms, self.pairs, self.both], ensure_ascii=False).encode()
        return zlib.compress(
            b"".join((len(self.lower).to_bytes(8, "little"), self.lower.tobytes(), self.times.tobytes(), texts)), 1
        )

    @classmethod
    def unpack(cls, data: bytes) -> WordCounts:
        data = zlib.decompress(data)
        count = int.from_bytes(data[:8], "little")
        lower, times = np.frombuffer(data, np.uint64, count, 8), np.frombuffer(data, np.int32, count, 8 + 8 * count)
        return cls(lower, times, *(Counter(part) for part in json.loads(data[8 + 12 * count :])))


def count_words(words: Words, trusted: np.ndarray) -> WordCounts:
    """Count a block.

    Args:
        words: of the dialogues, each taken as one text.
        trusted: bool [dialogues], those whose capitals are right.
    """
    if len(words.hashes) < 2:
        return WordCounts()
    data, starts, ends = words.data, words.starts, words.ends
    sizes = np.diff(words.offsets)
    dialogue = np.repeat(np.arange(len(sizes)), sizes)
    distance = starts[1:] - ends[:-1]
    spaced = (distance == 1) & (data[starts[1:] - 1] == _SPACE)
    listed = (distance == 2) & (data[ends[:-1]] == _COMMA) & (data[starts[1:] - 1] == _SPACE)
    same = dialogue[1:] == dialogue[:-1]
    linked = np.concatenate(([False], (spaced | listed) & same))
    is_capital = (data >= ord("A")) & (data <= ord("Z"))
    capitals = np.concatenate(([0], np.cumsum(is_capital, dtype=np.int32)))
    own = capitals[ends] - capitals[starts]
    first = data[starts]
    digit = (first >= ord("0")) & (first <= ord("9"))
    run = np.cumsum(~linked) - 1
    length = np.bincount(run, linked)
    loud = np.bincount(run, linked & (own > 0))
    quiet = (length >= _LEAST_WORDS) & (loud * 2 <= length)
    inside = linked & quiet[run] & ~digit & trusted[dialogue]
    found = WordCounts()
    # lower case: hashes are enough
    small = np.flatnonzero(inside & (own == 0))
    once = _once(words.hashes[small], dialogue[small])
    found.lower, times = np.unique(words.hashes[small[once]], return_counts=True)
    found.times = times.astype(np.int32)
    # with a capital: the words themselves
    large = np.flatnonzero(inside & (own > 0))
    large = large[_once(words.hashes[large] + own[large].astype(np.uint64), dialogue[large])]
    found.forms.update(words.text(index, 1) for index in large.tolist())
    upper = is_capital[starts]
    joined = np.flatnonzero(inside[1:] & inside[:-1] & upper[1:] & upper[:-1] & spaced & same)
    grams = words.hashes[joined] * np.uint64(3) + words.hashes[joined + 1]
    joined = joined[_once(grams, dialogue[joined])]
    found.pairs.update(words.text(index, 2) for index in joined.tolist())
    _count_any_case(found, words, trusted, dialogue)
    return found


def _once(keys: np.ndarray, dialogue: np.ndarray) -> np.ndarray:
    """Indices of the first of equal keys within a dialogue."""
    _, first = np.unique(mix(keys + mix(dialogue.astype(np.uint64) + np.uint64(1))), return_index=True)
    return first


def _count_any_case(found: WordCounts, words: Words, trusted: np.ndarray, dialogue: np.ndarray) -> None:
    """In how many dialogues each pair found stands in whatever case."""
    wanted = sorted({pair.lower() for pair in found.pairs})
    of_wanted = words_of(wanted)
    keys = np.zeros(len(wanted), np.uint64)
    hashes, at = ngrams(of_wanted, 2)
    keys[np.searchsorted(of_wanted.offsets, at, side="right") - 1] = hashes
    order = np.argsort(keys)
    grams, first = ngrams(words, 2)
    hits = members(grams, keys[order])
    hits = hits[trusted[dialogue[first[hits]]]]
    hits = hits[_once(grams[hits], dialogue[first[hits]])]
    which = order[np.searchsorted(keys[order], grams[hits])]
    for index, count in zip(*(part.tolist() for part in np.unique(which, return_counts=True))):
        found.both[wanted[index]] = count
