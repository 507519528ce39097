"""What a rule of the cleaning is: a name, what it does, a predicate, and examples on which it must and must not hold.

The tests run every rule over its own examples, and the report counts by the rules' names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Example = TypeVar("Example")


@dataclass(frozen=True)
class Rule(Generic[Example]):
    """One named decision.

    Attributes:
        name: the rule's name in reports, in lower case with underscores.
        does: one sentence for the report.
        holds: whether the rule applies to an example.
        positive: examples on which it must hold.
        negative: examples on which it must not.
    """

    name: str
    does: str
    holds: Callable[[Example], bool]
    positive: tuple[Example, ...]
    negative: tuple[Example, ...]


def word_list(text: str) -> list[str]:
    """Words that stand in the source as running text, for the reader's sake."""
    return text.split()
