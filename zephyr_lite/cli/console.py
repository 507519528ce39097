"""What the commands print: lines in colour in a terminal, plain in a pipe. Nothing here imports torch."""

from __future__ import annotations

import os
import re
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any, Protocol

from rich.console import Console as RichConsole
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..io.redact import redact
from ..io.words import duration

Metrics = dict[str, float]
# runs of text, and whether they are supervised
Spans = Sequence[tuple[str, bool]]
# Columns of a table where no terminal says how many there are.
PIPE_WIDTH = 120
# what moves a terminal's cursor, renames its window or turns a line around; and halves of surrogate pairs, as which
# bytes of a path come that are no UTF-8
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Standing(Protocol):
    """Where a model stands (``demo.run.Standing``)."""

    loss: float
    preference_accuracy: float
    dodging: float
    answers: list[str]


class _Rich(RichConsole):
    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """Everything that is printed comes through here, tables and progress too."""
        return redact(super()._render_buffer(buffer))

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich's; what the system refuses names the stream, as it would a file."""
        try:
            super().print(*objects, **how)
        except OSError as error:
            if error.filename is None and error.errno is not None:
                error.filename = "standard error" if self.stderr else "standard output"
            raise

    def on_broken_pipe(self) -> None:
        """Whoever reads has gone; the command line ends quietly, and not as rich would, with exit code 1."""
        raise BrokenPipeError


def visible(text: str) -> str:
    """The text with control characters as they are written in a program: a file's name or a row may hold any."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class Console:
    """Prints for one command.

    Texts are never read as rich markup (a path or a row may hold brackets), and never wrapped: a terminal wraps by
    itself, and a pipe wants whole lines.

    Args:
        out, err: where to write; standard output and standard error by default.

    Attributes:
        notebook: it writes into a notebook's cell.
    """

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        # in a notebook rich would make a block of HTML of every line
        self.notebook = out is None and RichConsole().is_jupyter
        self.out = _Rich(file=out, highlight=False, soft_wrap=True, force_jupyter=False, _environ=os.environ)
        if not self.out.is_terminal:
            self.out.width = PIPE_WIDTH
        self.err = _Rich(file=err, stderr=err is None, highlight=False, soft_wrap=True, force_jupyter=False)
        self._seconds: deque[float] = deque(maxlen=20)

    def say(self, text: str = "") -> None:
        """One line (or several) of plain text."""
        self.out.print(Text(visible(text)))

    def text(self, text: str, style: str = "") -> Text:
        """Text for rich, with control characters escaped."""
        return Text(visible(text).replace("\t", "    "), style=style)

    def heading(self, text: str) -> None:
        self.out.print(Text(visible(text), style="bold"))

    def complain(self, text: str) -> None:
        """As ``say``, on standard error."""
        self.err.print(Text(visible(text)))

    def user_error(self, error: UserError) -> None:
        """What has to change, and how."""
        self.err.print(Text.assemble(("error: ", "bold red"), visible(error.message)))
        if error.hint:
            self.err.print(Text(visible(error.hint)))

    def traceback(self, error: BaseException) -> None:
        """Where an error came from, for ``--verbose``."""
        self.err.print(Text(visible("".join(traceback.format_exception(error)).rstrip("\n"))))

    def failure(self, error: BaseException) -> None:
        """Something that no input should cause."""
        what = visible(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        self.err.print(Text.assemble(("failed: ", "bold red"), what))
        self.err.print(
            Text("This is our fault, not yours. Please report it, with what the command shows with --verbose.")
        )

    def plan(self, lines: Sequence[str]) -> None:
        """A plan (``forecast``): what begins a part of it stands out, and what is an estimate steps back."""
        for line in lines:
            outstanding = bool(line) and not line.startswith((" ", "|"))
            style = "bold" if outstanding else "dim" if "estimate" in line or "not measured" in line else ""
            self.out.print(Text(line, style=style))

    def metrics(self, step: int, total: int, metrics: Metrics) -> None:
        """The line of a logged step, or of an evaluation."""
        evaluation = any(name.startswith("eval_") for name in metrics)
        if not evaluation and "seconds" in metrics:
            self._seconds.append(metrics["seconds"])
        self.out.print(
            Text(metrics_line(step, total, metrics, self._left(total - step)), style="bold" if evaluation else "")
        )

    def row(self, title: str, spans: Spans) -> None:
        """A row as training sees it. In a terminal what is supervised is green, in a pipe it stands in ⟦ ⟧."""
        self.out.print(Text(title, style="bold"))
        text = Text()
        for part, supervised in spans:
            if self.out.is_terminal:
                text.append(part, style="green" if supervised else "dim")
            else:
                text.append(f"⟦{part}⟧" if supervised else part)
        self.out.print(text)

    def side_by_side(self, questions: Sequence[str], standings: Mapping[str, Standing]) -> None:
        """What each model answers, in a column each, and where it stands on the held-out rows."""
        table = Table(show_lines=True, expand=True)
        for name in ("", *standings):
            table.add_column(name, ratio=1)
        for place, question in enumerate(questions):
            table.add_row(Text(question, style="bold"), *(Text(s.answers[place]) for s in standings.values()))
        for title, text in (
            ("held-out loss", lambda s: f"{s.loss:.3f}"),
            ("better answer likelier", lambda s: f"{s.preference_accuracy:.0%}"),
            ("dodging answers", lambda s: f"{s.dodging:.0%}"),
        ):
            table.add_row(Text(title), *(Text(text(s)) for s in standings.values()))
        # soft wrapping is for lines; a table is laid out for a width, and cut where it is wider than the console
        self.out.print(table, soft_wrap=False)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Cells under a header; numbers read best on the right."""
        table = Table()
        for place, title in enumerate(header):
            table.add_column(Text(visible(title)), justify="right" if place else "left", overflow="fold")
        for cells in rows:
            table.add_row(*(Text(visible(cell)) for cell in cells))
        self.out.print(table, soft_wrap=False)

    def _left(self, steps: int) -> float | None:
        if not self._seconds or steps <= 0:
            return None
        return sum(self._seconds) / len(self._seconds) * steps


def metrics_line(step: int, total: int, metrics: Metrics, left: float | None = None) -> str:
    """``step 12/480  loss 1.2345  lr 2.00e-04  231 tokens/s  1 h 20 min left``."""
    evaluation = any(name.startswith("eval_") for name in metrics)
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    parts = [f"step {step:>{len(str(total))}}/{total}", *(["held-out"] if evaluation else [])]
    if "loss" in found:
        parts.append(f"loss {found['loss']:.4f}")
    for name, key in (("accuracy", "rewards/accuracies"), ("token accuracy", "mean_token_accuracy")):
        if key in found:
            parts.append(f"{name} {found[key]:.3f}")
    if "rewards/margins" in found:
        parts.append(f"margin {found['rewards/margins']:.4f}")
    if "learning_rate" in found:
        parts.append(f"lr {found['learning_rate']:.2e}")
    for unit in ("tokens", "pairs"):
        if (speed := found.get(f"{unit}_per_second")) is not None:
            parts.append(f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.2f} {unit}/s")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)
