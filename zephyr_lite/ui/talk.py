"""The conversation on the page: one loaded base with its adapters, and votes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from html import escape
from pathlib import Path
from typing import Literal

import torch

from ..chat import Chat
from ..chat.rows import check_file
from ..chat.session import Column, Session, Settings, trained_system
from ..errors import UserError
from ..model.loaded import open_live
from .jobs import refuse_while_training

Mode = Literal["one", "compare", "vote"]
REFRESH = 0.3  # seconds between two updates of growing answers


class Talk:
    """The conversation that the page shows. The model is loaded at the first question, and one is loaded at a time.

    Attributes:
        asked: the last question.
        stop: ends the answers that are being drawn.
    """

    def __init__(self) -> None:
        self._source: str | None = None
        self._session: Session | None = None
        self._mode: Mode | None = None
        self.asked = ""
        self.stop = threading.Event()

    @property
    def choices(self) -> list[str]:
        """Of the vote that the last answers wait for; [] if there is none."""
        if self._session is None or not self._session.waiting:
            return []
        return [*(str(place) for place, _ in enumerate(self._session.columns, 1)), "tie", "skip"]

    def ask(
        self,
        source: str,
        mode: Mode,
        question: str,
        votes: str,
        temperature: float | None,
        length: int | None,
        stream: bool,
    ) -> Iterator[str]:
        """Ask the models of a run; yields the conversation as HTML, while the answers grow and at the end.

        Args:
            source: a run's, stage's or model's folder.
            mode: the last model alone; all models; or all of them without their names, for a vote.
            votes: the file of votes.
            temperature, length: as in Settings; None: the last one.
            stream: show the answers while they grow.

        Raises:
            UserError: the source cannot be loaded, the question cannot be asked, or the last vote is missing.
        """
        refuse_while_training()
        self.asked = question
        if self.choices:
            raise UserError("the last answers wait for your vote.", "Vote, or choose skip.")
        if mode == "vote":
            check_file(Path(votes), "chosen", "votes file")
        if self._session is None or source != self._source:
            yield "<p>Loading the model …</p>"
        session = self._open(source, mode)
        settings = {"temperature": temperature, "max_new_tokens": length}
        session.settings = session.settings.changed(
            **{name: value for name, value in settings.items() if value is not None}
        )
        texts = [""] * len(session.columns)
        self.stop.clear()

        def on_text(column: int, piece: str) -> None:
            texts[column] += piece

        with ThreadPoolExecutor(1) as pool:
            try:
                answering = pool.submit(session.ask, question, on_text, self.stop.is_set)
                while stream and not answering.done():
                    yield self.html(question, texts)
                    wait([answering], REFRESH)
                answering.result()
            finally:
                self.stop.set()  # also when the page was closed
        yield self.html()

    def _open(self, source: str, mode: Mode) -> Session:
        if self._session is None or source != self._source:
            self.unload()
            chat = Chat(open_live(source or None))
        elif mode == self._mode:
            return self._session
        else:
            chat = self._session.chat
        live = chat.live
        if mode == "vote" and len(live.models) < 2:
            raise UserError(f"{live.source} is one model; there is nothing to compare it with.", "Choose a run.")
        models = [live.policy] if mode == "one" else list(live.models)
        settings = Settings().changed(system=trained_system(chat))
        self._session = Session(chat, models, settings, blind=mode == "vote")
        self._source, self._mode = source, mode
        return self._session

    def reset(self) -> str:
        """Begin a new conversation with the same model."""
        if self._session is not None:
            self._session.reset()
        return self.html()

    def unload(self) -> None:
        """Free the model's memory."""
        self._session = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def vote(self, choice: str, votes: str) -> str:
        """Add a vote's pairs to the file, and continue from the liked answer; returns what was done.

        Args:
            choice: the number of an answer as it is shown, tie or skip.
        """
        session = self._session
        if session is None or not session.waiting:
            raise UserError("there are no answers to vote on.", "Ask a question first.")
        done = session.vote(choice, Path(votes))
        names = (f"{place} was {session.columns[index].model}" for place, index in enumerate(session.order, 1))
        return f"{done[0].upper()}{done[1:]}. Answer {', '.join(names)}."

    def html(self, question: str = "", texts: Sequence[str] = ()) -> str:
        """The conversation: while votes are given the turns that all models have in common; then a column for each model.

        Args:
            question, texts: the one that is being answered, and each column's answer so far.
        """
        if self._session is None:
            return ""
        session, columns = self._session, self._session.columns
        common = session.turns - session.waiting if session.blind else 0
        sections = ""
        for place, index in enumerate(session.order, 1):
            title = f"Answer {place}" if session.blind else columns[index].model
            turns = _turns(columns[index], common) + (_turn(question, texts[index], "…") if texts else "")
            sections += f"<section><h4>{escape(title)}</h4>{turns}</section>" if turns else ""
        return f'{_turns(columns[0], 0, common)}<div class="zl-columns">{sections}</div>'


def _turns(column: Column, first: int, end: int | None = None) -> str:
    return "".join(_turn(question, answer.text, answer.note) for question, answer in column.turns[first:end])


def _turn(question: str, answer: str, note: str) -> str:
    note = f" <small>({note})</small>" if note else ""
    return f'<div class="zl-asked">{escape(question)}</div><div class="zl-answer">{escape(answer)}{note}</div>'
