"""A session in a terminal: questions, answers, and commands that begin with a slash."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from pathlib import Path

from ..chat.rows import append_rows, check_file
from ..chat.session import Answer, Session
from ..chat.vote import Ballot
from ..errors import Interrupted, UserError
from ..io.interrupts import StopRequest
from ..io.words import short
from .console import Console, visible
from .talk_keys import ended_by_sigterm, quiet_keys, use_readline
from .talk_screen import Screen, ended

PROMPT, MORE = "> ", "… "
BLOCK = '"""'  # begins and ends a question of several lines
HELP = (
    ("/system TEXT", "set the system turn; none: remove it; alone: show it"),
    ("/temperature X", "0 is greedy; alone: show it"),
    ("/top-p X", "draw from the likeliest tokens of this probability"),
    ("/max-new-tokens N", "an answer's length at most"),
    ("/seed N", "of the draws"),
    ("/settings", "all of these"),
    ("/undo", "take back the last question and its answer"),
    ("/retry", "ask it again, with other draws"),
    ("/reset", "begin a new conversation"),
    ("/history", "what was said so far"),
    ("/save FILE", "add the conversation to a JSONL file, as `sft` reads it"),
    ("/model NAME", "go on with another model of the run"),
    ("/exit", "end, as Ctrl-D does"),
)
NUMBERS: dict[str, tuple[str, Callable[[str], float]]] = {
    "/temperature": ("temperature", float),
    "/top-p": ("top_p", float),
    "/max-new-tokens": ("max_new_tokens", int),
    "/seed": ("seed", int),
}


class Talk:
    """Args:
    session: whose models are talked to.
    compare: their answers are shown beside each other.
    ballot: whose answer is whose is hidden, and the user's choices are kept.
    """

    def __init__(self, session: Session, console: Console, compare: bool, ballot: Ballot | None) -> None:
        self.session, self._console, self._compare, self._ballot = session, console, compare, ballot
        self._screen = Screen(console)
        self._saved: tuple[Path, list[object]] | None = None

    # -- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until Ctrl-D, /exit, or Ctrl-C twice.

        Raises:
            Interrupted: SIGTERM, or Ctrl-C twice.
        """
        use_readline()
        live = self.session.chat.live
        who = (
            " against ".join(c.model for c in self.session.columns) if self._ballot is None else "answers without names"
        )
        self._screen.note(f"{live.source}: {who}. /help lists the commands, Ctrl-D ends.")
        impatient = False
        with ended_by_sigterm():
            try:
                while True:
                    try:
                        line = self._read()
                        impatient = False
                    except EOFError:
                        self._console.say()
                        break
                    except KeyboardInterrupt:
                        self._console.say()
                        if impatient:
                            raise Interrupted("interrupted") from None
                        impatient = True
                        self._screen.note("Ctrl-C once more, or Ctrl-D, ends the session.")
                        continue
                    try:
                        if not self._handled(line):
                            break
                    except KeyboardInterrupt:  # between the line and its answer, which asks for two of them
                        impatient = True
                        self._screen.note("Ctrl-C once more, or Ctrl-D, ends the session.")
            except KeyboardInterrupt:
                raise Interrupted("interrupted") from None
            finally:
                self._reveal()

    def _read(self) -> str:
        """One question or command.

        Raises:
            EOFError: Ctrl-D.
            KeyboardInterrupt: Ctrl-C.
        """
        line = _line(PROMPT)
        if not line.lstrip().startswith(BLOCK):
            return line.strip()
        text = line.lstrip().removeprefix(BLOCK)
        while not text.rstrip().endswith(BLOCK):
            text += "\n" + _line(MORE)
        return text.rstrip().removesuffix(BLOCK).strip("\n")

    def _handled(self, line: str) -> bool:
        """Do what a line asks for; False: it ends the session. Nothing that goes wrong ends it."""
        try:
            if not line:
                return True
            if line.startswith("/") and not line.startswith("//"):
                return self._command(line)
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            self._console.user_error(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            self._console.user_error(UserError(f"{error.strerror or error}: {error.filename}"))
        return True

    # -- answers ---------------------------------------------------------------------------------------------------

    def _ask(self, question: str | None) -> None:
        """Ask, or with None ask the last question again."""
        before = [list(column.turns) for column in self.session.columns]
        titles = self._titles(question if question is not None else before[0][-1][0] if before[0] else "")
        places = {column: place for place, column in enumerate(titles)}
        with StopRequest(None) as stop:

            def draw(on_text: Callable[[int, str], None]) -> list[Answer]:
                def stopped() -> bool:
                    return stop.name is not None

                try:
                    if question is None:
                        return self.session.retry(on_text, stopped)
                    return self.session.ask(question, on_text, stopped)
                except KeyboardInterrupt:  # the second one
                    raise Interrupted("interrupted") from None

            if self._compare:
                with self._screen.answers(list(titles.values())) as grow:
                    answers = draw(lambda column, piece: grow(places[column], piece))
                self._screen.result(
                    list(titles.values()),
                    [answers[column].text for column in titles],
                    [ended(answers[column].finish, answers[column].tokens) for column in titles],
                )
            else:
                try:
                    with quiet_keys():
                        answers = draw(self._screen.piece)
                finally:
                    self._screen.end()
                self._told(answers[0])
        if stop.name not in (None, "SIGINT"):
            raise Interrupted(f"{stop.name}: the session ended")
        if self._ballot is not None:
            if any(answer.finish == "interrupted" for answer in answers):
                for column, turns in zip(self.session.columns, before):
                    column.turns = turns
                self._screen.note("stopped: the question is taken back, without a vote")
            else:
                self._vote(self._ballot, list(titles), answers)
        elif self.session.turns <= len(before[0]) and question is not None:
            self._screen.note("stopped before there was an answer: the question is taken back")

    def _told(self, answer: Answer) -> None:
        speed = f", {answer.tokens / answer.seconds:.1f} tokens/s" if answer.seconds > 0 else ""
        how = ended(answer.finish, answer.tokens)
        self._screen.note(how or f"{answer.tokens:,} tokens{speed}")

    def _titles(self, question: str) -> dict[int, str]:
        """Column → its title, in the order in which they are shown."""
        columns = self.session.columns
        if self._ballot is None:
            return {place: column.model for place, column in enumerate(columns)}
        order = self._ballot.order(question, self.session.turns, len(columns))
        return {column: f"Answer {place}" for place, column in enumerate(order, 1)}

    # -- votes -----------------------------------------------------------------------------------------------------

    def _vote(self, ballot: Ballot, order: list[int], answers: list[Answer]) -> None:
        if len({answer.text for answer in answers}) == 1:
            self._screen.note("the answers are all the same: no vote, no pair")
            return
        choice = self._choice(len(order))
        if choice == "skip":
            ballot.skip()
            self.session.undo()
            self._screen.note("skipped: the question is taken back")
            return
        if choice == "tie":
            ballot.tie()
            self.session.agree(order[0])
            self._screen.note("a tie, which makes no pair; the conversation goes on from answer 1")
            return
        assert isinstance(choice, int)
        liked = order[choice - 1]
        models = [column.model for column in self.session.columns]
        try:
            pairs = ballot.best(
                self.session.columns[0].messages(self.session.settings.system)[:-1], models, answers, liked
            )
        except BaseException:
            self.session.undo()  # a vote that is not kept leaves no trace
            raise
        self.session.agree(liked)
        added = f"{pairs} pair{'s' * (pairs != 1)} added to {ballot.path}" if pairs else "no pair: an answer is empty"
        self._screen.note(f"{added}; the conversation goes on from answer {choice}")

    def _choice(self, most: int) -> int | str:
        """The place of the best answer, from 1; "tie" or "skip"."""
        words = {"t": "tie", "tie": "tie", "s": "skip", "skip": "skip"}
        while True:
            try:
                said = _line(f"Which is best? 1 to {most}, t(ie), s(kip): ").strip().lower()
            except (EOFError, KeyboardInterrupt):
                self._console.say()
                return "skip"
            if said in words:
                return words[said]
            if said.isdecimal() and 1 <= int(said) <= most:
                return int(said)
            self._screen.note(f"{short(said, 40)} is none of these.")

    def _reveal(self) -> None:
        """Whose answers were liked."""
        if self._ballot is None:
            return
        tally, file = self._ballot.tally, self._ballot.path
        if tally.votes:
            counts = [(column.model, tally.best[column.model]) for column in self.session.columns]
            rows = [
                [name, str(count), f"{count / tally.votes:.0%}"] for name, count in [*counts, ("(ties)", tally.ties)]
            ]
            self._console.table(["model", "liked best", "of the votes"], rows)
        skipped = f", {tally.skipped} skipped" if tally.skipped else ""
        votes, pairs = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((tally.votes, "vote"), (tally.pairs, "pair")))
        self._console.say(f"{votes}{skipped}; {pairs} added to {file}.")
        if tally.pairs:
            self._console.say(f"Next: {self._next(file)}")

    def _next(self, file: Path) -> str:
        """The command that trains on the votes, for the run that was talked to; a finished stage is not run again."""
        words = [f"dataset.path={file}"]
        chain = self.session.chat.live.chain
        if chain is not None and chain.run is not None:
            words.append(f"output_dir={chain.run}")
            if (chain.run / "dpo").exists():
                number = next(n for n in itertools.count(1) if not (chain.run / _voted(n)).exists())
                words.append(f"stage={_voted(number)}")
        return " ".join(["zephyr-lite dpo", *(shlex.quote(word) for word in words)])

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Raises UserError: there is no such command, or what it is given does not do."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        if name in NUMBERS:
            self._number(name, rest)
            return True
        known: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/?": self._help,
            "/system": self._system,
            "/settings": self._settings,
            "/undo": self._undo,
            "/retry": self._retry,
            "/reset": self._reset,
            "/history": self._history,
            "/save": self._save,
            "/model": self._model,
        }
        if name not in known:
            raise UserError(
                f"there is no command {visible(name)[:40]}.", "/help lists them; // begins a question with a slash."
            )
        if rest and name not in ("/system", "/save", "/model"):
            raise UserError(f"{name} takes nothing.", "/help lists the commands.")
        known[name](rest)
        return True

    def _help(self, _: str) -> None:
        for name, what in HELP:
            self._console.say(f"{name:<19}{what}")
        self._console.say(f"{'Ctrl-C':<19}end an answer; twice: the session")
        self._console.say(f"{BLOCK:<19}begins and ends a question of several lines")

    def _number(self, name: str, given: str) -> None:
        key, kind = NUMBERS[name]
        settings = self.session.settings
        before = getattr(settings, key)
        if given:
            try:
                setattr(settings, key, kind(given))
                settings.check()
            except ValueError:
                raise UserError(
                    f"{name} {visible(given)[:40]}: is no number of this kind.", f"It is {before}."
                ) from None
            except UserError:
                setattr(settings, key, before)
                raise
        self._screen.note(f"{name.removeprefix('/')} {getattr(settings, key)}")

    def _system(self, text: str) -> None:
        settings = self.session.settings
        if text:
            system = None if text in ("none", "''", '""') else text  # '' as with --system
            self.session.check_system(system)
            settings.system = system
        self._screen.note(f"system: {settings.system}" if settings.system else "no system turn")

    def _settings(self, _: str) -> None:
        for name in NUMBERS:
            self._number(name, "")
        self._system("")

    def _undo(self, _: str) -> None:
        question = self.session.undo()
        votes = "; its vote stays in the file" if self._ballot is not None else ""
        self._screen.note(f"taken back: {short(question, 60)}{votes}")

    def _retry(self, _: str) -> None:
        if not self.session.turns:
            raise UserError("nothing was asked yet.")
        if self.session.settings.temperature == 0:
            self._screen.note("temperature 0 gives the same answer again; /temperature 0.7 would not")
        self._ask(None)

    def _reset(self, _: str) -> None:
        self.session.reset()
        self._screen.note("a new conversation")

    def _history(self, _: str) -> None:
        if not self.session.turns:
            self._screen.note("nothing was said yet")
        hidden = self._ballot is not None
        for column in self.session.columns[: 1 if hidden else None]:
            for question, answer in column.turns:
                self._screen.note(f"> {question}")
                self._console.say(answer.text if hidden or not self._compare else f"{column.model}: {answer.text}")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save: where to?", "/save FILE.jsonl")
        path = Path(name).expanduser()
        rows = self.session.rows()
        if self._ballot is not None:
            rows = [{"messages": rows[0]["messages"]}]  # they all hold the answers that were liked
        there = check_file(path, "sft", "/save")
        if self._saved == (path.resolve(), rows) and there:
            raise UserError(f"this conversation is in {path} already.", "Say more first.")
        append_rows(path, rows)
        self._saved = (path.resolve(), list(rows))
        count = f"row {there + 1}" if len(rows) == 1 else f"rows {there + 1} to {there + len(rows)}"
        self._screen.note(f"saved as {count} of {path}")
        if cut := self.session.cut(first=self._ballot is not None):
            self._screen.note(
                f"note: {cut} of the answers did not come to their end; training would learn to end there"
            )

    def _model(self, name: str) -> None:
        models = self.session.chat.live.models
        if self._compare:
            raise UserError("/model: --compare asks all of its models.", "Start without it to talk to one.")
        if name:
            self.session.switch(name)
        here = self.session.columns[0].model
        self._screen.note(", ".join(f"{model} (this one)" if model == here else model for model in models))


def _voted(number: int) -> str:
    return f"voted{number if number > 1 else ''}"


def _line(prompt: str) -> str:
    """Raises EOFError, KeyboardInterrupt; a line that is no text is asked for again."""
    while True:
        try:
            line = input(prompt)
            line.encode("utf-8")
            return line
        except UnicodeError:
            print("That was not UTF-8; say it again.")
