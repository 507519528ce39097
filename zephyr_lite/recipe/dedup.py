"""Equal, near-equal and contaminated texts, by the 64-bit hashes of their words and n-grams in numpy arrays.

A word is a run of ASCII letters and digits and of other scripts' characters; the case of A to Z is ignored.

Near duplicates: MinHash signatures of shingles; rows that share a band are compared (Broder, "On the resemblance and
containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3). Contamination: n
words in a row shared with an evaluation set (Brown et al., "Language models are few-shot learners", appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..config.load import DatasetSpec
from ..errors import UserError
from .prompts import open_rows, texts_of

# -- words and n-grams -----------------------------------------------------------------------------------------------

# punctuation outside of ASCII
SIGNS = re.compile("[‘’“”„«»‹›–—―…•·¡¿′″\u00a0\u2009\u200b\u3000、。，！？；：「」（）]")
_RNG = np.random.Generator(np.random.PCG64(20231025))
_VALUES = _RNG.integers(1, 2**63, 256, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # of a byte
_FACTORS = _RNG.integers(1, 2**63, 64, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # of a position, odd
_VALUES[ord("A") : ord("Z") + 1] = _VALUES[ord("a") : ord("z") + 1]
_IS_WORD = np.array([byte > 127 or chr(byte).isalnum() for byte in range(256)])


@dataclass(frozen=True)
class Words:
    """The words of a list of texts."""

    hashes: np.ndarray  # uint64 [words]
    offsets: np.ndarray  # int64 [texts + 1]: text i has the words offsets[i]:offsets[i + 1]
    starts: np.ndarray  # int64 [words]: where each word's bytes start in ``data``
    ends: np.ndarray
    data: np.ndarray  # uint8, the texts in UTF-8, each on a line, with ``SIGNS`` replaced by spaces

    def text(self, first: int, count: int) -> str:
        """``count`` words of one text, as they are written."""
        return bytes(self.data[self.starts[first] : self.ends[first + count - 1]]).decode("utf-8", "replace")

    def joined(self, groups: np.ndarray) -> Words:
        """The same words with texts groups[i]:groups[i + 1] as text i; groups: int64 [groups + 1]."""
        return replace(self, offsets=self.offsets[groups])


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
    """The n-grams within each text: (hashes uint64 [grams], index of each one's first word int64 [grams])"""
    count = max(0, len(words.hashes) - n + 1)
    text_of = np.repeat(np.arange(len(words.offsets) - 1), np.diff(words.offsets))
    first = np.flatnonzero(text_of[:count] == text_of[n - 1 :])
    sums = np.zeros(count, np.uint64)
    for k in range(n):
        sums += words.hashes[k : count + k] * _FACTORS[k]
    return mix(sums[first]), first


# -- duplicates ------------------------------------------------------------------------------------------------------

PERMUTATIONS, BANDS = 128, 16
SHINGLE = 5  # words
ROUNDS = 8  # in a bucket, rows are compared with the first; those that differ from it, with the first of them; …
_AT_ONCE = 50_000  # pairs of signatures
_RNG_SIGNATURES = np.random.Generator(np.random.PCG64(42))
_MULTIPLIERS = _RNG_SIGNATURES.integers(1, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_ADDENDS = _RNG_SIGNATURES.integers(0, 2**63, PERMUTATIONS, dtype=np.uint64)


def signatures(words: Words) -> np.ndarray:
    """MinHash signatures, uint16 [texts, 128], of shingles of five words; a text of fewer words is the set of its words."""
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
        least = np.minimum.reduceat(grams * _MULTIPLIERS[k] + _ADDENDS[k], starts)
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
    """For each row (int64 [all rows]) the first row of its group of near duplicates, or itself.

    Args:
        found: signatures, uint16 [all rows, 128].
        rows: int64, ascending; others stay alone.
        threshold: the similarity from which two rows are near duplicates.
    """
    parent = list(range(len(found)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

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
            parts = [slice(start, start + _AT_ONCE) for start in range(0, len(left), _AT_ONCE)]
            same = np.concatenate([similarity(found[left[p]], found[leaders[p]]) >= threshold for p in parts])
            for pair in zip(left[same].tolist(), leaders[same].tolist()):
                first, second = sorted(map(root, pair))
                parent[second] = first
            left = left[~same]
    return np.array([root(row) for row in range(len(parent))], np.int64)


# -- contamination ---------------------------------------------------------------------------------------------------

NGRAM = 13  # words
SHORTEST = 5  # words; a shorter text ("Yes.") is a label, or could be anywhere


@dataclass(frozen=True)
class EvalSets:
    """The texts of evaluation sets, which must not be trained on.

    A turn is contaminated if it shares n words in a row with one of them; a text of fewer words has to be a whole turn.
    """

    n: int
    rows: dict[str, int]  # of each set
    sets: dict[
        int | bytes, str
    ]  # hash of an n-gram, or the hashes of all words of a shorter text → the first set with it
    grams: np.ndarray  # uint64, the hashes of n-grams

    def find(self, words: Words) -> dict[int, tuple[str, str]]:
        """The contaminated texts: index → (the set's name, the shared words)."""
        found = {}
        for text, start, key in _short_texts(words, self.n):
            if key in self.sets:
                found[text] = self.sets[key], words.text(start, len(key) // 8)
        hashes, first = ngrams(words, self.n)
        for hit in np.flatnonzero(np.isin(hashes, self.grams)).tolist():
            text = int(np.searchsorted(words.offsets, first[hit], side="right")) - 1
            found.setdefault(text, (self.sets[int(hashes[hit])], words.text(int(first[hit]), self.n)))
        return found


def _short_texts(words: Words, n: int) -> Iterator[tuple[int, int, bytes]]:
    """(index, first word, hashes) of each text of ``SHORTEST`` to n - 1 words."""
    for text, (start, end) in enumerate(pairwise(words.offsets.tolist())):
        if SHORTEST <= end - start < n:
            yield text, start, words.hashes[start:end].tobytes()


def read_eval_sets(names: Sequence[str], n: int = NGRAM) -> EvalSets:
    """Read evaluation sets: files (JSONL, JSON, CSV, Parquet, or text with one item a line), folders, or hub ids.

    ``NAME#SPLIT`` is one split. All texts of a row count, except assistants' turns.
    """
    counts: dict[str, int] = {}
    sets: dict[int | bytes, str] = {}
    grams = [np.zeros(0, np.uint64)]
    for name in names:
        path, _, split = name.partition("#")
        rows = open_rows(DatasetSpec(path=path, split=split or None), f"--decontaminate {path}#{{}}")
        words = words_of([text for row in rows for text in texts_of(row)])
        grams.append(ngrams(words, n)[0])
        found: list[int | bytes] = [*grams[-1].tolist(), *(key for _, _, key in _short_texts(words, n))]
        if not found:
            raise UserError(
                f"{name}: no text of {SHORTEST} words or more in its {len(rows):,} rows; nothing can be compared with it.",
                "Name a file with the questions.",
            )
        counts[name] = len(rows)
        for key in found:
            sets.setdefault(key, name)
    return EvalSets(n, counts, sets, np.unique(np.concatenate(grams)))
