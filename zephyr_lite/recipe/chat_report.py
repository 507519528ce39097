"""Counts, places and examples of the cleaning: report.md, report.json and dropped.tsv."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa

from .protect import KINDS
from .raw_chat import Raw
from .refusals import REFUSALS
from .truecase import RULES

KEPT, FAULTY, EXACT, NEAR = 0, 1, 2, 3  # what becomes of a row
_REASONS = {EXACT: "an exact duplicate", NEAR: "a near duplicate"}
_PLACES = 5  # of a reason in the report; dropped.tsv has all
_EXAMPLES = 3  # of a rule


@dataclass
class Restored:
    """Changes of truecasing.

    Attributes:
        turns: written; dialogues: changed.
        words: rule → words changed.
        examples: rule → (row, before, after), the first few.
    """

    turns: int = 0
    dialogues: int = 0
    words: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)

    def change(self, rule: str, row: int, before: str, after: str) -> None:
        self.words[rule] += 1
        examples = self.examples.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append((row, before, after))

    def add(self, other: Restored) -> None:
        self.turns += other.turns
        self.dialogues += other.dialogues
        self.words.update(other.words)
        for rule, found in other.examples.items():
            self.examples[rule] = (self.examples.get(rule, []) + found)[:_EXAMPLES]


@dataclass
class ChatReport:
    """The result of the cleaning.

    Attributes:
        raw: what was read.
        eval_sets: name → rows of it.
        rows, kept: read, and kept.
        dropped: reason → rows; cut: rule → dialogues that were cut before a refusal and kept.
        places: reason → (row, detail), the first few.
        broken: kept dialogues with broken capitals; restored: what truecasing changed.
        names: in the lexicon.
        splits: name → rows; files: written.
    """

    raw: Raw
    eval_sets: dict[str, int] = field(default_factory=dict)
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    broken: int = 0
    restored: Restored = field(default_factory=Restored)
    names: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def count(self, scanned: pa.Table, fate: np.ndarray, duplicate_of: np.ndarray, dropped: Path) -> None:
        """Count the fates of the rows, and write reason, place and detail of each that is dropped or cut to a file.

        Args:
            scanned, fate, duplicate_of: of ``ultrachat``.
        """
        self.rows, self.kept = len(fate), int((fate == KEPT).sum())
        self.broken = int(((fate == KEPT) & (scanned["broken"].to_numpy() > 0)).sum())
        refusals = np.array(scanned["refusal"].to_pylist(), object)
        rows = np.flatnonzero((fate != KEPT) | (refusals != ""))
        found = scanned.select(["fault", "detail", "refusal"]).take(pa.array(rows)).to_pylist()
        with dropped.open("w", encoding="utf-8") as file:
            file.write("reason\tplace\tdetail\n")
            for row, values in zip(rows.tolist(), found):
                reason, detail = values["fault"], values["detail"]
                if fate[row] == KEPT:
                    self.cut[values["refusal"]] += 1
                    reason = f"cut before a refusal ({values['refusal']}); the rest stays"
                elif fate[row] != FAULTY:
                    reason, detail = _REASONS[fate[row]], f"of {self.raw.place(int(duplicate_of[row]))}"
                if fate[row] != KEPT:
                    self.dropped[reason] += 1
                places = self.places.setdefault(reason, [])
                if len(places) < _PLACES:
                    places.append((row, detail))
                file.write(f"{reason}\t{self.raw.place(row)}\t{' '.join(detail.split())}\n")

    def reasons(self) -> str:
        """``an exact duplicate: 12; no assistant turn: 3``."""
        return "; ".join(f"{reason}: {count:,}" for reason, count in _by_count(self.dropped)) or "none was dropped"

    def lines(self) -> list[str]:
        """For the terminal."""
        splits = ", ".join(f"{name} {count:,}" for name, count in self.splits.items())
        lines = [f"{self.kept:,} of {self.rows:,} rows stay: {splits}"]
        lines += [f"  dropped: {reason}: {count:,}" for reason, count in _by_count(self.dropped)]
        lines += [f"  cut before a refusal ({rule}): {count:,}" for rule, count in _by_count(self.cut)]
        if self.broken:
            words = ", ".join(f"{rule} {count:,}" for rule, count in _by_count(self.restored.words))
            lines.append(f"  capitals restored in {self.restored.dialogues:,} dialogues: {words or 'nothing'}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """For report.json."""
        place = self.raw.place
        return {
            "rows": self.rows,
            "kept": self.kept,
            "splits": self.splits,
            "files": self.files,
            "dropped": dict(_by_count(self.dropped)),
            "cut": dict(_by_count(self.cut)),
            "broken_capitals": self.broken,
            "restored": {"dialogues": self.restored.dialogues, "words": dict(_by_count(self.restored.words))},
            "turns": self.restored.turns,
            "names_in_lexicon": self.names,
            "eval_sets": self.eval_sets,
            "places": {
                reason: [{"place": place(row), "detail": detail} for row, detail in found]
                for reason, found in self.places.items()
            },
            "examples": {
                rule: [{"place": place(row), "before": before, "after": after} for row, before, after in found]
                for rule, found in self.restored.examples.items()
            },
        }


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def markdown(report: ChatReport) -> str:
    """report.md."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__, ""))
    environment.filters |= {
        "by_count": _by_count,
        "cell": lambda text: text.replace("|", "\\|").replace("\n", " "),
        "code": _code,
        "number": lambda value: f"{value:,}",
    }
    template = environment.get_template("chat_report.md.j2")
    return template.render(report=report, refusals=REFUSALS, rules=RULES, kinds=KINDS) + "\n"


def _code(text: str) -> str:
    text = " ".join(text.split())
    return f"`` {text} ``" if "`" in text else f"`{text}`"
