"""The result of an audit: one finding a question, with its evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from functools import partialmethod
from typing import Any


class Level(IntEnum):
    """Severity of a finding; the verdict is that of the worst."""

    right = 0
    note = 1
    doubtful = 2
    wrong = 3


@dataclass(frozen=True)
class Finding:
    """The answer to one question.

    Attributes:
        topic: weights, base, below, reference, bos, end or template.
        evidence: numbers and files that it follows from.
        advice: what to do.
    """

    topic: str
    level: Level
    text: str
    evidence: tuple[str, ...] = ()
    advice: str = ""


@dataclass
class Audit:
    """All findings on an adapter.

    Attributes:
        adapter: its folder; tool: the program that wrote it; method: sft, dpo, or None if unknown.
        numbers: measurements, for the JSON.
    """

    adapter: str
    tool: str
    method: str | None
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, level: Level, topic: str, text: str, *evidence: str, advice: str = "") -> None:
        self.findings.append(Finding(topic, level, text, evidence, advice))

    right = partialmethod(add, Level.right)
    note = partialmethod(add, Level.note)
    doubtful = partialmethod(add, Level.doubtful)
    wrong = partialmethod(add, Level.wrong)

    @property
    def level(self) -> Level:
        return max((finding.level for finding in self.findings), default=Level.right)

    def verdict(self) -> str:
        """One line."""
        topics = ", ".join(dict.fromkeys(f.topic for f in self.findings if f.level == self.level))
        return {Level.wrong: f"WRONG ({topics})", Level.doubtful: f"doubtful ({topics})"}.get(self.level, "sound")

    def as_dict(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "tool": self.tool,
            "method": self.method,
            "verdict": self.verdict(),
            "findings": [{**asdict(f), "level": f.level.name} for f in self.findings],
            "numbers": self.numbers,
        }
