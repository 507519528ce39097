"""The rows of a run as training gets them, and ``zephyr-lite data show``; needs the base's tokenizer and ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.cells import cell_len
from rich.text import Text

from ..config.load import DatasetSpec, Method, RunConfig
from ..config.resolve import resolve_run
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, prepare
from ..data.load import load_rows
from ..data.preview import Segment, Token, example_segments
from ..errors import UserError
from ..io.text import counted
from ..memory.forecast import stages_of
from ..train.below import open_template
from ..train.small_data import prepare_parts, settle

# columns left of a line of tokens: the turn's role, and the position of the line's first token
_ROLE, _POSITION = 11, 6
_SUPERVISED, _SPECIAL = "green", "reverse"


@dataclass
class TrainedRows:
    """Prepared rows of a configuration.

    Attributes:
        config, template: as the run resolves them.
        notes: decisions that were taken, for the user.
        specs: the sources of ``data``.
        data: as the run prepares it.
    """

    method: Method
    config: RunConfig
    template: ChatTemplate
    notes: list[str] = field(default_factory=list)
    specs: list[DatasetSpec] = field(init=False)
    data: TokenizedDataset = field(init=False)

    def prepare(self, held_out: bool) -> TrainedRows:
        """Prepare the rows of ``dataset``, or of ``eval_dataset``; returns itself."""
        self.specs, what = (self.config.eval_dataset, "held-out") if held_out else (self.config.dataset, "training")
        self.data = prepare(self.specs, self.config.row_kind(self.method), self.config, self.template, what=what)
        return self

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of the prepared table; ``where`` holds places such as "train.jsonl row 17"."""
        return self.data.examples.columns(name)[:].column(name)


def stage_of_words(words: list[str], file: str | None) -> tuple[Method, list[str]]:
    """The stage that the first word or the configuration's file names, and the other words."""
    methods, rest = stages_of(words, file)
    if len(methods) > 1:
        raise UserError("which stage's rows?", "Name sft or dpo, then key=value: … sft dataset=FILE.")
    return methods[0], rest


def open_rows(method: Method, file: str | None, words: list[str], *, held_out: bool = False) -> TrainedRows:
    """Prepare the rows of a configuration's ``dataset``, or of its ``eval_dataset``."""
    loaded = resolve_run(method, file, words)
    if held_out and not loaded.config.eval_dataset:
        raise UserError("nothing is held out: the configuration has no eval_dataset.", "Add eval_dataset=FILE.")
    template, base_config, found = open_template(method, loaded.config)
    notes = [*loaded.notes, *found]
    if loaded.automatic:
        parts = prepare_parts(method, loaded, template)
        notes += settle(method, loaded, parts, base_config.hidden_size)
    return TrainedRows(method, loaded.config, template, notes).prepare(held_out)


# -- one row ---------------------------------------------------------------------------------------------------------------


def segments_of_row(rows: TrainedRows, number: int) -> list[Segment]:
    """The conversations packed into row ``number`` (from 1), or a pair's prompt and responses."""
    count = len(rows.data.rows)
    if not 1 <= number <= count:
        what = "packed row" if rows.method == "sft" else rows.data.report.unit
        raise UserError(f"row {number}: the number of {what}s is {count:,}.", f"Give --row 1 to --row {count}.")
    return [s for index in rows.data.rows[number - 1] for s in segments_of_example(rows, index)]


def segments_from(rows: TrainedRows, place: str) -> tuple[int, list[Segment]]:
    """The segments made of one row of the source ("train.jsonl row 17", or 17), and the number of the row with them."""
    wanted = place.strip()
    end = f"row {wanted}" if wanted.isdigit() else wanted

    def matches(name: str) -> bool:
        return name == end or name.endswith((f" {end}", f"/{end}"))

    for reason, where in rows.data.report.dropped.items():
        for each in filter(matches, where):
            raise UserError(f"{each} was left out: {reason}.", "`zephyr-lite data stats` lists all such rows.")
    names = rows.column("where").to_pylist()
    found = {name: index for index, name in reversed(list(enumerate(names))) if matches(name)}
    if len(found) > 1:
        raise UserError(
            f"--from {place}: {len(found)} rows have this place: {', '.join(sorted(found)[:3])}.", "Name the file too."
        )
    if not found:
        raise UserError(
            f"--from {place}: no row has this place, or `limit` or `weight` did not draw it.",
            f"Places look like this: {names[0]}.",
        )
    (index,) = found.values()
    number = next(place for place, row in enumerate(rows.data.rows, 1) if index in row)
    return number, segments_of_example(rows, index)


def segments_of_example(rows: TrainedRows, index: int) -> list[Segment]:
    """The segments of example ``index`` (from 0): its conversation, or a pair's prompt and responses."""
    example = rows.data.examples[index]
    kind = rows.config.row_kind(rows.method)
    raw = load_rows(rows.specs, kind, seed=rows.config.seed, system=rows.config.system).dataset
    places = raw.select_columns(["where"]).with_format("arrow")[:].column("where")
    row: dict[str, Any] = json.loads(raw[pc.index(places, example.where).as_py()]["row"])
    return example_segments(rows.template, example, row, rows.config.loss_on)


# -- lines -----------------------------------------------------------------------------------------------------------------


def view_lines(
    rows: TrainedRows, number: int, segments: list[Segment], width: int, most: int | None = None
) -> Iterator[Text]:
    """A row with every token above its id, in lines of at most ``width`` cells (a longer token has a line of its own).
    Supervised tokens are green and in ⟦ ⟧, which are closed in every line. ``most``: conversations shown of a packed row."""
    yield _heading(rows, number, segments)
    eos = (rows.template.tokenizer.eos_token, _SPECIAL)
    yield Text.assemble(
        "supervised: ", ("⟦ ⟧", _SUPERVISED), "  control tokens: ", eos, "  ␣ space, ⏎ newline  below a token: its id"
    )
    for place, segment in enumerate(segments[:most], 1):
        name = segment.part if rows.method == "dpo" else f"segment {place} of {len(segments)}"
        title = f"── {name}{'' if segment.part in ('chosen', 'rejected') else f': {segment.where}'} "
        yield Text()
        yield Text(title + "─" * max(2, width - cell_len(title)), style="bold cyan")
        positions = f"positions {segment.tokens[0].position}–{segment.tokens[-1].position}"
        if segment.part in ("chosen", "rejected"):
            positions += ", from the prompt's end"
        facts = [positions, f"{len(segment.tokens):,} tokens", f"{segment.supervised:,} supervised"]
        facts += [f"{segment.cut_left:,} tokens cut on the left"] if segment.cut_left else []
        facts += [f"{segment.cut_right:,} tokens cut at the end"] if segment.cut_right else []
        yield Text("   " + "; ".join(facts))
        shown = ""
        for line in _lines(segment.tokens, width - _ROLE - _POSITION - 2):
            role = line[0].role
            yield from _interlinear(line, role if role != shown else "")
            shown = role
    if most and (left := len(segments) - most) > 0:
        yield Text(f"\n… {left} more conversations: --all shows them, --from N only that of row N.")


def table_lines(rows: TrainedRows, number: int, segments: list[Segment]) -> Iterator[Text]:
    """A row with one token a line: number in the row, segment, position, role, supervised, special, id, text."""
    yield _heading(rows, number, segments)
    for place, segment in enumerate(segments, 1):
        yield Text(f"segment {place}: {segment.part}, {segment.where}")
    form = "{:>6} {:>7} {:>8}  {:<10} {:<10} {:<7} {:>7}  "
    yield Text(form.format("token", "segment", "position", "role", "supervised", "special", "id") + "text")
    tokens = [(place, token) for place, segment in enumerate(segments, 1) for token in segment.tokens]
    for count, (place, token) in enumerate(tokens):
        marks = ("yes" if mark else "no" for mark in (token.supervised, token.special))
        line = Text(form.format(count, place, token.position, token.role, *marks, token.id))
        yield line.append_text(_token_text(token))


def _heading(rows: TrainedRows, number: int, segments: list[Segment]) -> Text:
    tokens = sum(len(s.tokens) for s in segments)
    supervised = sum(s.supervised for s in segments)
    if rows.method == "sft":
        count = counted(len(segments), "conversation")
        count += f", {tokens:,} of {rows.config.max_length:,} tokens"
    else:
        label = "true" if segments[1].part == "chosen" else "false"
        kind = "a pair, the prompt computed once" if len(segments) == 3 else f"an answer with label {label}"
        count = f"{kind}, {tokens:,} tokens"
    what = f"{rows.data.report.what} row {number:,} of {len(rows.data.rows):,}"
    return Text(f"{what}: {count}, {supervised:,} supervised (loss_on {rows.config.loss_on})", style="bold")


def _lines(tokens: Sequence[Token], room: int) -> Iterator[list[Token]]:
    """The tokens of each line: of one role, as many as fit; the last of several newlines ends a line."""
    line: list[Token] = []
    used = 0
    for token in tokens:
        bare = max(cell_len(token.text), len(str(token.id))) + 1
        # brackets take additional cells where supervision begins or ends
        size = bare + 2 * (not line or token.supervised != line[-1].supervised)
        ended = bool(line) and line[-1].raw.endswith(b"\n") and token.raw.strip(b"\n") != b""
        if line and (token.role != line[0].role or used + size > room or ended):
            yield line
            line, used, size = [], 0, bare + 2
        line.append(token)
        used += size
    if line:
        yield line


def _interlinear(line: list[Token], role: str) -> Iterator[Text]:
    """Two lines: texts, and ids below them."""
    above = Text.assemble((f"{role:<{_ROLE}}", "bold"), (f"{line[0].position:>{_POSITION}}  ", "dim"))
    below = Text(" " * (_ROLE + _POSITION + 2))
    for place, token in enumerate(line):
        cell, number = _token_text(token), str(token.id)
        if token.supervised:
            if place == 0 or not line[place - 1].supervised:
                cell, number = Text.assemble("⟦", cell), " " + number
            if place + 1 == len(line) or not line[place + 1].supervised:
                cell.append("⟧")
        size = max(cell.cell_len, len(number)) + 1
        above.append_text(cell)
        above.append(" " * (size - cell.cell_len))
        below.append(f"{number:<{size}}", style="dim")
    above.rstrip()
    below.rstrip()
    yield above
    yield below


def _token_text(token: Token) -> Text:
    """A token in visible characters: green if supervised, reversed if special, signs for spaces dimmed."""
    style = f"{_SUPERVISED if token.supervised else ''} {_SPECIAL if token.special else ''}".strip()
    text = Text.assemble((token.text, style))
    text.highlight_regex("[␣⏎⇥␍]", "dim")
    return text
