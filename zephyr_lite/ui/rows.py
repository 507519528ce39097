"""The tab Data: the rows of a file as training sees them, as HTML in which what is trained on is green."""

from __future__ import annotations

import shutil
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from ..data.preview import Segment, Token
from ..errors import UserError
from ..monitor.rows import TrainedRows, open_rows, segments_of_example
from .jobs import errors_on_page, words_of

UPLOADS = Path("uploads")
LEGEND = (
    '<p><span class="zl-on">trained on</span> &nbsp; <span>context</span> &nbsp; '
    '<span class="zl-special">control token</span>{}</p>'
)
REJECTED = ' &nbsp; <span class="zl-rejected"><span class="zl-on">trained on as rejected</span></span>'


def upload(file: str) -> str:
    """Copy an uploaded file to uploads/, where it stays, in place of an earlier one of its name; returns its path."""
    target = UPLOADS / Path(file).name
    UPLOADS.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    return str(target)


@errors_on_page()
def read_rows(method: Any, preset: str, *fields: str) -> tuple[TrainedRows, str, int, str]:
    rows = open_rows(method, preset or None, words_of(*fields))
    text = "\n".join([*(f"note: {note}" for note in rows.notes), *rows.data.report.lines()])
    return rows, text, *show_row(rows, 1)


@errors_on_page()
def show_row(rows: TrainedRows | None, place: float | None, by: int = 0) -> tuple[int, str]:
    """(the number of a row that exists, the row as HTML, turn by turn).

    Args:
        place: a row's number; None: the first one's.
        by: rows that the shown one is further on.
    """
    if rows is None:
        raise UserError("no data is read yet.", "Press Read the data.")
    number = min(max(1, int(place or 1) + by), len(rows.data.examples))
    legend = LEGEND.format(REJECTED if rows.method == "dpo" else "")
    return number, legend + "".join(map(_segment, segments_of_example(rows, number - 1)))


def _segment(segment: Segment) -> str:
    facts = [segment.where, f"{len(segment.tokens):,} tokens", f"{segment.supervised:,} trained on"]
    if cut := segment.cut_left + segment.cut_right:
        facts.append(f"{cut:,} tokens cut")
    turns = "".join(
        f'<div class="zl-turn"><b>{escape(role)}</b><div>{_text(list(tokens))}</div></div>'
        for role, tokens in groupby(segment.tokens, lambda token: token.role)
    )
    return (
        f'<h4>{segment.part} <small>{escape(", ".join(facts))}</small></h4><div class="zl-{segment.part}">{turns}</div>'
    )


def _text(tokens: list[Token]) -> str:
    """Tokens as text, in spans of those that are alike."""
    parts = []
    for (supervised, special), same in groupby(tokens, lambda token: (token.supervised, token.special)):
        text = b"".join(token.raw for token in same).decode("utf-8", "replace")
        parts.append(f'<span class="{"zl-on" * supervised} {"zl-special" * special}">{escape(text)}</span>')
    return "".join(parts)
