"""How words are written in the middle of a sentence, learned from text whose capitals can be trusted.

For each word the number of dialogues in which it stands in the middle of a sentence with a capital, by form, and in lower
case; for each pair of neighbours that is written with two capitals somewhere ("White House") how often it is, and how
often the pair stands there at all. Counted by dialogue: a title repeated ten times in one story is one vote.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...rundir import write_text
from .english import ALWAYS
from .words import Words, members, ngrams, words_of

FORMAT = "zephyr-lite lexicon 1"
# A word is a name where (with capital + ½) / (all + PRIOR) reaches this: 3 of 3, 11 of 12, never 2 of 2.
_NAME, _PRIOR = 0.75, 1.5
_PAIR, _PAIR_TIMES = 0.6, 2
# Beyond so many entries the rarest are forgotten, which bounds the memory of any corpus.
LIMIT = 2_000_000

# Runs of words with single spaces or commas between them; all but a run's first word stand inside a sentence.
_RUN = re.compile(r"[^\W\d_]+(?:,? [^\W\d_]+)+")
_CAPITAL_CHAIN = re.compile(r"[A-ZÀ-ÖØ-Þ][^\W\d_]*(?: [A-ZÀ-ÖØ-Þ][^\W\d_]*)+")
_LEAST_WORDS = 3  # shorter runs are headings as often as sentences


@dataclass
class Lexicon:
    """What was counted.

    Attributes:
        forms: a word as it is written in the middle of a sentence → in how many dialogues.
        pairs: two neighbours, both with capitals, joined by a space → in how many dialogues.
        both: the same neighbours in lower case → how often they stand there in any case.
    """

    forms: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    both: Counter[str] = field(default_factory=Counter)
    _names: dict[str, str] | None = None
    _phrases: dict[str, str] | None = None

    def learn(self, turns: Iterable[str]) -> None:
        """Count one well-cased dialogue."""
        words: set[str] = set()
        inside = []
        for turn in turns:
            for run in _RUN.findall(turn):
                rest = run.split(" ", 1)[1]
                if rest.count(" ") < _LEAST_WORDS - 1:
                    continue
                own = rest.replace(",", "").split(" ")
                if 2 * sum(map(str.islower, own)) >= len(own):  # no heading, no shouting
                    words.update(own)
                    inside.append(rest)
        self.forms.update(words)
        pairs: set[str] = set()
        for chain in _CAPITAL_CHAIN.findall("\n".join(inside)):
            own = chain.split(" ")
            pairs.update(map(" ".join, pairwise(own)))
        self.pairs.update(pairs)
        self._names = None

    def learn_pairs_in_any_case(self, words: Words, trusted: np.ndarray | None = None) -> None:
        """Count in how many dialogues each pair found so far stands in whatever case.

        Args:
            words: of the dialogues, each taken as one text.
            trusted: bool [dialogues], those to count in; None for all.
        """
        wanted = sorted({pair.lower() for pair in self.pairs})
        grams, first = ngrams(words, 2)
        keys, _ = ngrams(words_of(wanted), 2)
        if len(keys) != len(wanted):
            raise AssertionError("a pair that is not two words")
        order = np.argsort(keys)
        hits = members(grams, keys[order])
        which = order[np.searchsorted(keys[order], grams[hits])]
        dialogue = np.searchsorted(words.offsets, first[hits], side="right") - 1
        if trusted is not None:
            which, dialogue = which[trusted[dialogue]], dialogue[trusted[dialogue]]
        # once for each dialogue
        once = np.unique(dialogue * len(wanted) + which) % max(len(wanted), 1)
        for index, count in zip(*(found.tolist() for found in np.unique(once, return_counts=True))):
            self.both[wanted[index]] += count

    def merge(self, other: Lexicon) -> None:
        """Add another's counts; beyond ``LIMIT`` entries the rarest are forgotten."""
        for mine, theirs in ((self.forms, other.forms), (self.pairs, other.pairs), (self.both, other.both)):
            mine.update(theirs)
            least = 1
            while len(mine) > LIMIT:
                for key in [key for key, count in mine.items() if count <= least]:
                    del mine[key]
                least += 1
        self._names = None

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
        return cls(*(Counter(value[name]) for name in ("forms", "pairs", "both")))

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
