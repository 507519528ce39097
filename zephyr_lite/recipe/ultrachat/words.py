"""Words of many texts as 64-bit hashes, and their n-grams, without a Python object for any word.

A word is a run of letters, digits and bytes of other scripts, without regard to the case of A to Z. A word's hash is a
polynomial of its bytes modulo 2^64, taken from prefix sums over a piece of the batch, so that all of it is a dozen numpy
operations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 2**64)
_RNG = np.random.Generator(np.random.PCG64(20231025))
_VALUES = _RNG.integers(1, 2**63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _RNG.integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_IS_WORD = np.zeros(256, bool)
_IS_WORD[[*range(ord("0"), ord("9") + 1), *range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1)]] = True
_IS_WORD[128:] = True
_VALUES[ord("A") : ord("Z") + 1] = _VALUES[ord("a") : ord("z") + 1]
_VALUES[~_IS_WORD] = 0
# signs outside of ASCII that are no letters
_SIGNS = re.compile("[‘’“”„«»‹›–—―…•·¡¿′″\u00a0\u2009\u200b\u3000、。，！？；：「」（）]")
_PIECE = 1 << 16  # bytes
_powers = np.ones(1, np.uint64)
_inverses = np.ones(1, np.uint64)


@dataclass(frozen=True)
class Words:
    """The words of a list of texts.

    Attributes:
        hashes: uint64 [words].
        offsets: int64 [texts + 1]: text i has the words offsets[i]:offsets[i + 1].
        starts, ends: int64 [words]: where each word lies in ``data``.
        data: the texts' UTF-8 bytes, a line each; signs outside of ASCII are spaces.
    """

    hashes: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    data: np.ndarray

    def text(self, first: int, count: int) -> str:
        """The words from ``first`` on as they stand in their text."""
        return bytes(self.data[self.starts[first] : self.ends[first + count - 1]]).decode("utf-8", "replace")


def words_of(texts: Sequence[str]) -> Words:
    """Split texts into words and hash them; case, punctuation and white space make no difference."""
    plain = [text if text.isascii() else _SIGNS.sub(" ", text) for text in texts]
    sizes = [len(text) if text.isascii() else len(text.encode()) for text in plain]
    data = np.frombuffer(("\n" + "\n".join(plain) + "\n").encode(), np.uint8)
    bounds = np.cumsum([1, *(size + 1 for size in sizes)])
    inside = _IS_WORD[data]
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1  # a word does not go over the line between two texts
    starts, ends = edges[::2], edges[1::2]
    hashes = np.empty(len(starts), np.uint64)
    # a piece at a time: its tables and sums fit into the processor's cache
    pieces = np.searchsorted(starts, np.arange(0, len(data) + _PIECE, _PIECE))
    for first, last in zip(pieces[:-1].tolist(), pieces[1:].tolist()):
        if first < last:
            begin, end = int(starts[first]), int(ends[last - 1])
            hashes[first:last] = _hashes(data[begin:end], starts[first:last] - begin, ends[first:last] - begin)
    return Words(hashes, np.searchsorted(starts, bounds), starts, ends, data)


def _hashes(data: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    powers, inverses = _power_tables(len(data))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_VALUES[data] * powers[: len(data)], out=sums[1:])
    return mix((sums[ends] - sums[starts]) * inverses[starts])


def _power_tables(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse, from the products of two short tables."""
    global _powers, _inverses
    if len(_powers) < size:
        length = max(1 << 16, 1 << (size - 1).bit_length())
        tables = []
        for base in (_BASE, _INVERSE):
            low = np.cumprod(np.concatenate(([np.uint64(1)], np.full(1023, np.uint64(base)))))
            step = np.full(length // 1024 - 1, np.uint64(pow(base, 1024, 2**64)))
            high = np.cumprod(np.concatenate(([np.uint64(1)], step)))
            tables.append(np.multiply.outer(high, low).ravel())
        _powers, _inverses = tables
    return _powers, _inverses


def mix(values: np.ndarray) -> np.ndarray:
    """Spread the bits (the finaliser of splitmix64); uint64 to uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(words: Words, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n-grams that lie inside one text.

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
    for k in range(1, n):  # a gram that begins less than n words before a text's end is none
        ends = words.offsets[1:] - k
        fits[ends[(ends >= 0) & (ends < count) & (ends >= words.offsets[:-1])]] = False
    first = np.flatnonzero(fits)
    return mix(sums[first]), first


def whole(words: Words) -> np.ndarray:
    """One hash for each text, of all its words in their order; uint64 [texts]. A text without words has 0."""
    size = len(words.hashes)
    powers, _ = _power_tables(max(size, 1))
    place = np.arange(size) - np.repeat(words.offsets[:-1], np.diff(words.offsets))
    sums = np.zeros(size + 1, np.uint64)
    np.cumsum(words.hashes * powers[place], out=sums[1:])
    found = mix(sums[words.offsets[1:]] - sums[words.offsets[:-1]])
    found[np.diff(words.offsets) == 0] = 0
    return found


def joined(words: Words, groups: np.ndarray) -> Words:
    """The same words with several texts taken as one.

    Args:
        groups: int64 [groups + 1]: group i has the texts groups[i]:groups[i + 1].
    """
    return Words(words.hashes, words.offsets[groups], words.starts, words.ends, words.data)


def members(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where values are among the keys: indices int64. A table of bits is asked before the keys are searched.

    Args:
        values: uint64 [values].
        keys: uint64, sorted.
    """
    if not len(keys):
        return np.zeros(0, np.int64)
    size = np.uint64(max(1 << 16, 1 << (len(keys).bit_length() + 4)))
    table = np.zeros(int(size), bool)
    table[keys & (size - np.uint64(1))] = True
    maybe = np.flatnonzero(table[values & (size - np.uint64(1))])
    place = np.minimum(np.searchsorted(keys, values[maybe]), len(keys) - 1)
    return maybe[keys[place] == values[maybe]]
