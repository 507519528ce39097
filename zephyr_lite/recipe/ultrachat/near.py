"""Near duplicates: MinHash signatures (rensa), locality-sensitive hashing in bands, and a join that works on disk.

Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3. Rows that share a band are compared by their signatures; similar ones are joined into groups,
and the first row of a group stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .words import Words, joined, mix, ngrams, words_of

PERMUTATIONS, BANDS = 128, 16
SHINGLE = 5  # words
_SEED = 42
# Rows of one partition that are sorted in memory at a time, and pairs of signatures that are compared at a time.
PARTITION_ROWS, PAIRS_AT_ONCE = 2_000_000, 50_000
# In a bucket, rows are compared with its first row; those that differ, with the first of them; and so on.
_ROUNDS = 8


def signatures(words: Words, groups: np.ndarray | None = None) -> np.ndarray:
    """MinHash signatures of texts, or of groups of texts taken as one.

    Shingles are five words; a text of fewer is the set of its words, and one without any gets the signature of a
    shingle of its own kind.

    Args:
        words: of the texts (``words_of``).
        groups: int64 [groups + 1], as in ``words.joined``; None for each text alone.

    Returns:
        uint16 [texts or groups, 128]: the low halves of the 32-bit digests, which are enough to compare.
    """
    words = words if groups is None else joined(words, groups)
    grams, first = ngrams(words, SHINGLE)
    counts = np.diff(np.searchsorted(first, words.offsets))
    lengths = np.diff(words.offsets)
    short = np.flatnonzero(lengths < SHINGLE)
    if len(short):
        grams, counts = _with_short(words, grams, counts, short)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.uint64)
    from rensa import RMinHash

    matrix: Any = RMinHash.digest_matrix_from_flat_token_hashes(grams, offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(-1, PERMUTATIONS).astype(np.uint16)


def _with_short(
    words: Words, grams: np.ndarray, counts: np.ndarray, short: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The texts of fewer words than a shingle get their words as shingles."""
    pieces: list[np.ndarray] = []
    at, counts = 0, counts.copy()
    before = np.concatenate(([0], np.cumsum(counts)))
    for index in short:
        own = words.hashes[words.offsets[index] : words.offsets[index + 1]]
        own = own if len(own) else np.zeros(1, np.uint64)
        pieces += (grams[at : before[index]], own)
        at = before[index]
        counts[index] = len(own)
    return np.concatenate((*pieces, grams[at:])), counts


def bands_of(found: np.ndarray) -> np.ndarray:
    """Signatures uint16 [rows, 128] → a hash for each band, uint64 [rows, 16]; rows that share one are compared."""
    parts = found.reshape(len(found), BANDS, -1).astype(np.uint64)
    sums = np.zeros(parts.shape[:2], np.uint64)
    for k in range(parts.shape[2]):
        sums = mix(sums + parts[:, :, k] + np.uint64(k + 1))
    return sums


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of signatures uint16 [..., 128]: the share of equal places."""
    return (left == right).mean(axis=-1)


class NearIndex:
    """Near duplicates among texts that come one at a time; for sets that fit into memory.

    Args:
        threshold: the Jaccard similarity of the sets of five-word shingles from which on two texts are the same.
    """

    def __init__(self, threshold: float = 0.7) -> None:
        self.threshold = threshold
        self._signatures: list[np.ndarray] = []
        self._buckets: dict[tuple[int, int], list[int]] = {}

    def find(self, text: str) -> int | None:
        """The number of the first text added that is near this one, or None."""
        return self._find(signatures(words_of([text]))[0])

    def add(self, text: str) -> int:
        """Take a text up; returns its number, counted from 0."""
        own = signatures(words_of([text]))[0]
        number = len(self._signatures)
        self._signatures.append(own)
        for bucket in enumerate(bands_of(own[None])[0].tolist()):
            self._buckets.setdefault(bucket, []).append(number)
        return number

    def _find(self, own: np.ndarray) -> int | None:
        near = {n for bucket in enumerate(bands_of(own[None])[0].tolist()) for n in self._buckets.get(bucket, ())}
        return next((n for n in sorted(near) if similarity(own, self._signatures[n]) >= self.threshold), None)


# -- the join on disk ------------------------------------------------------------------------------------------------


def memmap(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new array in a file."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)  # type: ignore[no-untyped-call]


def equal_groups(keys: np.ndarray, alive: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows with equal keys, found in partitions of the keys' values, each of which fits into memory.

    Args:
        keys: uint64 [rows], in a file perhaps.
        alive: bool [rows], the rows to look at.

    Yields:
        (rows int64, in groups and ascending within each; where each group begins int64), groups of two or more only.
    """
    if not len(keys):
        return
    partitions = -(-len(keys) // PARTITION_ROWS)
    for partition in range(partitions):
        picked = []
        for start in range(0, len(keys), PARTITION_ROWS):
            chunk = np.asarray(keys[start : start + PARTITION_ROWS])
            mask = np.asarray(alive[start : start + PARTITION_ROWS]).copy()
            if partitions > 1:
                mask &= chunk % np.uint64(partitions) == partition
            picked.append(np.flatnonzero(mask) + start)
        rows = np.concatenate(picked)
        values = np.asarray(keys[rows])
        order = np.argsort(values, kind="stable")
        rows, values = rows[order], values[order]
        begins = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1]))) if len(rows) else np.zeros(0, int)
        sizes = np.diff(np.concatenate((begins, [len(rows)])))
        many = np.repeat(sizes > 1, sizes)
        kept = sizes[sizes > 1]
        if len(kept):
            yield rows[many], np.concatenate(([0], np.cumsum(kept)[:-1]))


def join_near(bands: np.ndarray, found: np.ndarray, alive: np.ndarray, parent: np.ndarray, threshold: float) -> None:
    """Point every row at the first row of its group of near duplicates.

    Args:
        bands: uint64 [16, rows].
        found: signatures, uint16 [rows, 128].
        alive: bool [rows]; others are left alone.
        parent: int64 [rows], changed in place; at first each row's own number, at last its group's first row.
        threshold: the similarity from which on two rows are one.
    """
    for band in bands:
        for rows, begins in equal_groups(band, alive):
            sizes = np.diff(np.concatenate((begins, [len(rows)])))
            leaders = np.repeat(rows[begins], sizes)
            for _ in range(_ROUNDS):
                other = rows != leaders
                rows, leaders = rows[other], leaders[other]
                if not len(rows):
                    break
                same = np.concatenate(
                    [
                        similarity(found[rows[s : s + PAIRS_AT_ONCE]], found[leaders[s : s + PAIRS_AT_ONCE]])
                        >= threshold
                        for s in range(0, len(rows), PAIRS_AT_ONCE)
                    ]
                )
                _unite(parent, rows[same], leaders[same])
                rows, leaders = rows[~same], leaders[~same]
                # who was unlike the first is compared with the first of those
                fresh = np.concatenate(([True], leaders[1:] != leaders[:-1])) if len(rows) else np.zeros(0, bool)
                leaders = rows[np.maximum.accumulate(np.where(fresh, np.arange(len(rows)), 0))] if len(rows) else rows
    for start in range(0, len(parent), PARTITION_ROWS):
        rows = np.arange(start, min(start + PARTITION_ROWS, len(parent)))
        parent[rows] = roots(parent, rows)


def roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first row of each row's group."""
    at = parent[rows]
    while True:
        up = parent[at]
        if np.array_equal(up, at):
            return at
        at = up


def _unite(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    while len(left):
        left, right = roots(parent, left), roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
