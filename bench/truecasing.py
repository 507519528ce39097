"""Precision and recall of truecasing on well-cased text (`bench.chat_data` prints them).

Every capital of well-written rows is taken away (sentence starts, the word I, names in sentences, words of headings), put
back with a lexicon learned from other rows (k folds by the prompt's hash), and compared word by word. What a place is, is
decided here from the original by rules of its own, not by the code that is measured.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zephyr_lite.recipe.lexicon import Lexicon, is_english
from zephyr_lite.recipe.truecase import is_broken, restore, spans

FOLDS = 5
_WORD = re.compile(r"[^\W\d_]+")
_ENDED = re.compile(r"[.!?][\"'”’)\]*_]*\s+[\"'“‘(\[*_]*$")
_INSIDE = re.compile(r"(?:[,;]? (?:\d[\d.,:]* )?|-|/|['’]|\.[ ]?|& | & |\) | \()")
_SENTENCE_LINE = re.compile(r"[.!?:;,…][\"'”’)*_]*\s*$")
# "name, known" is the part of "name" that at least three other dialogues write with a capital in a sentence
CATEGORIES = (
    "sentence start",
    "turn or line start",
    "I",
    "name",
    "name, known",
    "after a colon, quote or dash",
    "single letter",
    "heading or title",
)


@dataclass
class Score:
    """Counts of one measurement: per category how many capitals were taken and put back, per rule what was right."""

    taken: Counter[str] = field(default_factory=Counter)
    restored: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[str, Any]:
        def share(part: float, whole: float) -> float | None:
            return round(part / whole, 4) if whole else None

        right, wrong = sum(self.right.values()), sum(self.wrong.values())
        prose = [c for c in CATEGORIES if c not in ("single letter", "heading or title", "name, known")]
        return {
            "recall": {c: [share(self.restored[c], self.taken[c]), self.taken[c]] for c in CATEGORIES},
            "recall in sentences": share(sum(self.restored[c] for c in prose), sum(self.taken[c] for c in prose)),
            "precision": {
                rule: [
                    share(self.right[rule], self.right[rule] + self.wrong[rule]),
                    self.right[rule] + self.wrong[rule],
                ]
                for rule in sorted({*self.right, *self.wrong})
            },
            "precision overall": share(right, right + wrong),
        }


def dialogues(folder: Path) -> Iterator[list[dict[str, str]]]:
    """The conversations below a folder; of preference pairs the chosen one. Each prompt once."""
    seen = set()
    for file in sorted(folder.rglob("*.jsonl")):
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                turns = row["messages"] if row.get("messages") else row.get("chosen")
                if turns and turns[0]["content"] not in seen:
                    seen.add(turns[0]["content"])
                    yield turns


def well_cased(turns: list[dict[str, str]]) -> bool:
    """Whether a dialogue is English and its capitals can be taken for truth, by a test of its own."""
    text = "\n".join(turn["content"] for turn in turns)
    low = len(re.findall(r"[a-z]{2}[.!?] [a-z]", text)) + len(re.findall(r"(?<![\w.'])i(?: |'m|'ve|'d|'ll)", text))
    high = len(re.findall(r"[a-z]{2}[.!?] [A-Z]", text)) + len(re.findall(r"\bI\b", text))
    return is_english(text) and low * 20 <= high


def lowered(text: str) -> tuple[str, dict[int, str]]:
    """The text without its capitals, outside of what must not be touched.

    Returns:
        (text, start of each word that lost one → category).
    """
    inside = bytearray(len(text) + 1)
    for start, end, _ in spans(text):
        inside[start:end] = b"\1" * (end - start)
    parts, at, taken, last = [], 0, {}, 0
    heading: dict[int, bool] = {}
    for match in _WORD.finditer(text):
        start, end, word = match.start(), match.end(), match.group()
        gap, last = text[last:start], end
        if inside[start] or word == word.lower():
            continue
        parts += (text[at:start], word.lower())
        at = end
        if len(word) == 1 and word != "I" and start and not _ENDED.search(gap) and "\n" not in gap:
            taken[start] = "single letter"
        elif word == "I":
            taken[start] = "I"
        elif start == 0 or "\n" in gap or not text[:start].strip():
            taken[start] = "turn or line start"
        elif _ENDED.search(gap):
            taken[start] = "sentence start"
        else:
            line_start = text.rfind("\n", 0, start) + 1
            if line_start not in heading:
                line = text[line_start : (text.find("\n", start) + 1 or len(text) + 1) - 1]
                heading[line_start] = _is_heading(line)
            if heading[line_start]:
                taken[start] = "heading or title"
            else:
                taken[start] = "name" if _INSIDE.fullmatch(gap) else "after a colon, quote or dash"
    return "".join((*parts, text[at:])), taken


def _is_heading(line: str) -> bool:
    words = _WORD.findall(line)
    capitals = sum(word[0].isupper() for word in words)
    return not _SENTENCE_LINE.search(line) or capitals * 2 > len(words)


def measure(rows: Iterable[list[dict[str, str]]], folds: int = FOLDS) -> tuple[Score, dict[str, Any]]:
    """Take the capitals away and put them back.

    Returns:
        (score, what else was counted: dialogues, how many untouched ones are flagged, how many lowered ones, and
        how many words restoration would change in the untouched text).
    """
    kept = [turns for turns in rows if well_cased(turns)]
    fold = [int(hashlib.sha256(turns[0]["content"].encode()).hexdigest(), 16) % folds for turns in kept]
    score, flags = Score(), Counter[str]()
    for k in range(folds):
        others = [[t["content"] for t in turns if is_english(t["content"])] for turns, f in zip(kept, fold) if f != k]
        lexicon = learn(others)
        for turns in (turns for turns, f in zip(kept, fold) if f == k):
            for role in ("user", "assistant"):
                texts = [t["content"] for t in turns if t["role"] == role]
                if not texts:
                    continue
                flags["sides"] += 1
                flags["flagged, untouched"] += is_broken(texts)
                faulty = [fault(text) for text in texts]
                if faulty != texts:
                    flags["sides with the fault of UltraChat"] += 1
                    flagged = is_broken(faulty)
                    flags["flagged, with the fault of UltraChat"] += flagged
                    _end_to_end(texts, faulty, flagged, lexicon, flags)
            for turn in turns:
                if is_english(turn["content"]):
                    _compare(turn["content"], lexicon, score, flags)
    return score, {"dialogues": len(kept), **flags}


def _end_to_end(texts: list[str], faulty: list[str], flagged: bool, lexicon: Lexicon, flags: Counter[str]) -> None:
    """UltraChat's fault through detection and restoration: letters taken, put back, and changed wrongly."""
    for text, bad in zip(texts, faulty):
        back = restore(bad, lexicon)[0] if flagged else bad
        flags["fault: letters taken"] += sum(a != b for a, b in zip(text, bad))
        flags["fault: letters put back"] += sum(a != b and a == c for a, b, c in zip(text, bad, back))
        flags["fault: letters changed wrongly"] += sum(a == b != c for a, b, c in zip(text, bad, back))


def learn(dialogues: list[list[str]]) -> Lexicon:
    """The lexicon of some dialogues, as the command learns it."""
    lexicon = Lexicon()
    lexicon.learn("\n".join(turns) for turns in dialogues)
    return lexicon


def fault(text: str) -> str:
    """UltraChat's own fault: sentence starts after the first, and the word I, in lower case; names stay."""
    low, taken = lowered(text)
    first = min((m.start() for m in _WORD.finditer(text)), default=-1)
    parts = list(text)
    for start, category in taken.items():
        if category in ("I", "sentence start") and start != first:
            parts[start] = low[start]
    return "".join(parts)


def _compare(original: str, lexicon: Lexicon, score: Score, flags: Counter[str]) -> None:
    low, taken = lowered(original)
    if len(low) != len(original):  # a letter whose lower case is longer
        return
    back, changed = restore(low, lexicon)
    for start, rule, form in changed:
        ok = original[start : start + len(form)] == form
        (score.right if ok else score.wrong)[rule] += 1
    for start, category in taken.items():
        end = start
        while end < len(original) and original[end].isalpha():
            end += 1
        score.taken[category] += 1
        ok = back[start:end] == original[start:end]
        score.restored[category] += ok
        if category == "name" and lexicon.forms[original[start:end]] >= 3:
            score.taken["name, known"] += 1
            score.restored["name, known"] += ok
    flags["words changed in untouched text"] += len(restore(original, lexicon)[1])
    flags["words of untouched text"] += len(_WORD.findall(original))
