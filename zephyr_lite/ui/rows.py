"""One conversation or pair as HTML: what is trained on is green."""

from __future__ import annotations

from html import escape
from itertools import groupby

from ..data.preview import Segment, Token
from ..monitor.rows import TrainedRows, segments_of_example

LEGEND = (
    '<p><span class="zl-on">trained on</span> &nbsp; <span>context</span> &nbsp; '
    '<span class="zl-special">control token</span></p>'
)


def example_html(rows: TrainedRows, place: int) -> str:
    """Example ``place`` (from 1) of the prepared rows, turn by turn."""
    return LEGEND + "".join(map(_segment, segments_of_example(rows, place - 1)))


def _segment(segment: Segment) -> str:
    facts = [segment.where, f"{len(segment.tokens):,} tokens", f"{segment.supervised:,} trained on"]
    if cut := segment.cut_left + segment.cut_right:
        facts.append(f"{cut:,} tokens cut")
    turns = "".join(
        f'<div class="zl-turn"><b>{escape(role)}</b><div>{_text(list(tokens))}</div></div>'
        for role, tokens in groupby(segment.tokens, lambda token: token.role)
    )
    return f"<h4>{segment.part} <small>{escape(', '.join(facts))}</small></h4>{turns}"


def _text(tokens: list[Token]) -> str:
    """Tokens as text, in spans of those that are alike."""
    parts = []
    for (supervised, special), same in groupby(tokens, lambda token: (token.supervised, token.special)):
        text = b"".join(token.raw for token in same).decode("utf-8", "replace")
        parts.append(f'<span class="{"zl-on" * supervised} {"zl-special" * special}">{escape(text)}</span>')
    return "".join(parts)
