"""How words are written in the middle of a sentence, learned from text whose capitals can be trusted.

For each word the number of dialogues in which it stands in the middle of a sentence with a capital, by form, and in lower
case; for each pair of neighbours that is written with two capitals somewhere ("White House") how often it is, and how
often the pair stands there at all. Counted by dialogue: a title repeated ten times in one story is one vote.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...io.run_dir import write_text
from .counting import WordCounts
from .english import ALWAYS
from .words import words_of

FORMAT = "zephyr-lite lexicon 1"
# A word is a name where (with capital + ½) / (all + PRIOR) reaches this: 3 of 3, 11 of 12, never 2 of 2.
_NAME, _PRIOR = 0.75, 1.5
_PAIR, _PAIR_TIMES = 0.6, 2
# Beyond so many entries the rarest are forgotten, which bounds the memory of any corpus.
LIMIT = 1_000_000
_WAITING = 250_000  # hashes that wait to be added up


@dataclass
class Lexicon:
    """What was counted, and what is decided by it.

    Attributes:
        forms: a word as it is written in the middle of a sentence → in how many dialogues.
        pairs: two neighbours, both with capitals, joined by a space → in how many dialogues.
        both: the same neighbours in lower case → in how many dialogues they stand in any case.
    """

    forms: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    both: Counter[str] = field(default_factory=Counter)
    _names: dict[str, str] | None = None
    _phrases: dict[str, str] | None = None
    _words: frozenset[str] | None = None

    @classmethod
    def of(cls, counts: Iterable[WordCounts]) -> Lexicon:
        """The lexicon of a corpus from the counts of its blocks, added up in their order.

        Beyond ``LIMIT`` entries of a kind the rarest are forgotten, which bounds the memory for any corpus. Of words in
        lower case only those are kept that have a form with a capital as well.
        """
        found = cls()
        lower: list[np.ndarray] = []
        waiting = 0
        for block in counts:
            for mine, theirs in ((found.forms, block.forms), (found.pairs, block.pairs), (found.both, block.both)):
                mine.update(theirs)
                _prune(mine)
            lower.append(np.stack((block.lower, block.times.astype(np.uint64))))
            waiting += len(block.lower)
            if waiting > _WAITING:
                lower = [_added(lower)]
                waiting = 0
        if lower and found.forms:
            hashes, times = _added(lower)
            written = sorted({form.lower() for form in found.forms})
            keys = words_of(written)
            single = np.diff(keys.offsets) == 1
            own = keys.hashes[keys.offsets[:-1][single]]
            place = np.minimum(np.searchsorted(hashes, own), len(hashes) - 1)
            for word, count in zip(np.array(written, object)[single], np.where(hashes[place] == own, times[place], 0)):
                if count:
                    found.forms[word] += int(count)
        return found

    def names(self) -> dict[str, str]:
        """Lower case → the form in which a word is written wherever it stands; only what is a name by the counts."""
        if self._names is None:
            self._decide()
        assert self._names is not None
        return self._names

    def phrases(self) -> dict[str, str]:
        """Lower-case pair → its form, for pairs such as "White House"."""
        if self._phrases is None or self._names is None:
            self._decide()
        assert self._phrases is not None
        return self._phrases

    def words(self) -> frozenset[str]:
        """Every lower-case word that is a name or a part of a phrase."""
        if self._words is None:
            self._words = frozenset(self.names()).union(*(pair.split(" ") for pair in self.phrases()))
        return self._words

    def decided(self) -> Lexicon:
        """The names and phrases alone, without the counts: what other processes need."""
        return Lexicon(_names=self.names(), _phrases=self.phrases())

    def _decide(self) -> None:
        total: Counter[str] = Counter()
        best: dict[str, tuple[int, str]] = {}
        capital: Counter[str] = Counter()
        for form, count in self.forms.items():
            lower = form.lower()
            total[lower] += count
            if form != lower:
                capital[lower] += count
                best[lower] = max(best.get(lower, (0, "")), (count, form))
        names = dict(ALWAYS)
        for lower, (_, form) in best.items():
            if (capital[lower] + 0.5) / (total[lower] + _PRIOR) >= _NAME and len(lower) > 1:
                names[lower] = form
            elif lower in names and total[lower] >= 4 and capital[lower] * 2 < total[lower]:
                del names[lower]  # the corpus knows better
        self._names = names
        written: dict[str, tuple[int, str]] = {}
        times: Counter[str] = Counter()
        for pair, count in self.pairs.items():
            lower = pair.lower()
            times[lower] += count
            written[lower] = max(written.get(lower, (0, "")), (count, pair))
        self._phrases = {
            lower: pair
            for lower, (_, pair) in written.items()
            if times[lower] >= _PAIR_TIMES and (times[lower] + 0.5) / (max(times[lower], self.both[lower]) + 1) >= _PAIR
        }

    # -- files -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Counts as JSON, sorted, so that equal lexicons are equal files."""
        return {
            "format": FORMAT,
            **{name: dict(sorted(getattr(self, name).items())) for name in ("forms", "pairs", "both")},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Lexicon:
        return cls(Counter(value["forms"]), Counter(value["pairs"]), Counter(value["both"]))

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(self.to_json(), ensure_ascii=False, indent=0, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """A lexicon from a file that ``save`` wrote.

        Raises:
            UserError: the file cannot be read, or holds something else.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read: {error.strerror}.", "Name a lexicon.txt of an earlier run."
            ) from None
        except ValueError as error:
            raise UserError(f"{path}: not a lexicon: {error}.", "Name a lexicon.txt of an earlier run.") from None
        counts = value if isinstance(value, dict) else {}
        right = counts.get("format") == FORMAT and all(
            isinstance(counts.get(name), dict) and all(isinstance(n, int) for n in counts[name].values())
            for name in ("forms", "pairs", "both")
        )
        if not right:
            raise UserError(
                f"{path}: not a lexicon of this version ({FORMAT!r}).", "Name a lexicon.txt of an earlier run."
            )
        return cls.from_json(counts)


def _prune(counts: Counter[str]) -> None:
    least = 1
    while len(counts) > LIMIT:
        for key in [key for key, count in counts.items() if count <= least]:
            del counts[key]
        least += 1


def _added(parts: list[np.ndarray]) -> np.ndarray:
    """Counts by hash, uint64 [2, words], added up and sorted; the rarest are forgotten beyond ``LIMIT``."""
    both = np.concatenate(parts, axis=1)
    hashes, which = np.unique(both[0], return_inverse=True)
    times = np.zeros(len(hashes), np.uint64)
    np.add.at(times, which, both[1])
    least = 1
    while len(hashes) > LIMIT:
        hashes, times = hashes[times > least], times[times > least]
        least += 1
    return np.stack((hashes, times))
