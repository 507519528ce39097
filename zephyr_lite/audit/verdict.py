"""What an audit found: one finding a question, each with its evidence."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any


class Level(IntEnum):
    """How bad a finding is; a verdict is its worst one's."""

    right = 0
    note = 1
    doubtful = 2
    wrong = 3


@dataclass(frozen=True)
class Finding:
    """An answer to one question.

    Attributes:
        topic: what was asked: weights, base, below, reference, bos, end, template.
        text: the answer.
        evidence: what it follows from: numbers, files.
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
        adapter: its folder.
        tool: which program wrote it, as far as it shows.
        method: sft, dpo, or None where nothing says so.
        numbers: what was measured, for the JSON.
    """

    adapter: str
    tool: str
    method: str | None
    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, topic: str, level: Level, text: str, *evidence: str, advice: str = "") -> None:
        self.findings.append(Finding(topic, level, text, evidence, advice))

    @property
    def level(self) -> Level:
        return max((finding.level for finding in self.findings), default=Level.right)

    def verdict(self) -> str:
        """One line."""
        found = {level: [f.topic for f in self.findings if f.level == level] for level in Level}
        if wrong := found[Level.wrong]:
            return f"WRONG ({', '.join(dict.fromkeys(wrong))})"
        if doubtful := found[Level.doubtful]:
            return f"doubtful ({', '.join(dict.fromkeys(doubtful))})"
        return "sound"

    def as_dict(self) -> dict[str, Any]:
        return {
            "adapter": self.adapter,
            "tool": self.tool,
            "method": self.method,
            "verdict": self.verdict(),
            "findings": [{**asdict(f), "level": f.level.name} for f in self.findings],
            "numbers": self.numbers,
        }
