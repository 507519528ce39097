"""How words are written in the middle of a sentence, learned from text with correct capitals; and whether a text is English.

For each word, the number of dialogues that write it with a capital in the middle of a sentence, by form, and in lower
case; for each pair of neighbors with two capitals ("White House"), in how many dialogues it occurs so, and in any case. A
dialogue counts once: a title repeated ten times in one story is one vote.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.atomic import write_text
from ..io.text import read_object
from .dedup import SIGNS

FORMAT = "zephyr-lite lexicon 1"
WORDS = {key: text.split() for key, text in read_yaml(Path(__file__).with_name("words.yaml")).items()}
# a word is a name if (with capital + ½) / (all + _PRIOR) reaches _NAME: 3 of 3, 11 of 12, not 2 of 2
_NAME, _PRIOR = 0.75, 1.5
_PAIR, _PAIR_TIMES = 0.6, 2
_WORD = re.compile(r"[0-9A-Za-z\x80-\U0010ffff]+")
# what separates two runs of words: anything but a space, or a comma and a space
_BREAK = re.compile(r"(?!,? [0-9A-Za-z\x80-\U0010ffff])[^0-9A-Za-z\x80-\U0010ffff]+")
_CAPITAL = re.compile(r"[A-Z]")
_CAPITAL_WORD = re.compile(r"[^A-Z ]*[A-Z][^ ]*")
_LEAST_WORDS = 3  # a shorter run may be a heading


# -- English ------------------------------------------------------------------------------------------------------------


_ENGLISH, _FOREIGN = frozenset(WORDS["english"]), frozenset(WORDS["foreign"])
_LOOK = 500  # characters
_LETTERS = re.compile(r"[^\W\d_]+")
_NOT_LATIN = re.compile(r"[^\W\d_a-zA-ZÀ-ɏḀ-ỿ]")


def is_english(text: str) -> bool:
    """Whether a text has more function words of English than of other languages.

    With equally many ("ok. thanks") a text is English if it is ASCII; with more than a twentieth of its characters in another
    script it is not.
    """
    if not text.isascii() and len(_NOT_LATIN.findall(text)) * 20 > len(text):
        return False
    words = _LETTERS.findall(text[:_LOOK].lower())
    ours = sum(word in _ENGLISH for word in words)
    theirs = sum(word in _FOREIGN for word in words)
    if ours == theirs:
        return text.isascii()
    return ours > theirs


# lower case → form; the lexicon adds the names of the corpus
ALWAYS = {word: word.capitalize() for word in WORDS["names"]} | {word.lower(): word for word in WORDS["written"]}


# -- the lexicon --------------------------------------------------------------------------------------------------------


@dataclass
class Lexicon:
    """Numbers of dialogues with a word or pair, and the names decided by them."""

    forms: Counter[str] = field(default_factory=Counter)  # a word as it is written in the middle of a sentence
    pairs: Counter[str] = field(default_factory=Counter)  # two neighbors with capitals, joined by a space
    both: Counter[str] = field(default_factory=Counter)  # the same in lower case, written in any case

    def add(self, other: Lexicon) -> None:
        """Add the counts of another lexicon."""
        self.forms.update(other.forms)
        self.pairs.update(other.pairs)
        self.both.update(other.both)

    def learn(self, dialogues: Iterable[str]) -> None:
        """Add the counts of some dialogues.

        A word is inside a sentence if a space, or a comma and a space, separates it from the word before. Runs of fewer than
        four words, and runs of mostly capitals, are skipped: they may be headings. Of pairs in lower case, those are counted that
        one of these dialogues writes with capitals.
        """
        pairs: Counter[str] = Counter()
        spellings: list[list[str]] = []
        for text in dialogues:
            text = SIGNS.sub(" ", text)
            own_forms: set[str] = set()
            own_pairs: dict[str, str] = {}
            for run in _BREAK.split(text):
                rest = run.partition(" ")[2]
                words = rest.split(" ")
                lower = rest.islower()  # the most frequent case
                if len(words) < _LEAST_WORDS or (not lower and len(_CAPITAL_WORD.findall(rest)) * 2 > len(words)):
                    continue
                own_forms.update(words)
                for before, word in () if lower else pairwise(words):
                    if "A" <= before[0] <= "Z" and "A" <= word[0] <= "Z" and before[-1] != ",":
                        pair = f"{before} {word.rstrip(',')}"
                        own_pairs.setdefault(pair.lower(), pair)
            self.forms.update({word.rstrip(",") for word in own_forms if not "0" <= word[0] <= "9"})
            pairs.update(own_pairs.values())
            spellings.append(_WORD.findall(text.lower()))
        self.pairs.update(pairs)
        wanted = {tuple(pair.lower().split(" ")) for pair in pairs}
        for words in spellings:
            self.both.update(" ".join(pair) for pair in wanted.intersection(pairwise(words)))

    @cached_property
    def names(self) -> dict[str, str]:
        """Lower case → the form of every word that is a name by the counts, or by ``ALWAYS``."""
        names = dict(ALWAYS)
        for lower, (often, form) in _capitalized(self.forms).items():
            total = often + self.forms[lower]
            if (often + 0.5) / (total + _PRIOR) >= _NAME and len(lower) > 1:
                names[lower] = form
            elif total >= 4 and often * 2 < total:
                names.pop(lower, None)  # the corpus overrules the list
        return names

    @cached_property
    def phrases(self) -> dict[str, str]:
        """Lower-case pair → its form, for pairs such as "White House"."""
        return {
            lower: pair
            for lower, (often, pair) in _capitalized(self.pairs).items()
            if often >= _PAIR_TIMES and (often + 0.5) / (max(often, self.both[lower]) + 1) >= _PAIR
        }

    @cached_property
    def words(self) -> frozenset[str]:
        """Every lower-case word of the names and phrases."""
        return frozenset(self.names).union(*(pair.split(" ") for pair in self.phrases))

    def save(self, path: Path) -> None:
        """Write the counts as JSON, sorted, without words that are never written with a capital."""
        names = {form.lower() for form in self.forms if _CAPITAL.search(form)}
        forms = {form: count for form, count in self.forms.items() if form in names or _CAPITAL.search(form)}
        counts = {"forms": forms, "pairs": self.pairs, "both": self.both}
        value = {"format": FORMAT, **{name: dict(sorted(found.items())) for name, found in counts.items()}}
        write_text(path, json.dumps(value, ensure_ascii=False, indent=0, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: Path) -> Lexicon:
        """Read a file written by ``save``."""
        hint = "Name a lexicon.txt of an earlier run."
        value = read_object(path, hint=hint)
        if value.get("format") != FORMAT:
            raise UserError(f"{path}: not a lexicon ({FORMAT!r}).", hint)
        return cls(Counter(value["forms"]), Counter(value["pairs"]), Counter(value["both"]))


def _capitalized(counts: Counter[str]) -> dict[str, tuple[int, str]]:
    """Lower case → (how often it is written with a capital, the most frequent of these forms)."""
    often: Counter[str] = Counter()
    best: dict[str, tuple[int, str]] = {}
    for form, count in counts.items():
        if _CAPITAL.search(form):
            lower = form.lower()
            often[lower] += count
            best[lower] = max(best.get(lower, (0, "")), (count, form))
    return {lower: (often[lower], form) for lower, (_, form) in best.items()}
