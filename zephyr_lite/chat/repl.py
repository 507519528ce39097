"""A chat session in a terminal: questions, answers, votes, and commands that begin with a slash."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel

from ..errors import UserError
from ..io.interrupts import StopRequest
from ..io.text import short
from .generate import MAKE_ROOM, Drawn
from .rows import append_rows, check_file
from .session import Session

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
    ("/exit, exit, quit", "end, as Ctrl-D does"),
    ("Ctrl-C", "end an answer; twice: the session"),
    (BLOCK, "begins and ends a question of several lines"),
)
NARROWEST = 32  # minimum width of an answer side by side; in narrower terminals they are one below the other
REFRESH = 0.1  # seconds between two updates of growing answers


class Repl:
    """A session in a terminal.

    Args:
        session: its models answer.
        console: ``monitor.console.Console``.
        compare: show their answers side by side.
        votes: hide the models' names, and add the user's choices to this file as preference pairs.
    """

    def __init__(self, session: Session, console: Any, compare: bool, votes: Path | None) -> None:
        self.session, self._console, self._compare, self._votes = session, console, compare, votes
        self._liked: Counter[str] = Counter()  # votes by model, and "(ties)"
        self._skipped = self._pairs = 0

    def run(self) -> None:
        """Run until Ctrl-D, /exit, or Ctrl-C twice.

        Raises:
            KeyboardInterrupt: Ctrl-C twice.
        """
        with suppress(ImportError):
            import readline  # line editing and history

            readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one question
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        live, asked = self.session.chat.live, [column.model for column in self.session.columns]
        others = [model for model in live.models if model not in asked]
        if self._votes is not None:
            who = f"{len(asked)} models answer, without their names"
        elif self._compare:
            who = f"{', '.join(asked)} answer side by side"
        else:
            who = f"{asked[0]} answers" + (f" (/model changes to {' or '.join(others)})" if others else "")
        self._note(f"{live.source}: {who}. /help lists the commands, /exit ends.")
        interrupted = False
        try:
            while True:
                try:
                    line = self._read()
                except EOFError:
                    self._console.say()
                    break
                except KeyboardInterrupt:
                    self._console.say()
                    if interrupted:
                        raise
                    interrupted = True
                    self._note("Ctrl-C once more, or Ctrl-D, ends the session.")
                    continue
                interrupted = False
                if not self._handle(line):
                    break
        finally:
            if self._votes is not None:
                self._show_votes(self._votes)

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
        if line in ("exit", "quit"):  # as in other programs' prompts
            return False
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
        self._console.out.print(self._console.text(text, "dim"), soft_wrap=False)

    def _ask(self, question: str, again: bool = False) -> None:
        """Ask a question, or the last one again, and print the answers while they are drawn."""
        session, console, out = self.session, self._console, self._console.out
        order, titles = list(range(len(session.columns))), [column.model for column in session.columns]
        if self._votes is not None:
            order = session.shown_order(question)
            titles = [f"Answer {place}" for place, _ in enumerate(order, 1)]
        # while answers grow, about as much of their ends as the terminal has room for; half of a line is often empty
        texts, shown = [""] * len(order), 0.0
        room = out.width * max(1, out.height - 8) // (2 * len(order))  # characters
        live = Live(console=out, auto_refresh=False, transient=True, vertical_overflow="crop")

        def on_text(column: int, piece: str) -> None:
            nonlocal shown
            texts[column] += piece
            if not self._compare:
                out.print(console.text(piece), end="")
            elif time.monotonic() - shown >= REFRESH:
                live.update(side_by_side(console, titles, [texts[place][-room:] for place in order]), refresh=True)
                shown = time.monotonic()

        started = time.monotonic()
        # the first Ctrl-C ends the answer, a second one the session
        with StopRequest(None) as stop, live if self._compare else nullcontext():
            answers = session.ask(question, on_text, lambda: stop.name is not None, again)
        if self._compare:
            notes = [f"\n({note})" if (note := ended(answers[place])) else "" for place in order]
            cells = [(answers[place].text + note).strip() for place, note in zip(order, notes)]
            out.print(side_by_side(console, titles, cells), soft_wrap=False)
        else:
            out.print()
            tokens, seconds = len(answers[0].tokens), time.monotonic() - started
            self._note(ended(answers[0]) or f"{tokens:,} tokens, {tokens / seconds:.1f} tokens/s")
        kept = session.holds(answers)
        if self._votes is not None and any(answer.finish == "interrupted" for answer in answers):
            if kept:
                session.undo()
            self._note("stopped: the question is taken back, without a vote")
        elif self._votes is not None:
            self._vote(self._votes, order, answers)
        elif not kept and not again:
            self._note("stopped before there was an answer: the question is taken back")

    def _vote(self, path: Path, order: list[int], answers: list[Drawn]) -> None:
        """Ask which answer is best, and write its pairs.

        Args:
            order: column of each answer, as they were shown.
            answers: of each column.
        """
        session = self.session
        if len({answer.text for answer in answers}) == 1:
            self._note("the answers are all the same: no vote, no pair")
            return
        numbers = [str(place) for place, _ in enumerate(order, 1)]
        said = ""
        while said not in ("t", "tie", "s", "skip", *numbers):
            if said:
                self._note(f"{short(said, 40)} is none of these.")
            try:
                said = input(f"Which is best? 1 to {len(order)}, t(ie), s(kip): ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                self._console.say()
                said = "s"
        if said in ("s", "skip"):
            session.settle(answers, None)
            self._skipped += 1
            self._note("skipped: the question is taken back")
        elif said in ("t", "tie"):
            session.settle(answers, order[0])
            self._liked["(ties)"] += 1
            self._note("a tie, which makes no pair; the conversation continues from answer 1")
        else:
            liked = order[int(said) - 1]
            pairs = session.settle(answers, liked, path)
            self._liked[session.columns[liked].model] += 1
            self._pairs += pairs
            added = f"pairs added to {path}: {pairs}" if pairs else "no pair: an answer is empty"
            self._note(f"{added}; the conversation continues from answer {said}")

    def _show_votes(self, path: Path) -> None:
        """Print the votes by model, and the command that trains on them."""
        votes = self._liked.total()
        if votes:
            names = [*(column.model for column in self.session.columns), "(ties)"]
            rows = [(name, str(self._liked[name]), f"{self._liked[name] / votes:.0%}") for name in names]
            self._console.table(["model", "liked best", "of the votes"], rows)
        self._console.say(f"votes: {votes}; skipped: {self._skipped}; pairs added to {path}: {self._pairs}")
        if not self._pairs:
            return
        words = [f"dataset={path}"]
        chain = self.session.chat.live.chain
        if chain is not None and chain.run is not None:
            words.append(f"output_dir={chain.run}")
            if (chain.run / "dpo").exists():  # a finished stage is not run again
                words.append("stage=voted")
        self._console.say(f"Next: {shlex.join(['zephyr-lite', 'dpo', *words])}")

    def _command(self, line: str) -> bool:
        """Run a command; False: it ends the session. Raises UserError: no such command, or a wrong argument."""
        session, hidden = self.session, self._votes is not None
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/exit" | "/quit" | "/bye":
                return False
            case "/settings" | "/undo" | "/retry" | "/reset" | "/history" if rest:
                raise UserError(f"{name} takes nothing.", "/help lists the commands.")
            case "/help" | "/?":
                for command, what in HELP:
                    self._console.say(f"{command:<19}{what}")
            case "/temperature" | "/top-p" | "/max-new-tokens" | "/seed":
                key = name[1:].replace("-", "_")
                if rest:
                    session.settings = session.settings.changed(**{key: rest})
                self._note(f"{name[1:]} {getattr(session.settings, key)}")
            case "/system":
                if rest:
                    system = None if rest in ("none", "''", '""') else rest  # '' as with --system
                    session.check_system(system)
                    session.settings.system = system
                self._note(f"system: {session.settings.system}" if session.settings.system else "no system turn")
            case "/settings":
                for command in ("/temperature", "/top-p", "/max-new-tokens", "/seed", "/system"):
                    self._command(command)
            case "/undo":
                question = session.undo()
                self._note(f"taken back: {short(question, 60)}{'; its vote stays in the file' if hidden else ''}")
            case "/retry":
                if session.settings.temperature == 0:
                    self._note("temperature 0 gives the same answer again; /temperature 0.7 would not")
                self._ask(session.last_question(), again=True)
            case "/reset":
                session.reset()
                self._note("a new conversation")
            case "/history":
                if not session.turns:
                    self._note("nothing was said yet")
                for column in session.columns[: 1 if hidden else None]:
                    for question, answer in column.turns:
                        self._note(f"> {question}")
                        named = self._compare and not hidden
                        self._console.say(f"{column.model}: {answer.text}" if named else answer.text)
            case "/save":
                self._save(rest)
            case "/model":
                if self._compare:
                    raise UserError("/model: --compare asks all of its models.", "Start without it to talk to one.")
                if rest:
                    session.use([rest])
                here = session.columns[0].model
                models = session.chat.live.models
                self._note(", ".join(f"{model} (this one)" if model == here else model for model in models))
            case _:
                hint = "/help lists them; // begins a question with a slash."
                raise UserError(f"there is no command {short(name, 40)}.", hint)
        return True

    def _save(self, name: str) -> None:
        """Add the conversation to a file."""
        if not name:
            raise UserError("/save needs a file.", "/save FILE.jsonl")
        path = Path(name).expanduser()
        rows, columns = self.session.rows(), self.session.columns
        if self._votes is not None:  # all hold the answers that were liked
            rows, columns = [{"messages": rows[0]["messages"]}], columns[:1]
        check_file(path, "messages", "/save")
        append_rows(path, rows)
        self._note(f"saved to {path}")
        if cut := sum(answer.finish != "stop" for column in columns for _, answer in column.turns):
            self._note(f"note: {cut} of the answers are cut; training would learn to end there")


def side_by_side(console: Any, titles: Sequence[str], texts: Sequence[str]) -> Columns:
    """Answers side by side, or one below the other in a narrow terminal."""
    width = console.out.width // len(titles) - 1
    if width < NARROWEST:
        width = console.out.width - 1
    panels = [
        Panel(console.text(text), title=console.text(title, "bold"), title_align="left")
        for title, text in zip(titles, texts)
    ]
    return Columns(panels, width=width)


def ended(answer: Drawn) -> str:
    """Why an answer is cut or empty; "" if it is neither."""
    tokens = len(answer.tokens)
    return {
        "length": f"cut at {tokens:,} tokens; a higher max-new-tokens allows more",
        "context": f"cut at {tokens:,} tokens: the model's context is full",
        "interrupted": f"stopped after {tokens:,} tokens",
    }.get(answer.finish, "" if tokens else "the answer is empty: the model ended at once")
