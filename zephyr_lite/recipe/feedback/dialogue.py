"""One dialogue: its cell of the grid, the requests that a teacher gets in both roles, and what counts as a message.

As the assistant the teacher sees the dialogue and nothing else; as the user it is told what to write a message about.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...client.client import BudgetSpent, ModelClient, Request, RequestFailed, seed_of
from ...client.endpoints import Message
from ...client.jobs import NotBlank, validated
from ...config.strict_yaml import read_yaml
from .config import DistillConfig

GRID = Path(__file__).parent / "grid.yaml"
QUESTION_TOKENS = 512  # of a user's message, at most
MAX_CHARACTERS = 6000
USER = (
    "You write what a person types to an AI assistant. You are that person, never the assistant: you ask, request, and "
    "say what you want; you do not answer. Your reply is the message itself, word for word as it is sent: no quotation "
    "marks around it, no heading, no comment."
)
_LABEL = re.compile(r"^\W{0,3}(?:user|human|message|prompt|question)\W{0,3}:\W{0,3}\s*", re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)?)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE
)
_WORD = re.compile(r"\w+")
_RUN = 8  # words in a row that are no coincidence
_REPEATED = 0.8  # of a message's shingles that an earlier turn has too
_FEW_WORDS = 4
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}


# -- the grid --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A topic, its parts, a kind of text, and the kind in words."""

    topic: str
    parts: tuple[str, ...]
    kind: str
    meaning: str


@dataclass(frozen=True)
class Grid:
    """Cells in the order in which they are filled, ways to put an opening, and what a user does next."""

    cells: tuple[Cell, ...]
    manners: tuple[str, ...]
    moves: tuple[str, ...]

    def cell(self, number: int) -> Cell:
        """The cell of a dialogue: all cells in turn, so that their counts differ by one at most."""
        return self.cells[number % len(self.cells)]


class GridFile(BaseModel):
    """The keys of a grid's YAML file: topics {name: parts} and kinds {name: meaning}, or lists of names."""

    model_config = ConfigDict(extra="forbid")

    topics: dict[NotBlank, list[NotBlank] | None] = Field(min_length=1)
    kinds: dict[NotBlank, str | None] = Field(min_length=1)
    manners: list[NotBlank] | None = None
    moves: list[NotBlank] | None = None

    @field_validator("topics", "kinds", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list) else value


def read_grid(path: Path | None, seed: int) -> Grid:
    """A grid from YAML; manners and moves that it lacks are the built-in ones.

    Args:
        path: a file; None: the built-in grid.
        seed: of the cells' order.

    Raises:
        UserError: the file cannot be read, or has another form.
    """
    own, built_in = (validated(GridFile, read_yaml(file), str(file)) for file in (path or GRID, GRID))
    cells = [
        Cell(topic, tuple(own.topics[topic] or ()), kind, own.kinds[kind] or kind)
        for topic, kind in spread(list(own.topics), list(own.kinds), seed)
    ]
    manners, moves = own.manners or built_in.manners, own.moves or built_in.moves
    return Grid(tuple(cells), tuple(manners or ()), tuple(moves or ()))


def spread(topics: list[str], kinds: list[str], seed: int) -> list[tuple[str, str]]:
    """Every (topic, kind) once, in an order whose every beginning has all topics about equally often, and all kinds."""
    rng = random.Random(f"cells {seed}")
    topics, kinds = rng.sample(topics, len(topics)), rng.sample(kinds, len(kinds))
    period = math.lcm(len(topics), len(kinds))
    return [
        (topics[place % len(topics)], kinds[(place + place // period) % len(kinds)])
        for place in range(len(topics) * len(kinds))
    ]


# -- requests --------------------------------------------------------------------------------------------------------


def opening_request(
    config: DistillConfig, grid: Grid, number: int, attempt: int, examples: Sequence[str], avoid: str | None
) -> Request:
    """The request for the first question of a dialogue.

    Args:
        number: the dialogue's; it determines the cell.
        attempt: number of openings of this dialogue that were turned down before.
        examples: prompts that show what messages look like.
        avoid: an earlier opening that the last attempt was too similar to.
    """
    cell, user, seed = grid.cell(number), config.user_endpoint, config.seed
    rng = random.Random(f"opening {seed} {number} {attempt}")
    part = ""
    if cell.parts:  # the parts of a topic take turns from one visit of the cell to the next
        start = seed_of(seed, "part", number % len(grid.cells))
        part = f", in particular {cell.parts[(start + number // len(grid.cells) + attempt) % len(cell.parts)]}"
    lines = [
        "Write one message to an assistant.",
        f"It is about {cell.topic}{part}.",
        f"What the person wants from the assistant is {cell.meaning}.",
    ]
    if grid.manners:
        lines.append(rng.choice(grid.manners))
    lines.append("Everything that the assistant needs for the task must stand in the message.")
    if examples:
        shown = "\n".join(f"<example>\n{text}\n</example>" for text in examples)
        lines.append(f"Messages of other people, to show how they write (the subject is another one):\n{shown}")
    if avoid is not None:
        lines.append(f"This has been asked already; ask for something clearly different:\n<asked>\n{avoid}\n</asked>")
    return Request(
        key=f"opening/{number}/{attempt}",
        endpoint=user.name,
        messages=({"role": "system", "content": USER}, {"role": "user", "content": "\n\n".join(lines)}),
        max_tokens=min(QUESTION_TOKENS, user.max_tokens),
        seed=seed_of(seed, "opening", number, attempt),
    )


def answer_request(config: DistillConfig, number: int, attempt: int, turns: Sequence[Message]) -> Request:
    """The request for the assistant's next answer: the dialogue so far."""
    round_ = len(turns) // 2
    return Request(
        key=f"answer/{number}/{attempt}/{round_}",
        endpoint=config.teacher.name,
        messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in turns),
        seed=seed_of(config.seed, "answer", number, attempt, round_),
    )


def follow_up_request(
    config: DistillConfig, grid: Grid, number: int, attempt: int, turns: Sequence[Message]
) -> Request:
    """The request for the user's next message, which refines or extends what was asked."""
    user, seed, round_ = config.user_endpoint, config.seed, len(turns) // 2
    move = random.Random(f"move {seed} {number} {attempt} {round_}").choice(grid.moves).strip().rstrip(".")
    history = "\n\n".join(f"[{'You' if t['role'] == 'user' else 'The assistant'}]\n{t['content']}" for t in turns)
    asked = (
        f"This is your conversation with an assistant so far.\n\n{history}\n\n[End]\n\n"
        f"Write your next message, in the same language. In it you {move}. It builds on the "
        "last answer and can be understood from the conversation alone. No thanks, no praise, no goodbye."
    )
    return Request(
        key=f"question/{number}/{attempt}/{round_}",
        endpoint=user.name,
        messages=({"role": "system", "content": USER}, {"role": "user", "content": asked}),
        max_tokens=min(QUESTION_TOKENS, user.max_tokens),
        seed=seed_of(seed, "question", number, attempt, round_),
    )


# -- replies ---------------------------------------------------------------------------------------------------------


class NotUsable(Exception):
    """A text that is no message, or no whole answer; ``str(error)`` is the reason under which it is counted."""


@dataclass
class Dialogue:
    """Turns from the user's first to the assistant's last whole answer.

    Attributes:
        messages: {content, role}, user and assistant in turn.
        ended: why it has fewer rounds than were asked for, or "".
        by_budget: whether the budget was the reason.
    """

    messages: list[Message] = field(default_factory=list)
    ended: str = ""
    by_budget: bool = False

    @property
    def rounds(self) -> int:
        return len(self.messages) // 2


def read_message(text: str) -> str:
    """The message in a reply, without reasoning, a label, a preamble or quotation marks around it.

    Raises:
        NotUsable: it is empty or too long.
    """
    text = text.rpartition("</think>")[2].strip()
    text = _PREAMBLE.sub("", text, count=1).strip()
    text = _LABEL.sub("", text, count=1).strip()
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[-1] not in text[1:-1]:
        text = text[1:-1].strip()
    if sum(character.isalnum() for character in text) < 6:
        raise NotUsable("a message of less than six letters")
    if len(text) > MAX_CHARACTERS:
        raise NotUsable(f"a message of more than {MAX_CHARACTERS:,} characters")
    return text


async def ask_message(
    client: ModelClient, request: Request, quoted: Sequence[str] = (), turns: Sequence[Message] = ()
) -> str:
    """The user's message in the reply to a request.

    Args:
        quoted: other texts that the request shows (examples), which the message may repeat.
        turns: the dialogue so far, which the message may quote. The rest of the request is instruction, of which the
            message may hold no eight words in a row.

    Raises:
        NotUsable, RequestFailed, BudgetSpent.
    """
    reply = await client.ask(request)
    if reply.finish_reason == "length":
        raise NotUsable("a message cut at max_tokens")
    text = read_message(reply.text)
    if any(repeats(text, turn["content"]) for turn in turns):
        raise NotUsable("a message that repeats an earlier turn")
    instruction = "\n".join(message["content"] for message in request.messages)
    for shown in (*quoted, *(turn["content"] for turn in turns)):
        instruction = instruction.replace(shown, "\n")
    if _runs(text) & _runs(instruction):
        raise NotUsable("a message that hands its instructions back")
    return text


async def ask_answer(client: ModelClient, request: Request) -> str:
    """The assistant's answer. Raises NotUsable, RequestFailed, BudgetSpent."""
    reply = await client.ask(request)
    if reply.finish_reason == "length":
        raise NotUsable("an answer cut at max_tokens")
    text = reply.text.strip()
    if not text:
        raise NotUsable("an empty answer")
    return text


async def grow(
    client: ModelClient, config: DistillConfig, grid: Grid, number: int, attempt: int, opening: str
) -> Dialogue:
    """A dialogue of up to ``config.rounds`` rounds. A failure ends it with its last whole answer; if the first answer fails, it
    has no round."""
    dialogue = Dialogue()
    question = opening
    try:
        while True:
            turns = [*dialogue.messages, {"content": question, "role": "user"}]
            answer = await ask_answer(client, answer_request(config, number, attempt, turns))
            dialogue.messages = [*turns, {"content": answer, "role": "assistant"}]
            if dialogue.rounds == config.rounds:
                return dialogue
            request = follow_up_request(config, grid, number, attempt, dialogue.messages)
            question = await ask_message(client, request, turns=dialogue.messages)
    except BudgetSpent as spent:
        dialogue.ended, dialogue.by_budget = str(spent), True
    except RequestFailed as failed:
        dialogue.ended = failed.reason
    except NotUsable as reason:
        dialogue.ended = str(reason)
    return dialogue


def shingles(text: str) -> set[str]:
    """Words and pairs of words in lower case; of a text of few words (or a script without spaces) runs of three
    characters."""
    words = _WORD.findall(text.lower())
    if len(words) >= _FEW_WORDS:
        return {*words, *(f"{a} {b}" for a, b in pairwise(words))}
    joined = " ".join(words)
    return {joined[i : i + 3] for i in range(max(1, len(joined) - 2))}


def repeats(text: str, turn: str) -> bool:
    """Whether a message is an earlier turn, or hardly more than a part of one."""
    if "".join(text.lower().split()) == "".join(turn.lower().split()):
        return True
    own, its = shingles(text), shingles(turn)
    return len(own) >= 2 * _RUN and len(own & its) >= _REPEATED * len(own)


def _runs(text: str) -> set[tuple[str, ...]]:
    """Every eight words in a row, in lower case."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}
