"""What the cleaning did, as counts with places and examples: report.md, report.json and dropped.tsv."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .casing_rules import CASING_RULES
from .duplicates import EXACT, FAULTY, KEPT, NEAR, Fates
from .protect import PROTECT_RULES
from .raw import Raw
from .refusals import REFUSAL_RULES
from .write import EXAMPLES, Restored

EXACT_REASON, NEAR_REASON = "an exact duplicate", "a near duplicate"
_BATCH = 100_000
_PLACES = 5  # places that the report names for a reason; dropped.tsv has all


@dataclass
class ChatReport:
    """What became of the rows.

    Attributes:
        rows, kept: read, and left.
        dropped: reason → how many rows.
        cut: rule → how many dialogues that stay were cut before a refusal.
        places: reason or rule → (row, detail), the first few.
        broken: how many dialogues that stay had broken capitals.
        restored: what truecasing changed.
        names: how many names the lexicon knows.
        splits: name → rows.
        files: written.
        eval_sets: name → rows of it.
    """

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
    eval_sets: dict[str, int] = field(default_factory=dict)

    def reasons(self) -> str:
        """``an exact duplicate: 12; no assistant turn: 3``."""
        return "; ".join(f"{reason}: {count:,}" for reason, count in _by_count(self.dropped)) or "none was dropped"

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [
            f"{self.kept:,} of {self.rows:,} rows stay: " + ", ".join(f"{n} {c:,}" for n, c in self.splits.items())
        ]
        lines += [f"  dropped: {reason}: {count:,}" for reason, count in _by_count(self.dropped)]
        lines += [f"  cut before a refusal ({rule}): {count:,}" for rule, count in _by_count(self.cut)]
        if self.broken:
            words = ", ".join(f"{rule} {count:,}" for rule, count in _by_count(self.restored.words))
            lines.append(f"  capitals restored in {self.restored.dialogues:,} dialogues: {words or 'nothing'}")
        return lines

    def as_dict(self, raw: Raw) -> dict[str, Any]:
        """For report.json."""
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
                reason: [{"place": raw.place(index), "detail": detail} for index, detail in found]
                for reason, found in self.places.items()
            },
            "examples": {
                rule: [{"place": raw.place(i), "before": before, "after": after} for i, before, after in found]
                for rule, found in self.restored.examples.items()
            },
        }


def account(raw: Raw, scanned: datasets.Dataset, fates: Fates, dropped: Path) -> ChatReport:
    """Count, and write each dropped or shortened row's reason, place and detail to a file, a line each."""
    report = ChatReport(rows=len(scanned))
    columns = scanned.select_columns(["fault", "detail", "refusal", "broken"]).with_format("arrow")
    with dropped.open("w", encoding="utf-8") as file:
        file.write("reason\tplace\tdetail\n")
        for start in range(0, report.rows, _BATCH):
            table = columns[start : start + _BATCH]
            fate = np.asarray(fates.fate[start : start + _BATCH])
            cut = np.array(table["refusal"].to_pylist(), dtype=object) != ""
            report.kept += int((fate == KEPT).sum())
            report.broken += int(((fate == KEPT) & (table["broken"].to_numpy() > 0)).sum())
            for offset in np.flatnonzero((fate != KEPT) | cut).tolist():
                index, what = start + offset, int(fate[offset])
                detail = table["detail"][offset].as_py()
                if what == KEPT:
                    rule = table["refusal"][offset].as_py()
                    reason = f"cut before a refusal ({rule}); the rest stays"
                    report.cut[rule] += 1
                elif what == FAULTY:
                    reason = table["fault"][offset].as_py()
                else:
                    reason = {EXACT: EXACT_REASON, NEAR: NEAR_REASON}[what]
                    detail = f"of {raw.place(int(fates.of[index]))}"
                if what != KEPT:
                    report.dropped[reason] += 1
                places = report.places.setdefault(reason, [])
                if len(places) < _PLACES:
                    places.append((index, detail))
                file.write(f"{reason}\t{raw.place(index)}\t{' '.join(detail.split())}\n")
    return report


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def markdown(report: ChatReport, raw: Raw) -> str:
    """The report for people."""
    restored = report.restored
    lines = ["# Cleaned conversations", "", f"Read as {raw.kind}: {', '.join(raw.labels)}.", ""]
    lines += ["| | rows |", "|---|---|", f"| read | {report.rows:,} |"]
    lines += [f"| dropped: {_cell(reason)} | {count:,} |" for reason, count in _by_count(report.dropped)]
    lines += [f"| {name} | {count:,} |" for name, count in report.splits.items()]
    lines += [
        "",
        f"{restored.turns:,} turns stay. dropped.tsv names the place of every row that was dropped or cut.",
        "",
    ]
    if report.eval_sets:
        names = ", ".join(f"{name} ({rows:,} rows)" for name, rows in report.eval_sets.items())
        lines += [f"Decontaminated against {names}.", ""]
    lines += ["## Refusals out of habit", "", "| rule | what it is | cut | dropped whole |", "|---|---|---|---|"]
    for rule in REFUSAL_RULES:
        whole = report.dropped[f"begins with a refusal ({rule.name})"]
        lines.append(f"| {rule.name} | {_cell(rule.does)} | {report.cut[rule.name]:,} | {whole:,} |")
    lines += ["", "## Capitals", ""]
    lines.append(
        f"{report.broken:,} dialogues had broken capitals; {restored.dialogues:,} were changed. "
        f"The lexicon knows {report.names:,} names."
    )
    lines += ["", "| rule | what it does | words |", "|---|---|---|"]
    lines += [f"| {rule.name} | {_cell(rule.does)} | {restored.words[rule.name]:,} |" for rule in CASING_RULES]
    lines += [
        "",
        "Untouched: " + "; ".join(f"{rule.name} ({rule.does.split(':')[0]})" for rule in PROTECT_RULES) + ".",
        "",
    ]
    lines += ["## Examples", ""]
    for name, found in restored.examples.items():
        lines += [f"**{name}**", ""]
        for index, before, after in found[:EXAMPLES]:
            lines += [f"- {raw.place(index)}", f"  - before: {_code(before)}", f"  - after: {_code(after)}"]
        lines.append("")
    for reason, places in report.places.items():
        lines += [f"**{_cell(reason)}**", ""]
        lines += [f"- {raw.place(index)}" + (f": {_code(detail)}" if detail else "") for index, detail in places]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    ticks = "``" if "`" in text else "`"
    return f"{ticks} {' '.join(text.split())} {ticks}" if ticks == "``" else f"`{' '.join(text.split())}`"
