"""Words and numbers on the page. Everything that comes from a file goes through ``esc``: a row may hold a script."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

# not allowed in HTML, or of no width, or turning a line around; and halves of surrogate pairs
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# an absolute path of two parts or more, as it stands in a sentence
_PATH = re.compile(r"(?<![\w.:/~-])(?:~|[A-Za-z]:)?(?:[/\\][\w.@+=-]+){2,}/?")


class Html(str):
    """Text that is HTML already."""


def esc(value: Any) -> Html:
    """A value as HTML text, safe between tags and in quoted attributes."""
    if isinstance(value, Html):
        return value
    text = _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), str(value))
    return Html(html.escape(text))


def number(value: Any) -> str:
    """Four significant digits; whole numbers with separators; ``–`` where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not finite"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}"


def share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) and math.isfinite(value) else "–"


def gib(value: Any) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    mib = value / 2**20
    return f"{mib / 1024:.2f} GiB" if mib >= 512 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def moment(value: Any) -> str:
    """``2026-11-21 19:22 UTC`` of an ISO time in UTC."""
    text = str(value)
    return f"{text[:10]} {text[11:16]} UTC" if re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d", text) else text


def without_paths(text: str) -> str:
    """A sentence with ``…/name`` in place of absolute paths: whose machine it was is nobody else's business."""
    return _PATH.sub(lambda found: "…/" + re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def table(
    head: Sequence[Any], rows: Sequence[Sequence[Any]], *, kind: str = "facts", marked: Sequence[bool] = ()
) -> Html:
    """A table; cells that are no ``Html`` are escaped.

    Args:
        head: titles of the columns; empty: none.
        kind: its class: ``facts`` (a name and values) or ``numbers`` (aligned to the right).
        marked: rows that stand out.
    """
    top = f"<thead><tr>{''.join(f'<th scope=col>{esc(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    body = []
    for place, row in enumerate(rows):
        mark = " class=marked" if place < len(marked) and marked[place] else ""
        cells = "".join(f"<td>{esc(cell)}</td>" for cell in row[1:])
        body.append(f"<tr{mark}><th scope=row>{esc(row[0])}</th>{cells}</tr>")
    return Html(f'<div class=wide><table class="{kind}">{top}<tbody>{"".join(body)}</tbody></table></div>')
