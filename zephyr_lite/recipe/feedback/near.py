"""Near-duplicates among short texts: MinHash signatures and locality-sensitive hashing (rensa)."""

from __future__ import annotations

import re
from itertools import pairwise

_PERMUTATIONS, _SEED = 128, 42
# Bands of four: of two texts whose signatures agree in 70 % at least one band is the same in 99.98 %.
_BANDS = 32
_WORD = re.compile(r"\w+")
_FEW_WORDS = 4


class Openings:
    """The texts that were taken; memory is a signature and the text's beginning for each.

    Args:
        similarity: Jaccard similarity, estimated from 128 hashes (± 0.04 at 0.7), from which a text is too near.
    """

    def __init__(self, similarity: float) -> None:
        from rensa import RMinHashDeduplicator

        self._index = RMinHashDeduplicator(
            threshold=similarity, num_perm=_PERMUTATIONS, use_lsh=True, num_bands=_BANDS, seed=_SEED
        )
        self._texts: list[str] = []

    def __len__(self) -> int:
        return len(self._texts)

    def take(self, text: str) -> str | None:
        """Take a text that is new, and return None; or return the earlier one that it is too near to."""
        from rensa import RMinHash

        signature = RMinHash(num_perm=_PERMUTATIONS, seed=_SEED)
        signature.update(sorted(shingles(text)))
        near = self._index.get_duplicates(signature)
        if near:
            return self._texts[min(int(key) for key in near)]
        self._index.add(str(len(self._texts)), signature)
        self._texts.append(text[:500])
        return None


def shingles(text: str) -> set[str]:
    """Words and pairs of words, without case; for a text of few words (or a script without spaces) runs of three
    characters."""
    words = _WORD.findall(text.lower())
    if len(words) >= _FEW_WORDS:
        return {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    joined = " ".join(words)
    return {joined[i : i + 3] for i in range(max(1, len(joined) - 2))}
