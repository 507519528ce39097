"""How one dialogue grows: an opening question, an answer, a question that comes from the answer, and so on.

The teacher plays both sides. As the assistant it sees the dialogue and nothing else; as the user it is told what to write
a message about, and what a message is.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...client.types import BudgetSpent, Desk, EndpointSpec, Message, Request, RequestFailed
from .draw import seed_of
from .files import valid
from .grid import Cell, Grid
from .near import shingles

QUESTION_TOKENS = 512  # of a user's message, at most
MOST_CHARACTERS = 6000
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
_PART = 0.8  # of a message's words and pairs of words, found in an earlier turn
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}


class NotUsable(Exception):
    """A text that is no message, or no whole answer; ``str(error)`` is the reason under which it is counted."""


@dataclass
class Dialogue:
    """Turns from the user's first to the assistant's last whole answer.

    Attributes:
        messages: {content, role}, user and assistant in turn.
        ended: why it is shorter than was asked for, or "".
        by_budget: whether that was the budget.
    """

    messages: list[Message] = field(default_factory=list)
    ended: str = ""
    by_budget: bool = False

    @property
    def rounds(self) -> int:
        return len(self.messages) // 2


# -- requests --------------------------------------------------------------------------------------------------------


def opening_request(
    user: EndpointSpec,
    grid: Grid,
    number: int,
    attempt: int,
    seed: int,
    examples: Sequence[str],
    avoid: str | None,
) -> Request:
    """The request for the first question of a dialogue.

    Args:
        number: the dialogue's; it says the cell.
        attempt: 0, or how many openings of this dialogue were turned down before.
        seed: of the job.
        examples: prompts of one's own, to show what messages look like.
        avoid: an earlier opening that the last attempt was too near to.
    """
    cell = grid.cell(number)
    rng = random.Random(f"opening {seed} {number} {attempt}")
    lines = [
        "Write one message to an assistant.",
        f"It is about {cell.topic}{_part(cell, grid, number, attempt, seed)}.",
    ]
    lines.append(f"What the person wants from the assistant is {cell.meaning}.")
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


def _part(cell: Cell, grid: Grid, number: int, attempt: int, seed: int) -> str:
    """The parts of a topic take turns from one visit of the cell to the next."""
    if not cell.parts:
        return ""
    start = seed_of(seed, "part", number % len(grid.cells))
    return f", in particular {cell.parts[(start + number // len(grid.cells) + attempt) % len(cell.parts)]}"


def answer_request(teacher: EndpointSpec, number: int, attempt: int, turns: Sequence[Message], seed: int) -> Request:
    """The dialogue so far, as it stands."""
    round_ = len(turns) // 2
    return Request(
        key=f"answer/{number}/{attempt}/{round_}",
        endpoint=teacher.name,
        messages=tuple({"role": turn["role"], "content": turn["content"]} for turn in turns),
        seed=seed_of(seed, "answer", number, attempt, round_),
    )


def follow_up_request(
    user: EndpointSpec, grid: Grid, number: int, attempt: int, turns: Sequence[Message], seed: int
) -> Request:
    """The request for the user's next message, which refines or extends what was asked."""
    round_ = len(turns) // 2
    move = random.Random(f"move {seed} {number} {attempt} {round_}").choice(grid.moves).strip().rstrip(".")
    told = "\n\n".join(f"[{'You' if t['role'] == 'user' else 'The assistant'}]\n{t['content']}" for t in turns)
    return Request(
        key=f"question/{number}/{attempt}/{round_}",
        endpoint=user.name,
        messages=(
            {"role": "system", "content": USER},
            {
                "role": "user",
                "content": (
                    f"This is your conversation with an assistant so far.\n\n{told}\n\n[End]\n\n"
                    f"Write your next message, in the same language. In it you {move.strip().rstrip('.')}. It builds on the "
                    "last answer and can be understood from the conversation alone. No thanks, no praise, no goodbye."
                ),
            },
        ),
        max_tokens=min(QUESTION_TOKENS, user.max_tokens),
        seed=seed_of(seed, "question", number, attempt, round_),
    )


# -- replies ---------------------------------------------------------------------------------------------------------


def read_message(text: str) -> str:
    """The message in a reply: without a label, a preamble or quotation marks around it.

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
    if len(text) > MOST_CHARACTERS:
        raise NotUsable(f"a message of more than {MOST_CHARACTERS:,} characters")
    return text


async def ask_message(desk: Desk, request: Request, quoted: Sequence[str] = (), turns: Sequence[Message] = ()) -> str:
    """The message in the reply to a request.

    Args:
        quoted: what the request shows of other texts (examples); whether the message is too near to one is not seen here.
        turns: the dialogue so far: the message may quote it, but not repeat it. The rest of what the request says is
            instruction, of which no eight words may stand in a message.

    Raises:
        NotUsable, RequestFailed, BudgetSpent.
    """
    reply = await desk.ask(request)
    if reply.finish_reason == "length":
        raise NotUsable("a message cut at max_tokens")
    text = read_message(valid(reply.text))
    asked = "\n".join(message["content"] for message in request.messages)
    if any(repeats(text, turn["content"]) for turn in turns):
        raise NotUsable("a message that repeats an earlier turn")
    for shown in (*quoted, *(turn["content"] for turn in turns)):
        asked = asked.replace(shown, "\n")
    if runs(text) & runs(asked):
        raise NotUsable("a message that hands its instructions back")
    return text


async def ask_answer(desk: Desk, request: Request) -> str:
    """Raises NotUsable, RequestFailed, BudgetSpent."""
    reply = await desk.ask(request)
    if reply.finish_reason == "length":
        raise NotUsable("an answer cut at max_tokens")
    text = valid(reply.text).strip()
    if not text:
        raise NotUsable("an empty answer")
    return text


async def grow(
    desk: Desk,
    teacher: EndpointSpec,
    user: EndpointSpec,
    grid: Grid,
    number: int,
    attempt: int,
    opening: str,
    rounds: int,
    seed: int,
) -> Dialogue:
    """A dialogue of up to so many rounds; what fails on the way ends it with its last whole answer.

    It has no round at all where the first answer failed.
    """
    dialogue = Dialogue()
    question = opening
    try:
        while True:
            turns = [*dialogue.messages, {"content": question, "role": "user"}]
            answer = await ask_answer(desk, answer_request(teacher, number, attempt, turns, seed))
            dialogue.messages = [*turns, {"content": answer, "role": "assistant"}]
            if dialogue.rounds == rounds:
                return dialogue
            request = follow_up_request(user, grid, number, attempt, dialogue.messages, seed)
            question = await ask_message(desk, request, turns=dialogue.messages)
    except BudgetSpent as spent:
        dialogue.ended, dialogue.by_budget = str(spent), True
    except RequestFailed as failed:
        dialogue.ended = failed.reason
    except NotUsable as reason:
        dialogue.ended = str(reason)
    return dialogue


def runs(text: str) -> set[tuple[str, ...]]:
    """Every eight words that follow each other, without case."""
    words = _WORD.findall(text.lower())
    return {tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)}


def repeats(text: str, turn: str) -> bool:
    """Whether a message is an earlier turn, or hardly more than a part of one."""
    if "".join(text.lower().split()) == "".join(turn.lower().split()):
        return True
    mine, its = shingles(text), shingles(turn)
    return len(mine) >= 2 * _RUN and len(mine & its) >= _PART * len(mine)
