"""A chat session in a terminal: questions, answers, votes, and commands that begin with a slash."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel

from ..errors import UserError
from ..io.interrupts import StopRequest
from ..io.text import short
from .generate import MAKE_ROOM
from .rows import append_rows, check_file
from .session import Session

PROMPT, MORE = "> ", "… "
ENDS = ("exit", "quit", "/exit", "/quit", "/bye")  # as in other programs' prompts
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


class Repl:
    """A session in a terminal.

    Args:
        session: its models answer.
        console: ``monitor.console.Console``.
        compare: show their answers side by side.
        votes: the file of a blind session's votes.
    """

    def __init__(self, session: Session, console: Any, compare: bool, votes: Path | None) -> None:
        self.session, self._console, self._compare, self._votes = session, console, compare, votes

    def run(self) -> None:
        """Run until Ctrl-D, /exit, or Ctrl-C twice, which raises KeyboardInterrupt."""
        with suppress(ImportError):
            import readline  # line editing and history

            readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text is one question
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
            while (line := self._read(interrupted)) not in ENDS:
                interrupted = line is None
                if line:
                    self._handle(line)
        finally:
            if self._votes is not None:
                self._show_votes(self._votes)

    def _read(self, interrupted: bool) -> str | None:
        """A question or command; "/exit" at Ctrl-D, None at Ctrl-C. KeyboardInterrupt: Ctrl-C after an interrupt."""
        try:
            line = input(PROMPT)
            if not line.lstrip().startswith(BLOCK):
                return line.strip()
            text = line.lstrip().removeprefix(BLOCK)
            while not text.rstrip().endswith(BLOCK):
                text += "\n" + input(MORE)
            return text.rstrip().removesuffix(BLOCK).strip("\n")
        except EOFError:
            self._console.say()
            return "/exit"
        except KeyboardInterrupt:
            self._console.say()
            if interrupted:
                raise
            self._note("Ctrl-C once more, or Ctrl-D, ends the session.")
            return None

    def _handle(self, line: str) -> None:
        """Ask a question or run a command. Errors are printed and do not end the session."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self._command(line)
            else:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            self._console.user_error(error)
        except torch.OutOfMemoryError:
            self._console.user_error(UserError("the GPU's memory is too small for this conversation.", MAKE_ROOM))
        except BrokenPipeError:
            raise
        except OSError as error:
            self._console.user_error(UserError(f"{error.strerror or error}: {error.filename}"))

    def _note(self, text: str) -> None:
        """Print something about the conversation that is not part of it."""
        self._console.out.print(self._console.text(text, "dim"), soft_wrap=False)

    def _ask(self, question: str, again: bool = False) -> None:
        """Ask a question, or the last one again, and print the answers while they are drawn."""
        session, console, out = self.session, self._console, self._console.out
        texts = [""] * len(session.columns)
        # while answers grow, about as much of their ends as the terminal has room for; half of a line is often empty
        room = out.width * max(1, out.height - 8) // (2 * len(texts))  # characters

        def on_text(column: int, piece: str) -> None:
            texts[column] += piece
            if not self._compare:
                out.print(console.text(piece), end="")

        def growing() -> Columns:
            return self._side_by_side([text[-room:] for text in texts])

        started = time.monotonic()
        live = Live(get_renderable=growing, console=out, refresh_per_second=10, transient=True)
        # the first Ctrl-C ends the answer, a second one the session
        with StopRequest(None) as stop, live if self._compare else nullcontext():
            answers = session.ask(question, on_text, lambda: stop.name is not None, again)
        if self._compare:
            notes = [f"\n({answer.note})" if answer.note else "" for answer in answers]
            cells = [(answer.text + note).strip() for answer, note in zip(answers, notes)]
            out.print(self._side_by_side(cells), soft_wrap=False)
        else:
            out.print()
            tokens, seconds = len(answers[0].tokens), time.monotonic() - started
            self._note(answers[0].note or f"{tokens:,} tokens, {tokens / seconds:.1f} tokens/s")
        if not session.holds(answers):
            self._note("stopped: nothing was added to the conversation")
        elif session.waiting:
            self._vote(len(answers))
        elif self._votes is not None:
            self._note("the answers are all the same: no vote, no pair")

    def _side_by_side(self, texts: Sequence[str]) -> Columns:
        """Texts of the columns side by side, or one below the other in a narrow terminal."""
        session, text, width = self.session, self._console.text, self._console.out.width // len(texts) - 1
        if width < NARROWEST:
            width = self._console.out.width - 1
        panels = []
        for place, index in enumerate(session.order, 1):
            title = f"Answer {place}" if session.blind else session.columns[index].model
            panels.append(Panel(text(texts[index]), title=text(title, "bold"), title_align="left"))
        return Columns(panels, width=width)

    def _vote(self, count: int) -> None:
        """Ask which answer is best."""
        assert self._votes is not None
        known = {"t": "tie", "tie": "tie", "s": "skip", "skip": "skip", **{str(n): str(n) for n in range(1, count + 1)}}
        said = ""
        while said not in known:
            if said:
                self._note(f"{short(said, 40)} is none of these.")
            try:
                said = input(f"Which is best? 1 to {count}, t(ie), s(kip): ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                self._console.say()
                said = "s"
        self._note(self.session.vote(known[said], self._votes))

    def _show_votes(self, path: Path) -> None:
        """Print the votes by model, and the command that trains on them."""
        session, names = self.session, [*(column.model for column in self.session.columns), "(ties)"]
        if votes := sum(session.voted[name] for name in names):
            rows = [(name, str(session.voted[name]), f"{session.voted[name] / votes:.0%}") for name in names]
            self._console.table(["model", "liked best", "of the votes"], rows)
        skipped = session.voted["(skipped)"]
        self._console.say(f"votes: {votes}; skipped: {skipped}; pairs added to {path}: {session.pairs}")
        if not session.pairs:
            return
        words = [f"dataset={path}"]
        chain = session.chat.live.chain
        if chain is not None and chain.run is not None:
            words.append(f"output_dir={chain.run}")
            if (chain.run / "dpo").exists():  # a finished stage is not run again
                words.append("stage=voted")
        self._console.say(f"Next: {shlex.join(['zephyr-lite', 'dpo', *words])}")

    def _show_setting(self, key: str) -> None:
        value = getattr(self.session.settings, key)
        self._note(f"{key.replace('_', '-')}: {'none' if value is None else value}")

    def _command(self, line: str) -> None:
        """Run a command. Raises UserError: no such command, or a wrong argument."""
        session = self.session
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/settings" | "/undo" | "/retry" | "/reset" | "/history" if rest:
                raise UserError(f"{name} takes nothing.", "/help lists the commands.")
            case "/help" | "/?":
                for command, what in HELP:
                    self._console.say(f"{command:<19}{what}")
            case "/temperature" | "/top-p" | "/max-new-tokens" | "/seed" | "/system":
                key = name[1:].replace("-", "_")
                if rest:
                    none = key == "system" and rest in ("none", "''", '""')  # '' as with --system
                    changed = session.settings.changed(**{key: None if none else rest})
                    session.check_system(changed.system)
                    session.settings = changed
                self._show_setting(key)
            case "/settings":
                for key in type(session.settings).model_fields:
                    self._show_setting(key)
            case "/undo":
                vote = "; its vote stays in the file" if session.blind else ""
                self._note(f"taken back: {short(session.undo(), 60)}{vote}")
            case "/retry":
                if session.settings.temperature == 0:
                    self._note("temperature 0 gives the same answer again; /temperature 0.7 would not")
                self._ask(session.last_question(), again=True)
            case "/reset":
                session.reset()
                self._note("a new conversation")
            case "/history":
                session.last_question()  # raises a UserError if there is none
                for column in session.columns[: 1 if session.blind else None]:
                    for question, answer in column.turns:
                        self._note(f"> {question}")
                        named = self._compare and not session.blind
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

    def _save(self, name: str) -> None:
        """Add the conversation to a file."""
        if not name:
            raise UserError("/save needs a file.", "/save FILE.jsonl")
        path = Path(name).expanduser()
        rows, columns = self.session.rows(), self.session.columns
        if self.session.blind:  # all hold the answers that were liked
            rows, columns = [{"messages": rows[0]["messages"]}], columns[:1]
        check_file(path, "messages", "/save")
        append_rows(path, rows)
        self._note(f"saved to {path}")
        if cut := sum(answer.finish != "stop" for column in columns for _, answer in column.turns):
            self._note(f"note: {cut} of the answers are cut; training would learn to end there")
