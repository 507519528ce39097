"""``zephyr-lite data show``: which row, and how it is laid out in lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
from rich.cells import cell_len
from rich.text import Text

from ..data.load import load_rows
from ..data.preview import Segment, Token, conversation_segment, pair_segments
from ..errors import UserError
from .trained_rows import TrainedRows, example_places

# what stands left of a line of tokens: the turn's role, and the position of the line's first token
_ROLE, _POSITION = 11, 6
# the colour says whether a token is supervised; so what is special cannot be a colour
_SUPERVISED, _SPECIAL = "green", "reverse"


def segments_of_row(rows: TrainedRows, number: int) -> list[Segment]:
    """Everything in row ``number`` (from 1): the conversations packed into it, or a pair's prompt and responses.

    Raises:
        UserError: there is no such row.
    """
    data = rows.data
    if not 1 <= number <= len(data.rows):
        what, count = "packed row" if rows.method == "sft" else "pair", len(data.rows)
        if count == 1:
            raise UserError(f"row {number}: there is 1 {what}.", "Say --row 1.")
        raise UserError(f"row {number}: there are {count:,} {what}s.", f"Say --row 1 to --row {count}.")
    return [s for index in data.rows[number - 1] for s in _segments(rows, index)]


def segments_from(rows: TrainedRows, place: str) -> tuple[int, list[Segment]]:
    """What was made of one row of the source, and the number of the row that it is in.

    Args:
        place: "train.jsonl row 17", or its end, such as 17.

    Raises:
        UserError: no row is called so, several are, or it was left out; the message says why.
    """
    wanted = place.strip()
    end = f"row {wanted}" if wanted.isdigit() else wanted
    for reason, where in rows.data.report.dropped.items():
        for each in where:
            if _is_called(each, end):
                raise UserError(f"{each} was left out: {reason}.", "`zephyr-lite data stats` lists all such rows.")
    names = example_places(rows.data)
    found = {name: index for index, name in reversed(list(enumerate(names))) if _is_called(name, end)}
    if len(found) != 1:
        some = f"{len(found)} are called so: {', '.join(sorted(found)[:3])}" if found else "no row is called so"
        drawn = any(spec.limit is not None or spec.weight < 1 for spec in rows.specs)
        there = " Rows that limit or weight did not draw are not there." if drawn and not found else ""
        raise UserError(f"--from {place}: {some}.", f"Places look like this: {names[0]}.{there}")
    (index,) = found.values()
    number = next(place for place, row in enumerate(rows.data.rows, 1) if index in row)
    return number, _segments(rows, index)


def _is_called(name: str, end: str) -> bool:
    return name == end or name.endswith((f" {end}", f"/{end}"))


def _segments(rows: TrainedRows, index: int) -> list[Segment]:
    example = rows.data.examples[index]
    raw = load_rows(rows.specs, rows.method, seed=rows.config.seed, system=rows.config.system).dataset
    places = raw.select_columns(["where"]).with_format("arrow")[:].column("where")
    turns: dict[str, Any] = json.loads(raw[pc.index(places, example.where).as_py()]["row"])
    if rows.method == "sft":
        return [conversation_segment(rows.template, example, turns["messages"], turns.get("tools"))]
    prompt, chosen, rejected = (turns[part] for part in ("prompt", "chosen", "rejected"))
    return pair_segments(rows.template, example, prompt, chosen, rejected, rows.config.loss_on, turns.get("tools"))


# -- lines ---------------------------------------------------------------------------------------------------------------


def view_lines(rows: TrainedRows, number: int, segments: list[Segment], width: int, *, colour: bool) -> Iterator[Text]:
    """A row with every token above its id, in lines of at most so many cells (a longer token alone has a longer one).

    Args:
        number: the row's.
        width: in cells.
        colour: what is supervised is green; without colour it stands in ⟦ ⟧, which are closed in every line.
    """
    yield from _heading(rows, number, segments)
    supervised = Text("green" if colour else "⟦ ⟧", style=_SUPERVISED if colour else "")
    eos = Text(rows.template.tokenizer.eos_token, style=_SPECIAL if colour else "")
    yield Text.assemble(
        "supervised: ", supervised, "  control tokens: ", eos, "  ␣ space, ⏎ newline  below a token: its id"
    )
    for place, segment in enumerate(segments, 1):
        yield Text()
        yield from _segment_title(rows, segments, place, segment, width)
        shown = ""
        for line in _lines(segment.tokens, width - _ROLE - _POSITION - 2):
            role = line[0].role
            yield from _interlinear(line, role if role != shown else "", colour)
            shown = role


def _heading(rows: TrainedRows, number: int, segments: list[Segment]) -> Iterator[Text]:
    data, config = rows.data, rows.config
    tokens = sum(len(s.tokens) for s in segments)
    supervised = sum(s.supervised for s in segments)
    what = f"{data.report.what} row {number:,} of {len(data.rows):,}"
    if rows.method == "sft":
        count = f"{len(segments)} conversation{'s' if len(segments) > 1 else ''}"
        whole = f"{tokens:,} of {config.max_length:,} tokens"
    else:
        count, whole = "a pair, the prompt computed once", f"{tokens:,} tokens"
    yield Text(f"{what}: {count}, {whole}, {supervised:,} supervised (loss_on {config.loss_on})", style="bold")


def _segment_title(
    rows: TrainedRows, segments: list[Segment], place: int, segment: Segment, width: int
) -> Iterator[Text]:
    if rows.method == "sft":
        name = f"segment {place} of {len(segments)}: {segment.where}"
    else:
        name = f"prompt: {segment.where}" if segment.part == "prompt" else segment.part
    title = f"── {name} "
    yield Text(title + "─" * max(2, width - cell_len(title)), style="bold cyan")
    positions = f"positions {segment.tokens[0].position}–{segment.tokens[-1].position}"
    if segment.part in ("chosen", "rejected"):
        positions += ", from the prompt's end"
    facts = [positions, f"{len(segment.tokens):,} tokens", f"{segment.supervised:,} supervised"]
    if segment.cut_left:
        facts.append(f"{segment.cut_left:,} tokens cut on the left")
    if segment.cut_right:
        facts.append(f"{segment.cut_right:,} tokens cut at the end")
    yield Text("   " + "; ".join(facts))


def _lines(tokens: Sequence[Token], room: int) -> Iterator[list[Token]]:
    """Tokens that stand in one line: of one role, as many as there is room for; the last newline in a row ends it."""
    line: list[Token] = []
    used = 0
    for token in tokens:
        bare = max(cell_len(token.text), len(str(token.id))) + 1
        # a bracket is an additional cell where supervision begins or ends
        size = bare + 2 * (not line or token.supervised != line[-1].supervised)
        ended = bool(line) and line[-1].raw.endswith(b"\n") and token.raw.strip(b"\n") != b""
        if line and (token.role != line[0].role or used + size > room or ended):
            yield line
            line, used, size = [], 0, bare + 2
        line.append(token)
        used += size
    if line:
        yield line


def _interlinear(line: list[Token], role: str, colour: bool) -> Iterator[Text]:
    above = Text()
    above.append(f"{role:<{_ROLE}}", style="bold" if colour else "")
    above.append(f"{line[0].position:>{_POSITION}}  ", style="dim" if colour else "")
    below = Text(" " * (_ROLE + _POSITION + 2))
    for place, token in enumerate(line):
        opens = not colour and token.supervised and (place == 0 or not line[place - 1].supervised)
        closes = not colour and token.supervised and (place + 1 == len(line) or not line[place + 1].supervised)
        cell, number = token_text(token, colour), str(token.id)
        if opens:
            cell, number = Text.assemble("⟦", cell), " " + number
        if closes:
            cell.append("⟧")
        size = max(cell.cell_len, len(number)) + 1
        above.append_text(cell)
        above.append(" " * (size - cell.cell_len))
        below.append(f"{number:<{size}}", style="dim" if colour else "")
    above.rstrip()
    below.rstrip()
    yield above
    yield below


def token_text(token: Token, colour: bool) -> Text:
    """A token in visible characters, in colour perhaps: green where it is supervised, reversed where it is special; the signs
    for spaces step back."""
    if not colour:
        return Text(token.text)
    text = Text()
    text.append(
        token.text, style=f"{_SUPERVISED if token.supervised else ''} {_SPECIAL if token.special else ''}".strip()
    )
    text.highlight_regex("[␣⏎⇥␍]", "dim")
    return text


def table_lines(rows: TrainedRows, number: int, segments: list[Segment], *, colour: bool) -> Iterator[Text]:
    """A row with one token a line: place in the row, segment, position, role, whether it is supervised, id, text."""
    yield from _heading(rows, number, segments)
    for place, segment in enumerate(segments, 1):
        yield Text(f"segment {place}: {segment.part}, {segment.where}")
    yield Text(
        f"{'token':>6} {'segment':>7} {'position':>8}  {'role':<10} {'supervised':<10} {'special':<7} {'id':>7}  text"
    )
    count = 0
    for place, segment in enumerate(segments, 1):
        for token in segment.tokens:
            line = Text(
                f"{count:>6} {place:>7} {token.position:>8}  {token.role:<10} {'yes' if token.supervised else 'no':<10} "
                f"{'yes' if token.special else 'no':<7} {token.id:>7}  "
            )
            style = _SPECIAL if token.special else ""
            line.append(
                token.text, style=f"{_SUPERVISED if token.supervised else ''} {style}".strip() if colour else ""
            )
            yield line
            count += 1
