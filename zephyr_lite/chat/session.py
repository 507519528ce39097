"""A conversation with one model, or with several at once that are asked the same questions."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.run_dir import StageDir
from ..io.text import expected, shown
from .generate import Chat, Drawn, Message, Sampling, Streamer
from .rows import append_rows, vote_rows

logger = logging.getLogger(__name__)


class Settings(BaseModel):
    """How answers are drawn."""

    model_config = ConfigDict(allow_inf_nan=False)

    temperature: float = Field(0.7, ge=0, le=100)  # 0 is greedy
    top_p: float = Field(0.95, gt=0, le=1)  # the smallest set of tokens with at least this probability
    max_new_tokens: int = Field(512, ge=1)  # of an answer
    seed: int = Field(0, ge=0, le=2**63 - 1)  # equal seeds, settings and turns give equal answers
    system: str | None = None  # the system turn

    def sampling(self, turn: int, attempt: int = 0) -> Sampling:
        """Of the answer to a conversation's question number ``turn``, or of a further answer to it."""
        seed = self.seed * 1_000_003 + turn * 1_009 + attempt
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, seed)

    def changed(self, **values: Any) -> Settings:
        """These settings with other values, numbers or their text. Raises UserError: a number outside its range."""
        try:
            return Settings.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            fault = error.errors()[0]
            name = str(fault["loc"][0]).replace("_", "-")
            raise UserError(f"{name} {shown(fault['input'], 40)}: {expected(fault)}.") from None


@dataclass
class Column:
    """One model and its conversation: questions and its answers."""

    model: str
    turns: list[tuple[str, Drawn]] = field(default_factory=list)

    def messages(self, system: str | None, question: str | None = None, turns: int | None = None) -> list[Message]:
        """The conversation (its first ``turns`` turns), and then a question."""
        found = [{"role": "system", "content": system}] if system else []
        for asked, answer in self.turns[:turns]:
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer.text}]
        return found + ([{"role": "user", "content": question}] if question is not None else [])


class Session:
    """Models of one base that are asked the same questions; each has its own answers in its conversation.

    Attributes:
        columns: one per model.
        settings: of the next answer.
        order: the columns as they are shown; in a blind session the seed, the number of turns and the question decide it.
        waiting: the last answers of a blind session wait for a vote.
        voted: number of votes by model, of "(ties)" and of "(skipped)" questions.
        pairs: number of preference pairs that votes made.

    Args:
        chat: the base with its adapters.
        models: names of models in ``chat.live.models``.
        blind: the conversation of all models continues from the answer that is voted for (``vote``).

    Raises:
        UserError: there is no such model, or the template refuses the system turn.
    """

    def __init__(self, chat: Chat, models: Sequence[str], settings: Settings, blind: bool = False) -> None:
        self.chat, self.settings, self.blind = chat, settings, blind
        self.columns = [Column(name) for name in models]
        self.use(models)
        self.order, self.waiting = list(range(len(models))), False
        self.voted, self.pairs = Counter[str](), 0
        self._attempt = 0  # how often the last question was asked again
        self.check_system(settings.system)

    def use(self, models: Sequence[str]) -> None:
        """Continue the conversation of the first column with other models. Raises UserError: there is no such model."""
        known = self.chat.live.models
        if unknown := [name for name in models if name not in known]:
            raise UserError(
                f"there is no model {shown(repr(unknown[0]))} in {self.chat.live.source}.",
                f"It has {', '.join(known)}.",
            )
        turns = self.columns[0].turns
        self._streamer = Streamer(self.chat, [known[name] for name in models])
        self.columns = [Column(name, list(turns)) for name in models]

    @property
    def turns(self) -> int:
        return len(self.columns[0].turns)

    def check_system(self, system: str | None) -> None:
        """Raises UserError: the chat template refuses this system turn."""
        if system:
            self.chat.prompt_ids([{"role": "system", "content": system}, {"role": "user", "content": "?"}])

    def ask(
        self,
        question: str,
        on_text: Callable[[int, str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        again: bool = False,
    ) -> list[Drawn]:
        """Ask every model, in one batch, and keep the answers (``holds``).

        An interrupted answer is kept as far as it was drawn. If a model had answered nothing yet, or if the session is
        blind, nothing is kept.

        Args:
            question: the user's turn.
            on_text: called with (column, piece of text) as answers come. The pieces together are the answer.
            stop: called at every token; True ends all answers.
            again: the question is the last one: its answers are replaced by other draws.

        Raises:
            UserError: the template refuses the conversation, or it is longer than the context. Nothing is kept then.
        """
        if not question.strip():
            raise UserError("the question is empty.", "Write something.")
        if self.blind:
            self.order.sort()
            random.Random(f"{self.settings.seed} {self.turns} {question}").shuffle(self.order)
        before = self.turns - again
        attempt = self._attempt + 1 if again else 0
        conversations = [column.messages(self.settings.system, question, before) for column in self.columns]
        prompts = [self.chat.prompt_ids(conversation) for conversation in conversations]
        answers = self._streamer.draw(prompts, [self.settings.sampling(before, attempt)] * len(prompts), on_text, stop)
        if not any(answer.finish == "interrupted" and (self.blind or not answer.text) for answer in answers):
            for column, answer in zip(self.columns, answers):
                column.turns[before:] = [(question, answer)]
            self._attempt = attempt
            self.waiting = self.blind and len({answer.text for answer in answers}) > 1
        return answers

    def holds(self, answers: list[Drawn]) -> bool:
        """Whether ``ask`` kept these answers as the last turn."""
        return bool(self.turns) and self.columns[0].turns[-1][1] is answers[0]

    def last_question(self) -> str:
        """The last question; raises UserError if there is none."""
        if not self.turns:
            raise UserError("nothing was asked yet.")
        return self.columns[0].turns[-1][0]

    def undo(self) -> str:
        """Take back the last question, which is returned, and its answers; raises UserError if there is none."""
        question, self.waiting = self.last_question(), False
        for column in self.columns:
            column.turns.pop()
        return question

    def reset(self) -> None:
        """Forget the conversation; settings stay."""
        self.waiting = False
        for column in self.columns:
            column.turns.clear()
        self._streamer.forget()

    def vote(self, choice: str, file: Path) -> str:
        """Continue every model's conversation with one of the last answers; returns what was done.

        Args:
            choice: "skip": the question is taken back; "tie": answer 1; or the number of an answer as it is shown, which is
                added to the file as preferred to each other one. The question is taken back if that fails (OSError).
        """
        prompt = self.columns[0].messages(self.settings.system)[:-1]
        models, answers = [column.model for column in self.columns], [column.turns[-1][1] for column in self.columns]
        question = self.undo()
        if choice == "skip":
            self.voted["(skipped)"] += 1
            return "skipped: the question is taken back"
        kept, done = self.order[0], "a tie makes no pair"
        if choice == "tie":
            choice, name = "1", "(ties)"
        else:
            kept = self.order[int(choice) - 1]
            name = models[kept]
            pairs = vote_rows(prompt, models, answers, kept, self.chat.live.source)
            append_rows(file, pairs)
            self.pairs += len(pairs)
            done = f"pairs added to {file}: {len(pairs)}" if pairs else "no pair: an answer is empty"
        self.voted[name] += 1
        for column in self.columns:
            column.turns.append((question, answers[kept]))
        return f"{done}; the conversation continues from answer {choice}"

    def rows(self) -> list[dict[str, Any]]:
        """The conversations in the training schema: ``messages``, and the model's name, which training ignores."""
        self.last_question()  # raises a UserError if nothing was said
        return [{"messages": column.messages(self.settings.system), "model": column.model} for column in self.columns]


def trained_system(chat: Chat) -> str | None:
    """The default system turn of the stage's training (its configuration's ``system``)."""
    chain = chat.live.chain
    if chain is None or chain.run is None or chain.stage is None:
        return None
    system = read_yaml(StageDir(chain.run / chain.stage).config).get("system")
    return system if isinstance(system, str) and system.strip() else None
