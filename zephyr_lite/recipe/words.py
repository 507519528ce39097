"""Words of many texts as 64-bit hashes, and their n-grams, in numpy arrays.

A word is a run of ASCII letters and digits and of other scripts' characters; the case of A to Z is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RNG = np.random.Generator(np.random.PCG64(20231025))
_VALUES = _RNG.integers(1, 2**63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _RNG.integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # by position, odd
_IS_WORD = np.zeros(256, bool)
_IS_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)]] = True
_IS_WORD[128:] = True
_VALUES[ord("A") : ord("Z") + 1] = _VALUES[ord("a") : ord("z") + 1]
# punctuation outside of ASCII
SIGNS = re.compile("[‘’“”„«»‹›–—―…•·¡¿′″\u00a0\u2009\u200b\u3000、。，！？；：「」（）]")


@dataclass(frozen=True)
class Words:
    """The words of a list of texts.

    Attributes:
        hashes: uint64 [words].
        offsets: int64 [texts + 1]: text i has the words offsets[i]:offsets[i + 1].
        starts, ends: int64 [words]: each word's bytes in ``data``.
        data: uint8, the texts in UTF-8, each on a line, with ``SIGNS`` replaced by spaces.
    """

    hashes: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    data: np.ndarray

    def text(self, first: int, count: int) -> str:
        """``count`` words of one text, as they are written."""
        return bytes(self.data[self.starts[first] : self.ends[first + count - 1]]).decode("utf-8", "replace")

    def joined(self, groups: np.ndarray) -> Words:
        """The same words with texts groups[i]:groups[i + 1] as text i.

        Args:
            groups: int64 [groups + 1].
        """
        return Words(self.hashes, self.offsets[groups], self.starts, self.ends, self.data)


def words_of(texts: Sequence[str]) -> Words:
    """Split texts into words and hash them."""
    lines = [(text if text.isascii() else SIGNS.sub(" ", text)).encode() for text in texts]
    data = np.frombuffer(b"\n" + b"\n".join(lines) + b"\n", np.uint8)
    bounds = np.cumsum([1, *(len(line) + 1 for line in lines)])
    inside = _IS_WORD[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[::2], edges[1::2]
    lengths = ends - starts
    first = np.cumsum(lengths) - lengths  # of each word among the bytes of words
    place = np.arange(int(lengths.sum())) - np.repeat(first, lengths)
    terms = _VALUES[data[inside]] * _FACTORS[place & 63]
    hashes = mix(np.add.reduceat(terms, first)) if len(terms) else np.zeros(0, np.uint64)
    return Words(hashes, np.searchsorted(starts, bounds), starts, ends, data)


def mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams within each text.

    Returns:
        (hashes uint64 [grams], index of each one's first word int64 [grams]), in the order of the texts.
    """
    count = len(words.hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    sums = words.hashes[:count] * _FACTORS[0]
    for k in range(1, n):
        sums += words.hashes[k : count + k] * _FACTORS[k]
    fits = np.ones(count, bool)
    for k in range(1, n):  # a gram that starts less than n words before its text's end
        ends = words.offsets[1:] - k
        fits[ends[(ends >= 0) & (ends < count) & (ends >= words.offsets[:-1])]] = False
    first = np.flatnonzero(fits)
    return mix(sums[first]), first


def whole(words: Words) -> np.ndarray:
    """One hash of all words of each text, uint64 [texts]; 0 for a text without words. Meant for texts of up to 64 words."""
    lengths = np.diff(words.offsets)
    place = np.arange(len(words.hashes)) - np.repeat(words.offsets[:-1], lengths)
    sums = np.zeros(len(words.hashes) + 1, np.uint64)
    np.cumsum(words.hashes * _FACTORS[place & 63], out=sums[1:])
    found = mix(sums[words.offsets[1:]] - sums[words.offsets[:-1]])
    found[lengths == 0] = 0
    return found


def members(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Indices int64 of the values that are among the keys.

    Args:
        values: uint64 [values].
        keys: uint64, sorted.
    """
    if not len(keys):
        return np.zeros(0, np.int64)
    # a table of bits excludes nearly all values before the keys are searched
    size = np.uint64(max(1 << 16, 1 << (len(keys).bit_length() + 4)))
    table = np.zeros(int(size), bool)
    table[keys & (size - np.uint64(1))] = True
    maybe = np.flatnonzero(table[values & (size - np.uint64(1))])
    place = np.minimum(np.searchsorted(keys, values[maybe]), len(keys) - 1)
    return maybe[keys[place] == values[maybe]]
