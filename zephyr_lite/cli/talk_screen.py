"""What a conversation looks like in a terminal: one answer as it comes, or several beside each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .console import Console, visible
from .talk_keys import quiet_keys

# Columns of text that an answer needs to be read beside others; narrower terminals show them one under the other.
NARROWEST = 32
# Seconds between two pictures of answers that grow.
REFRESH = 0.1
TAB = "    "


class Screen:
    """Args:
    console: of the command.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._out = console.out

    def note(self, text: str) -> None:
        """What is said about the conversation, and is no part of it."""
        self._out.print(Text(visible(text), style="dim"))

    def piece(self, column: int, text: str) -> None:
        """A piece of the only answer."""
        self._out.print(Text(visible(text).replace("\t", TAB)), end="")

    def end(self) -> None:
        """The only answer is over."""
        self._out.print()

    @contextmanager
    def answers(self, titles: Sequence[str]) -> Iterator[Callable[[int, str], None]]:
        """Several answers that grow at the same time: gives what takes (column, piece).

        While they grow their ends are seen, as far as the terminal is high; it is left clear behind.
        """
        texts = [""] * len(titles)
        live = Live(console=self._out, auto_refresh=False, transient=True, vertical_overflow="crop")
        with quiet_keys(), live:
            shown = 0.0

            def grow(column: int, piece: str) -> None:
                nonlocal shown
                texts[column] += piece
                if time.monotonic() - shown >= REFRESH:
                    live.update(self._view(titles, texts, self._out.size.height - 2), refresh=True)
                    shown = time.monotonic()

            yield grow

    def result(self, titles: Sequence[str], texts: Sequence[str], notes: Sequence[str]) -> None:
        """The answers as they stand at the end, each with a note below it where there is one."""
        self._out.print(self._view(titles, texts, None, notes), soft_wrap=False)

    def _view(
        self, titles: Sequence[str], texts: Sequence[str], height: int | None, notes: Sequence[str] = ()
    ) -> RenderableType:
        width, count = self._out.width, len(titles)
        beside = width >= count * (NARROWEST + 3) + 1
        inner = (width - 3 * count - 1) // count if beside else width - 4
        lines = None if height is None else max(1, height - 4 if beside else height // count - 2)
        cells = [self._cell(text, inner, lines) for text in texts]
        for cell, note in zip(cells, notes):
            if note:
                cell.append(f"\n({note})" if cell.plain else f"({note})", style="dim")
        if not beside:
            return Group(
                *(
                    Panel(cell, title=Text(title, style="bold"), title_align="left")
                    for title, cell in zip(titles, cells)
                )
            )
        table = Table(width=width)
        for title in titles:
            table.add_column(Text(title, style="bold"), ratio=1, overflow="fold")
        table.add_row(*cells)
        return table

    def _cell(self, text: str, width: int, lines: int | None) -> Text:
        """The text, or its last lines as they are wrapped."""
        cell = Text(visible(text).replace("\t", TAB), overflow="fold")
        if lines is None:
            return cell
        # an answer's end is made of its last characters: a long one is not wrapped anew for every picture
        cell = Text(cell.plain[-(lines + 1) * width :], overflow="fold")
        return Text("\n").join(cell.wrap(self._out, width)[-lines:])


def ended(finish: str, tokens: int) -> str:
    """Why an answer is not whole, in words; empty where it is."""
    return {
        "length": f"cut at {tokens:,} tokens; --max-new-tokens allows more",
        "context": f"cut at {tokens:,} tokens: the model's context is full",
        "interrupted": f"stopped after {tokens:,} tokens",
    }.get(finish, "" if tokens else "the answer is empty: the model ended at once")
