"""Exact and near duplicates: MinHash signatures, and rows that share a band of them compared.

Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman, "Mining of Massive
Datasets", chapter 3.
"""

from __future__ import annotations

import numpy as np

from .words import Words, mix, ngrams

PERMUTATIONS, BANDS = 128, 16
SHINGLE = 5  # words
ROUNDS = 8  # in a bucket, rows are compared with the first; those that differ from it, with the first of them; …
_AT_ONCE = 50_000  # pairs of signatures
_RNG = np.random.Generator(np.random.PCG64(42))
_FACTORS = _RNG.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _RNG.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)


def signatures(words: Words) -> np.ndarray:
    """MinHash signatures of texts, of shingles of five words; a text of fewer words is the set of its words.

    Returns:
        uint16 [texts, 128]: 16 bits of each minimum; zeros for a text without words.
    """
    grams, first = ngrams(words, SHINGLE)
    lengths = np.diff(words.offsets)
    text_of = np.repeat(np.arange(len(lengths)), lengths)
    short = np.flatnonzero(lengths[text_of] < SHINGLE)  # words of short texts
    texts = np.concatenate([text_of[first], text_of[short]])
    order = np.argsort(texts, kind="stable")
    grams = np.concatenate([grams, words.hashes[short]])[order]
    full, starts = np.unique(texts[order], return_index=True)
    found = np.zeros((len(lengths), PERMUTATIONS), np.uint16)
    for k in range(PERMUTATIONS if len(full) else 0):
        least = np.minimum.reduceat(grams * _FACTORS[k] + _TERMS[k], starts)
        found[full, k] = (least >> np.uint64(20)).astype(np.uint16)
    return found


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The estimated Jaccard similarity of signatures uint16 [..., 128]: the share of equal places."""
    return (left == right).mean(axis=-1)


def first_of_equal(keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each of the rows (int64, ascending) the first of them with the same key."""
    _, first, which = np.unique(keys[rows], return_index=True, return_inverse=True)
    return rows[first[which]]


def join_near(found: np.ndarray, rows: np.ndarray, threshold: float) -> np.ndarray:
    """The groups of near duplicates among some rows.

    Args:
        found: signatures, uint16 [all rows, 128].
        rows: int64, ascending.
        threshold: the similarity from which two rows are near duplicates.

    Returns:
        int64 [all rows]: the first row of each row's group; of a row without near duplicates itself.
    """
    parent = np.arange(len(found))
    width = PERMUTATIONS // BANDS
    for band in range(BANDS):
        keys = np.zeros(len(found), np.uint64)
        for k in range(band * width, (band + 1) * width):
            keys = mix(keys + found[:, k].astype(np.uint64) + np.uint64(k + 1))
        left = rows
        for _ in range(ROUNDS):
            leaders = first_of_equal(keys, left)
            other = left != leaders
            left, leaders = left[other], leaders[other]
            if not len(left):
                break
            parts = [slice(s, s + _AT_ONCE) for s in range(0, len(left), _AT_ONCE)]
            same = np.concatenate([similarity(found[left[p]], found[leaders[p]]) >= threshold for p in parts])
            _unite(parent, left[same], leaders[same])
            left = left[~same]
    return _roots(parent, np.arange(len(parent)))


def _roots(parent: np.ndarray, rows: np.ndarray) -> np.ndarray:
    at = parent[rows]
    while not np.array_equal(parent[at], at):
        at = parent[at]
    return at


def _unite(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    while len(left):
        left, right = _roots(parent, left), _roots(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right))
