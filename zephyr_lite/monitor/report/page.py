"""The whole page: of a run's stages, or of two runs side by side."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Callable, Sequence

from ... import __version__
from ...errors import UserError
from . import sections
from .look import SCRIPT, STYLE
from .read import StageRecord, as_list
from .samples import samples
from .text import Html, esc, number

# by which a file is known as one of these
MARK = "<!-- a report of zephyr-lite -->"
_METHODS = {"sft": "supervised fine-tuning", "dpo": "direct preference optimization"}
_Section = Callable[[Sequence[StageRecord], Sequence[str]], Html]
_SECTIONS: tuple[tuple[str, _Section], ...] = (
    ("Curves", sections.curves),
    ("Answers to held-out prompts", samples),
    ("Evaluation", sections.results),
    ("Rows", sections.data),
    ("Memory, as planned", sections.memory),
    ("Configuration", sections.configuration),
    ("Lineage", sections.lineage),
    ("Environment", sections.environment),
)
# stand beside each other where there is room
_NARROW = ("Lineage", "Environment")


def run_page(records: Sequence[StageRecord]) -> str:
    """The page of one run: its stages, one below the other."""
    name = records[0].run if len(records) > 1 else f"{records[0].run} / {records[0].name}"
    return _page(name, [([record], [record.name]) for record in records])


def side_by_side(first: Sequence[StageRecord], second: Sequence[StageRecord]) -> str:
    """The page of two runs (or two stages): stages of one name beside each other, what only one has below.

    Raises:
        UserError: they have no stage in common, or one of a name is sft here and dpo there.
    """
    if len(first) == len(second) == 1:
        pairs = [(first[0], second[0])]
    else:
        pairs = [(one, other) for one in first for other in second if one.name == other.name]
    names = ", ".join(r.name for r in first), ", ".join(r.name for r in second)
    if not pairs:
        raise UserError(
            f"the runs have no stage in common ({names[0]}; {names[1]}).", "Name two stages: runs/A/sft runs/B/sft"
        )
    for one, other in pairs:
        if one.method != other.method:
            raise UserError(
                f"{one.folder} is {one.method}, and {other.folder} is {other.method}: their numbers mean different things.",
                "Name two stages of one method.",
            )
    labels = _labels(pairs)
    paired = {id(record) for pair in pairs for record in pair}
    groups = [(list(pair), labels) for pair in pairs]
    for side, label in zip((first, second), labels):
        groups += [([record], [f"{label} / {record.name}"]) for record in side if id(record) not in paired]
    return _page(f"{labels[0]} and {labels[1]}", groups)


def _labels(pairs: Sequence[tuple[StageRecord, StageRecord]]) -> list[str]:
    """What tells them apart: the runs' names; of one run the stages'; of two folders called alike the one above."""
    one, other = pairs[0]
    if one.run != other.run:
        return [one.run, other.run]
    if one.name != other.name:
        return [one.name, other.name]
    above = [record.folder.absolute().parent.parent.name for record in (one, other)]
    return [f"{place}/{one.run}" for place in above] if above[0] != above[1] else [f"{one.run} (A)", f"{one.run} (B)"]


def _page(title: str, groups: Sequence[tuple[Sequence[StageRecord], Sequence[str]]]) -> str:
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [_stage(records, labels, place) for place, (records, labels) in enumerate(groups)]
    links = [f'<a href="#part{place}">{esc(_name(*group))}</a>' for place, group in enumerate(groups)]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!doctype html>\n{MARK}\n<html lang=en><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name=viewport content="width=device-width,initial-scale=1"><meta name=referrer content=no-referrer>'
        f"<title>{esc(title)} · zephyr-lite</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{esc(title)}</h1>{f'<nav>{chr(32).join(links)}</nav>' if len(links) > 1 else ''}</header>"
        f"<main>{''.join(parts)}</main>"
        f"<footer>Made by zephyr-lite {__version__}, {now}. This file is complete in itself and loads nothing.</footer>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _name(records: Sequence[StageRecord], labels: Sequence[str]) -> str:
    if len(records) == 1:
        return labels[0]
    names = list(dict.fromkeys(record.name for record in records))
    return names[0] if len(names) == 1 else f"{labels[0]} and {labels[1]}"


def _stage(records: Sequence[StageRecord], labels: Sequence[str], place: int) -> str:
    states = [_state(r, label if len(records) > 1 else "") for r, label in zip(records, labels)]
    parts = [
        f'<h2 id="part{place}">{esc(_name(records, labels))} <small>{esc(_METHODS.get(records[0].method, ""))}</small> '
        + " ".join(f"<span class=state>{esc(state)}</span>" for state in states)
        + "</h2>",
        sections.overview(records, labels),
        sections.warnings(records, labels),
    ]
    beside: list[str] = []
    for title, section in _SECTIONS:
        if found := section(records, labels):
            (beside if title in _NARROW else parts).append(f"<div><h3>{title}</h3>{found}</div>")
    return f"<section>{''.join(parts)}<div class=beside>{''.join(beside)}</div></section>"


def _state(record: StageRecord, label: str) -> str:
    who = f"{label}: " if label else ""
    if record.complete:
        again = len(as_list(record.info.get("resumed")))
        return f"{who}finished" + (
            f", after {again} {'interruption' if again == 1 else 'interruptions'}" if again else ""
        )
    return f"{who}not finished, step {number(record.step)}" + (f" of {number(t)}" if (t := record.total()) else "")
