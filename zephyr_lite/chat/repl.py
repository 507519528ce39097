"""A chat session in a terminal: questions, answers, votes, and commands that begin with a slash."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..errors import Interrupted, UserError
from ..io.interrupts import StopRequest
from ..io.text import short
from .generate import Drawn
from .rows import Ballot, append_rows, check_file
from .session import MAKE_ROOM, Session

PROMPT, MORE = "> ", "… "
BLOCK = '"""'  # begins and ends a question of several lines
HELP = (
    ("/system TEXT", "set the system turn; none: remove it; alone: show it"),
    ("/temperature X", "0 is greedy; alone: show it"),
    ("/top-p X", "draw from the likeliest tokens of this probability"),
    ("/max-new-tokens N", "maximum length of an answer"),
    ("/seed N", "random seed"),
    ("/settings", "all of these"),
    ("/undo", "take back the last question and its answer"),
    ("/retry", "ask it again, with other draws"),
    ("/reset", "begin a new conversation"),
    ("/history", "the conversation so far"),
    ("/save FILE", "add the conversation to a JSONL file, as `sft` reads it"),
    ("/model NAME", "continue with another model of the run"),
    ("/exit", "end, as Ctrl-D does"),
    ("Ctrl-C", "end an answer; twice: the session"),
    (BLOCK, "begins and ends a question of several lines"),
)
NUMBERS: dict[str, Callable[[str], float]] = {
    "/temperature": float,
    "/top-p": float,
    "/max-new-tokens": int,
    "/seed": int,
}
WITH_TEXT = ("/system", "/save", "/model")  # commands that take a text
NARROWEST = 32  # minimum width of an answer side by side; in narrower terminals they are one below the other
REFRESH = 0.1  # seconds between two updates of growing answers


class Repl:
    """A session in a terminal.

    Args:
        session: its models answer.
        console: ``monitor.console.Console``.
        compare: show their answers side by side.
        ballot: hide the models' names, and keep the user's votes.
    """

    def __init__(self, session: Session, console: Any, compare: bool, ballot: Ballot | None) -> None:
        self.session, self._console, self._compare, self._ballot = session, console, compare, ballot

    def run(self) -> None:
        """Run until Ctrl-D, /exit, or Ctrl-C twice.

        Raises:
            Interrupted: SIGTERM, or Ctrl-C twice.
        """
        with suppress(ImportError):
            import readline  # line editing and history

            readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one question
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        models = " against ".join(column.model for column in self.session.columns)
        names = models if self._ballot is None else "answers without names"
        self._note(f"{self.session.chat.live.source}: {names}. /help lists the commands, Ctrl-D ends.")
        interrupted = False
        before = signal.signal(signal.SIGTERM, _end)  # which otherwise does what Ctrl-C does
        try:
            while True:
                try:
                    line = self._read()
                    interrupted = False
                    if not self._handle(line):
                        break
                except EOFError:
                    self._console.say()
                    break
                except KeyboardInterrupt:
                    self._console.say()
                    if interrupted:
                        raise Interrupted("interrupted") from None
                    interrupted = True
                    self._note("Ctrl-C once more, or Ctrl-D, ends the session.")
        finally:
            signal.signal(signal.SIGTERM, before)
            if self._ballot is not None:
                self._show_votes(self._ballot)

    def _read(self) -> str:
        """Read one question or command; raises EOFError (Ctrl-D) and KeyboardInterrupt (Ctrl-C)."""
        line = input(PROMPT)
        if not line.lstrip().startswith(BLOCK):
            return line.strip()
        text = line.lstrip().removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + input(MORE)
        return text.rstrip().removesuffix(BLOCK).strip("\n")

    def _handle(self, line: str) -> bool:
        """Ask a question or run a command; False: it ends the session. Errors are printed and do not end it."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            if line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            self._console.user_error(error)
        except torch.OutOfMemoryError:
            self._console.user_error(UserError("the GPU's memory is too small for this conversation.", MAKE_ROOM))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._console.user_error(UserError(f"{error.strerror or error}: {error.filename}"))
        return True

    def _note(self, text: str) -> None:
        """Print something about the conversation that is not part of it."""
        self._console.out.print(self._console.text(text, "dim"))

    # -- answers ---------------------------------------------------------------------------------------------------

    def _ask(self, question: str, again: bool = False) -> None:
        """Ask a question, or the last one again."""
        session, out = self.session, self._console.out
        before, titles = session.turns, self._titles(question)

        def draw(on_text: Callable[[int, str], None]) -> list[Drawn]:
            return session.ask(question, on_text, lambda: stop.name is not None, again)

        with StopRequest(None) as stop:
            started = time.monotonic()
            try:
                if self._compare:
                    answers = self._growing(titles, draw)
                else:
                    answers = draw(lambda column, piece: out.print(self._console.text(piece), end=""))
            except KeyboardInterrupt:  # the second one
                raise Interrupted("interrupted") from None
            finally:
                if not self._compare:
                    out.print()
        if self._compare:
            in_order = [answers[column] for column in titles]
            texts, notes = [answer.text for answer in in_order], [ended(answer) for answer in in_order]
            out.print(side_by_side(self._console, [*titles.values()], texts, notes), soft_wrap=False)
        else:
            tokens, seconds = len(answers[0].tokens), time.monotonic() - started
            self._note(ended(answers[0]) or f"{tokens:,} tokens, {tokens / seconds:.1f} tokens/s")
        if stop.name not in (None, "SIGINT"):
            raise Interrupted(f"{stop.name}: the session ended")
        if self._ballot is not None and any(answer.finish == "interrupted" for answer in answers):
            if session.turns and session.columns[0].turns[-1][1] is answers[0]:
                session.undo()
            self._note("stopped: the question is taken back, without a vote")
        elif self._ballot is not None:
            self._vote(self._ballot, list(titles), answers)
        elif session.turns == before and not again:
            self._note("stopped before there was an answer: the question is taken back")

    def _titles(self, question: str) -> dict[int, str]:
        """Column → its title, in the order in which they are shown."""
        columns = self.session.columns
        if self._ballot is None:
            return {place: column.model for place, column in enumerate(columns)}
        order = self._ballot.order(question, self.session.turns, len(columns))
        return {column: f"Answer {place}" for place, column in enumerate(order, 1)}

    def _growing(self, titles: dict[int, str], draw: Callable[..., list[Drawn]]) -> list[Drawn]:
        """Draw several answers, and show their ends while they grow: about as much as the terminal has room for."""
        out, texts, shown = self._console.out, dict.fromkeys(titles, ""), 0.0
        room = out.width * max(1, out.height - 8) // (2 * len(titles))  # characters; half of a line is often empty

        def grow(column: int, piece: str) -> None:
            nonlocal shown
            texts[column] += piece
            if time.monotonic() - shown >= REFRESH:
                tails = [text[-room:] for text in texts.values()]
                live.update(side_by_side(self._console, [*titles.values()], tails), refresh=True)
                shown = time.monotonic()

        with Live(console=out, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
            return draw(grow)

    # -- votes -----------------------------------------------------------------------------------------------------

    def _vote(self, ballot: Ballot, order: list[int], answers: list[Drawn]) -> None:
        session = self.session
        if len({answer.text for answer in answers}) == 1:
            self._note("the answers are all the same: no vote, no pair")
            return
        choice = self._choice(len(order))
        if choice == "s":
            ballot.skipped += 1
            session.undo()
            self._note("skipped: the question is taken back")
            return
        if choice == "t":
            ballot.ties += 1
            session.agree(order[0])
            self._note("a tie, which makes no pair; the conversation continues from answer 1")
            return
        liked = order[int(choice) - 1]
        prompt = session.columns[0].messages(session.settings.system)[:-1]
        try:
            pairs = ballot.best(prompt, [column.model for column in session.columns], answers, liked)
        except BaseException:
            session.undo()  # the vote is not in the file
            raise
        session.agree(liked)
        added = f"{pairs} pair{'s' * (pairs != 1)} added to {ballot.path}" if pairs else "no pair: an answer is empty"
        self._note(f"{added}; the conversation continues from answer {choice}")

    def _choice(self, most: int) -> str:
        """The number of the best answer, "t" (a tie) or "s" (skip)."""
        words = {"t", "s", *map(str, range(1, most + 1))}
        while True:
            try:
                said = input(f"Which is best? 1 to {most}, t(ie), s(kip): ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                self._console.say()
                return "s"
            said = {"tie": "t", "skip": "s"}.get(said, said)
            if said in words:
                return said
            self._note(f"{short(said, 40)} is none of these.")

    def _show_votes(self, ballot: Ballot) -> None:
        """Print the votes by model, and the command that trains on them."""
        if ballot.votes:
            counts = {column.model: ballot.likes[column.model] for column in self.session.columns}
            counts["(ties)"] = ballot.ties
            rows = [(name, str(count), f"{count / ballot.votes:.0%}") for name, count in counts.items()]
            self._console.table(["model", "liked best", "of the votes"], rows)
        skipped = f", {ballot.skipped} skipped" if ballot.skipped else ""
        votes, pairs = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((ballot.votes, "vote"), (ballot.pairs, "pair")))
        self._console.say(f"{votes}{skipped}; {pairs} added to {ballot.path}.")
        if not ballot.pairs:
            return
        words = [f"dataset.path={ballot.path}"]
        chain = self.session.chat.live.chain
        if chain is not None and chain.run is not None:
            words.append(f"output_dir={chain.run}")
            if (chain.run / "dpo").exists():  # a finished stage is not run again
                words.append("stage=voted")
        self._console.say(f"Next: {shlex.join(['zephyr-lite', 'dpo', *words])}")

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Run a command; False: it ends the session. Raises UserError: no such command, or a wrong argument."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        command = getattr(self, "_do_" + {"/?": "help"}.get(name, name[1:]), None)
        if name in NUMBERS:
            self._number(name, rest)
        elif command is None:
            raise UserError(
                f"there is no command {short(name, 40)}.", "/help lists them; // begins a question with a slash."
            )
        elif rest and name not in WITH_TEXT:
            raise UserError(f"{name} takes nothing.", "/help lists the commands.")
        else:
            command(rest)
        return True

    def _do_help(self, text: str) -> None:
        for name, what in HELP:
            self._console.say(f"{name:<19}{what}")

    def _number(self, name: str, given: str) -> None:
        key, settings = name[1:].replace("-", "_"), self.session.settings
        before = getattr(settings, key)
        if given:
            try:
                setattr(settings, key, NUMBERS[name](given))
                settings.check()
            except ValueError:
                raise UserError(f"{name} {short(given, 40)}: is not a valid value.", f"It is {before}.") from None
            except UserError:
                setattr(settings, key, before)
                raise
        self._note(f"{name[1:]} {getattr(settings, key)}")

    def _do_system(self, text: str) -> None:
        settings = self.session.settings
        if text:
            system = None if text in ("none", "''", '""') else text  # '' as with --system
            self.session.check_system(system)
            settings.system = system
        self._note(f"system: {settings.system}" if settings.system else "no system turn")

    def _do_settings(self, text: str) -> None:
        for name in NUMBERS:
            self._number(name, "")
        self._do_system("")

    def _do_undo(self, text: str) -> None:
        question = self.session.undo()
        votes = "; its vote stays in the file" if self._ballot is not None else ""
        self._note(f"taken back: {short(question, 60)}{votes}")

    def _do_retry(self, text: str) -> None:
        if self.session.settings.temperature == 0:
            self._note("temperature 0 gives the same answer again; /temperature 0.7 would not")
        self._ask(self.session.last_question(), again=True)

    def _do_reset(self, text: str) -> None:
        self.session.reset()
        self._note("a new conversation")

    def _do_history(self, text: str) -> None:
        if not self.session.turns:
            self._note("nothing was said yet")
        hidden = self._ballot is not None
        for column in self.session.columns[: 1 if hidden else None]:
            for question, answer in column.turns:
                self._note(f"> {question}")
                self._console.say(answer.text if hidden or not self._compare else f"{column.model}: {answer.text}")

    def _do_save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a file.", "/save FILE.jsonl")
        path = Path(name).expanduser()
        rows, columns = self.session.rows(), self.session.columns
        if self._ballot is not None:  # all hold the answers that were liked
            rows, columns = [{"messages": rows[0]["messages"]}], columns[:1]
        check_file(path, "messages", "/save")
        append_rows(path, rows)
        self._note(f"saved to {path}")
        if cut := sum(answer.finish != "stop" for column in columns for _, answer in column.turns):
            self._note(f"note: {cut} of the answers are cut; training would learn to end there")

    def _do_model(self, name: str) -> None:
        models = self.session.chat.live.models
        if self._compare:
            raise UserError("/model: --compare asks all of its models.", "Start without it to talk to one.")
        if name:
            self.session.switch(name)
        here = self.session.columns[0].model
        self._note(", ".join(f"{model} (this one)" if model == here else model for model in models))


def side_by_side(
    console: Any, titles: Sequence[str], texts: Sequence[str], notes: Sequence[str] = ()
) -> RenderableType:
    """Answers side by side, or one below the other in a narrow terminal."""
    out, count = console.out, len(titles)
    wide = out.width >= count * (NARROWEST + 3) + 1
    cells = [console.text(text) for text in texts]
    for cell, note in zip(cells, notes):
        if note:
            cell.append(f"\n({note})" if cell.plain else f"({note})", style="dim")
    headers = [Text(title, style="bold") for title in titles]
    if not wide:
        return Group(*(Panel(cell, title=title, title_align="left") for title, cell in zip(headers, cells)))
    table = Table(width=out.width)
    for title in headers:
        table.add_column(title, ratio=1, overflow="fold")
    table.add_row(*cells)
    return table


def ended(answer: Drawn) -> str:
    """Why an answer is cut or empty; "" if it is neither."""
    tokens = len(answer.tokens)
    return {
        "length": f"cut at {tokens:,} tokens; --max-new-tokens allows more",
        "context": f"cut at {tokens:,} tokens: the model's context is full",
        "interrupted": f"stopped after {tokens:,} tokens",
    }.get(answer.finish, "" if tokens else "the answer is empty: the model ended at once")


def _end(number: int, frame: Any) -> None:
    raise Interrupted("SIGTERM: the session ended")
