"""The commands' console: colored lines in a terminal, plain lines in a pipe. Imports no torch."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

from rich.console import Console as RichConsole
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from ..errors import UserError
from ..io.redact import redact
from ..io.text import duration

Metrics = dict[str, float]
Spans = Sequence[tuple[str, bool]]  # runs of text, and whether they are supervised
PIPE_WIDTH = 120  # columns of a table that is not printed to a terminal
# the signs of panels and lines, for terminals without UTF-8
_ASCII = str.maketrans("▁▂▃▄▅▆▇█✓·–…", "_.-~=+*#*--.")
# control characters, bidirectional overrides, and lone surrogates (bytes of a path that are not UTF-8)
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class _Rich(RichConsole):
    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """The one place that all output passes through, tables and live displays included."""
        text = redact(super()._render_buffer(buffer))
        return text if self.encoding.startswith("utf") else text.translate(_ASCII)

    def show_cursor(self, show: bool = True) -> bool:
        """The cursor stays visible: a killed process could not restore it."""
        return False

    def on_broken_pipe(self) -> None:
        """Let the command line handle a closed pipe; rich would exit with code 1."""
        raise BrokenPipeError


def visible(text: str) -> str:
    """The text with control characters escaped: file names and rows may contain any."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


class Console:
    """Output of one command. Texts are never parsed as rich markup and never wrapped.

    Args:
        out, err: output streams; standard output and standard error by default.

    Attributes:
        notebook: whether it prints into a notebook's cell.
    """

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.notebook = out is None and RichConsole().is_jupyter
        # force_jupyter=False: in a notebook rich would print every line as a block of HTML
        self.out = _Rich(file=out, highlight=False, soft_wrap=True, force_jupyter=False, _environ=os.environ)
        if not self.out.is_terminal:
            self.out.width = PIPE_WIDTH
        self.err = _Rich(file=err, stderr=err is None, highlight=False, soft_wrap=True, force_jupyter=False)

    def say(self, text: str = "") -> None:
        """Print plain text."""
        self.out.print(Text(visible(text)))

    def log(self, record: logging.LogRecord) -> None:
        """Print a message of the package's logger; one with ``stderr`` set goes to standard error."""
        (self.complain if getattr(record, "stderr", False) else self.say)(record.getMessage())

    def text(self, text: str, style: str = "") -> Text:
        """Text for rich, with control characters escaped."""
        return Text(visible(text).replace("\t", "    "), style=style)

    def heading(self, text: str) -> None:
        """Print bold text."""
        self.out.print(Text(visible(text), style="bold"))

    def complain(self, text: str) -> None:
        """Print plain text to standard error."""
        self.err.print(Text(visible(text)))

    def user_error(self, error: UserError) -> None:
        """Print a user's mistake and what to do about it."""
        self.err.print(Text.assemble(("error: ", "bold red"), visible(error.message)))
        if error.hint:
            self.err.print(Text(visible(error.hint)))

    def traceback(self, error: BaseException) -> None:
        """Print a traceback, for ``--verbose``."""
        self.err.print(Text(visible("".join(traceback.format_exception(error)).rstrip("\n"))))

    def failure(self, error: BaseException) -> None:
        """Print an internal error."""
        what = visible(" ".join(f"{type(error).__name__}: {error}".split())[:500])
        self.err.print(Text.assemble(("failed: ", "bold red"), what))
        self.err.print(
            Text("This is a bug in zephyr-lite. Please report it, with the output of the command with --verbose.")
        )

    def plan(self, lines: Sequence[str]) -> None:
        """Print a plan: headings bold, notes dim."""
        for line in lines:
            heading = bool(line) and not line.startswith((" ", "|"))
            dim = line.startswith(("  note", "details"))
            self.out.print(Text(line, style="dim" if dim else "bold" if heading else ""))

    def row(self, title: str, spans: Spans) -> None:
        """Print a row as training sees it; supervised text is green in a terminal, and in ⟦ ⟧ elsewhere."""
        self.heading(title)
        text = Text()
        for part, supervised in spans:
            if self.out.is_terminal:
                text.append(part, style="green" if supervised else "dim")
            else:
                text.append(f"⟦{part}⟧" if supervised else part)
        self.out.print(text)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; all columns but the first are right-aligned."""
        table = Table()
        for place, title in enumerate(header):
            table.add_column(Text(visible(title)), justify="right" if place else "left", overflow="fold")
        for cells in rows:
            table.add_row(*(Text(visible(cell)) for cell in cells))
        self.out.print(table, soft_wrap=False)


def is_evaluation(metrics: Mapping[str, float]) -> bool:
    """Whether metrics are those of an evaluation and not of a step."""
    return any(name.startswith("eval_") for name in metrics)


def metrics_line(step: int, total: int, metrics: Metrics, left: float | None = None) -> str:
    """``step 12/480  loss 1.2345  token accuracy 0.512  231 tokens/s  1 h 20 min left``."""
    found = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    parts = [f"step {step:>{len(str(total))}}/{total}", *(["held-out"] if is_evaluation(metrics) else [])]
    for name, key, form in (
        ("loss", "loss", ".4f"),
        ("accuracy", "rewards/accuracies", ".3f"),
        ("token accuracy", "mean_token_accuracy", ".3f"),
        ("margin", "rewards/margins", ".4f"),
    ):
        if key in found:
            parts.append(f"{name} {found[key]:{form}}")
    for unit in ("tokens", "pairs", "answers"):
        if f"{unit}_per_second" in found:
            parts.append(rate(found[f"{unit}_per_second"], unit))
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def rate(speed: float, unit: str) -> str:
    """``1,234 tokens/s``, ``1.50 pairs/s``."""
    return f"{speed:,.0f} {unit}/s" if speed >= 100 else f"{speed:.2f} {unit}/s"
