"""``zephyr-lite distill``: dialogues that a teacher writes, spread evenly over a grid of topics and kinds.

As the assistant the teacher sees the dialogue and nothing else; as the user it is told what to write a message about.

Each dialogue has a number, which belongs to a cell. A number whose opening is turned down (too similar to an earlier one,
unusable, without a first answer) gets another in the next pass, up to ``tries`` times. Openings are asked for in parallel and
compared in the order of their numbers: the result depends neither on which reply came first nor on interruptions.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .. import __version__
from ..client.client import BudgetSpent, ModelClient, Request, RequestFailed, seed_of
from ..client.cost import Bound, Meter, prompt_bound
from ..client.endpoints import EndpointSpec, Message
from ..client.jobs import NotBlank, claim_folder, distinct_name, in_order, json_line, run_job, validated
from ..client.request_log import Totals
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.atomic import file_aside, write_json
from .feedback import CONTINUES, EndpointKey, ModelJobConfig, client_of, nothing_made
from .prompts import Prompts, PromptsKey

COMMAND = "distill"
TRAIN, TEST, REPORT = "train_sft.jsonl", "test_sft.jsonl", "report.json"
GRID = Path(__file__).parent / "grid.yaml"
NEAR = "too near to an earlier opening or to a seed"
NO_ANSWER = "no first answer"
BUDGET = "the budget"
SAMPLE = 2000  # openings whose length is measured for the upper bound
QUESTION_TOKENS = 512  # of a user's message, at most
MAX_CHARACTERS = 6000
USER = (
    "You write what a person types to an AI assistant. You are that person, never the assistant: you ask, request, and "
    "say what you want; you do not answer. Your reply is the message itself, word for word as it is sent: no quotation "
    "marks around it, no heading, no comment."
)


class DistillConfig(ModelJobConfig):
    """Dialogues written by a teacher: the keys of --config."""

    teacher: EndpointKey  # answers
    user: EndpointKey | None = None  # writes the user's turns; the teacher by default
    count: int | None = Field(None, ge=1)  # dialogues; one for each cell of the grid (600), or for each seed
    rounds: int = Field(3, ge=1, le=20)  # question and answer, at most, in a dialogue
    tries: int = Field(4, ge=1, le=20)  # openings asked for one dialogue before it is left out
    similarity: float = Field(0.7, gt=0, le=1)  # Jaccard similarity from which two openings are near-duplicates
    grid: str | None = None  # YAML with topics, kinds, manners, moves, instead of the built-in one
    # grid: the first questions are written for the grid's cells; seeds: they are the seeds themselves, in order
    openings: Literal["grid", "seeds"] = "grid"
    seeds: PromptsKey | None = None  # one's own prompts: shown as examples, or taken as first questions
    examples: int = Field(2, ge=1, le=8)  # number of seeds shown at a time
    test_share: float = Field(0.02, ge=0, lt=1)  # of the dialogues, by a hash of their first question

    @model_validator(mode="after")
    def _named(self) -> DistillConfig:
        if self.openings == "seeds" and self.seeds is None:
            raise UserError("openings: seeds needs seeds.", "Give --seeds FILE, or leave openings out.")
        if self.openings == "seeds" and self.grid is not None:
            raise UserError("openings: seeds uses no grid.", "Leave one of them out.")
        self.user = self.teacher if self.user is None else distinct_name(self.user, [self.teacher], "user")
        return self

    @property
    def user_endpoint(self) -> EndpointSpec:
        """The endpoint that writes the user's turns."""
        assert self.user is not None
        return self.user


# -- the grid --------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A topic, its parts, a kind of text, and the kind in words."""

    topic: str
    parts: list[str]
    kind: str
    meaning: str


class Grid(NamedTuple):
    """Cells in the order in which they are filled, ways to put an opening, and what a user does next."""

    cells: list[Cell]
    manners: list[str]
    moves: list[str]

    def cell(self, number: int) -> Cell:
        """The cell of a dialogue: all cells in turn, so that their counts differ by one at most."""
        return self.cells[number % len(self.cells)]


class GridFile(BaseModel):
    """The keys of a grid's YAML file: topics {name: parts} and kinds {name: meaning}, or lists of names."""

    model_config = ConfigDict(extra="forbid")

    topics: dict[NotBlank, list[NotBlank] | None] = Field(min_length=1)
    kinds: dict[NotBlank, str | None] = Field(min_length=1)
    manners: list[NotBlank] = []
    moves: list[NotBlank] = []

    @field_validator("topics", "kinds", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list) else value


def read_grid(path: Path | None, seed: int) -> Grid:
    """A grid from YAML, or the built-in one; manners and moves that it lacks are the built-in ones. ``seed``: of the order."""
    own, built_in = (validated(GridFile, read_yaml(file), str(file)) for file in (path or GRID, GRID))
    order = spread(list(own.topics), list(own.kinds), seed)
    cells = [Cell(topic, own.topics[topic] or [], kind, own.kinds[kind] or kind) for topic, kind in order]
    return Grid(cells, own.manners or built_in.manners, own.moves or built_in.moves)


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
    cell, seed = grid.cell(number), config.seed
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
    return _user_request(config, "\n\n".join(lines), "opening", number, attempt)


def follow_up_request(
    config: DistillConfig, grid: Grid, number: int, attempt: int, turns: Sequence[Message]
) -> Request:
    """The request for the user's next message, which refines or extends what was asked."""
    round_ = len(turns) // 2
    move = random.Random(f"move {config.seed} {number} {attempt} {round_}").choice(grid.moves).strip().rstrip(".")
    history = "\n\n".join(f"[{'You' if t['role'] == 'user' else 'The assistant'}]\n{t['content']}" for t in turns)
    asked = (
        f"This is your conversation with an assistant so far.\n\n{history}\n\n[End]\n\n"
        f"Write your next message, in the same language. In it you {move}. It builds on the "
        "last answer and can be understood from the conversation alone. No thanks, no praise, no goodbye."
    )
    return _user_request(config, asked, "question", number, attempt, round_)


def _user_request(config: DistillConfig, text: str, *key: str | int) -> Request:
    user = config.user_endpoint
    return Request(
        key="/".join(map(str, key)),
        endpoint=user.name,
        messages=({"role": "system", "content": USER}, {"role": "user", "content": text}),
        max_tokens=min(QUESTION_TOKENS, user.max_tokens),
        seed=seed_of(config.seed, *key),
    )


# -- replies ---------------------------------------------------------------------------------------------------------

_LABEL = re.compile(r"^\W{0,3}(?:user|human|message|prompt|question)\W{0,3}:\W{0,3}\s*", re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|here(?:'s| is| are)?)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE
)
_QUOTES = {'"': '"', "“": "”", "«": "»", "„": "“", "'": "'"}
_WORD = re.compile(r"\w+")
_RUN = 8  # words in a row that are no coincidence
_REPEATED = 0.8  # of a message's shingles that an earlier turn has too
_FEW_WORDS = 4


class NotUsable(Exception):
    """A text that is no message, or no whole answer; ``str(error)`` is the reason under which it is counted."""


Problem = NotUsable | RequestFailed | BudgetSpent
PROBLEMS = (NotUsable, RequestFailed, BudgetSpent)


def reason_of(problem: Problem) -> str:
    """The reason under which a problem is counted."""
    if isinstance(problem, BudgetSpent):
        return BUDGET
    return problem.reason if isinstance(problem, RequestFailed) else str(problem)


def read_message(text: str) -> str:
    """The message in a reply, without reasoning, a label, a preamble or quotation marks around it. Raises NotUsable."""
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
    client: ModelClient, request: Request, quoted: Sequence[str] = (), turns: Sequence[str] = ()
) -> str:
    """The user's message in the reply to a request. Raises NotUsable, RequestFailed, BudgetSpent.

    Args:
        quoted, turns: examples, which the message may repeat, and the dialogue so far, which it may quote. The rest of the
            request is instruction, of which it may hold no eight words in a row.
    """
    reply = await client.ask(request)
    if reply.finish_reason == "length":
        raise NotUsable("a message cut at max_tokens")
    text = read_message(reply.text)
    if any(repeats(text, turn) for turn in turns):
        raise NotUsable("a message that repeats an earlier turn")
    instruction = "\n".join(message["content"] for message in request.messages)
    for shown in filter(None, (*quoted, *turns)):
        instruction = instruction.replace(shown, "\n")
    if _runs(text) & _runs(instruction):
        raise NotUsable("a message that hands its instructions back")
    return text


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


class Openings:
    """The openings taken so far, compared by the Jaccard similarity of their shingles.

    Two sets of similarity s share one of the first ⌊(1 - s) n⌋ + 1 elements of each, in any fixed order (Chaudhuri et al.
    2006); only openings that share such an element are compared.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._taken: list[tuple[str, set[str]]] = []
        self._index: defaultdict[str, list[int]] = defaultdict(list)

    def take(self, text: str) -> str | None:
        """Take a text that is new and return None; or return the earliest one that it is too similar to."""
        mine = shingles(text)
        ordered = sorted(mine, key=lambda s: (" " not in s, s))  # pairs of words are rarer than words, and come first
        prefix = ordered[: len(mine) - math.ceil(self._similarity * len(mine) - 1e-9) + 1]
        for number in sorted({number for each in prefix for number in self._index[each]}):
            earlier, its = self._taken[number]
            shared = len(mine & its)
            if shared >= self._similarity * (len(mine) + len(its) - shared):
                return earlier
        for each in prefix:
            self._index[each].append(len(self._taken))
        self._taken.append((text[:500], mine))
        return None


# -- one dialogue ----------------------------------------------------------------------------------------------------


@dataclass
class Dialogue:
    """Turns from the user's first to the assistant's last whole answer."""

    messages: list[Message] = field(default_factory=list)  # user and assistant in turn
    ended: Problem | None = None  # why it has fewer rounds than were asked for

    @property
    def rounds(self) -> int:
        return len(self.messages) // 2


async def grow(
    client: ModelClient, config: DistillConfig, grid: Grid, number: int, attempt: int, opening: str
) -> Dialogue | Problem:
    """A dialogue of up to ``config.rounds`` rounds. A failure ends it with its last whole answer; that of the first answer is
    returned instead of a dialogue."""
    dialogue = Dialogue()
    question = opening
    try:
        while True:
            turns = [*dialogue.messages, {"content": question, "role": "user"}]
            key = ("answer", number, attempt, dialogue.rounds)
            messages = tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)
            reply = await client.ask(
                Request("/".join(map(str, key)), config.teacher.name, messages, seed=seed_of(config.seed, *key))
            )
            if reply.finish_reason == "length":
                raise NotUsable("an answer cut at max_tokens")
            if not reply.text.strip():
                raise NotUsable("an empty answer")
            dialogue.messages = [*turns, {"content": reply.text.strip(), "role": "assistant"}]
            if dialogue.rounds == config.rounds:
                return dialogue
            request = follow_up_request(config, grid, number, attempt, dialogue.messages)
            question = await ask_message(client, request, turns=[turn["content"] for turn in dialogue.messages])
    except PROBLEMS as problem:
        if not dialogue.messages:
            return problem if isinstance(problem, BudgetSpent) else NotUsable(f"{NO_ANSWER}: {reason_of(problem)}")
        dialogue.ended = problem
    return dialogue


# -- all dialogues ---------------------------------------------------------------------------------------------------


@dataclass
class Distilled:
    """The result of a run."""

    out: Path
    wanted: int  # dialogues
    grid: Grid
    seeds: Prompts | None
    train: int = 0  # dialogues written
    test: int = 0
    openings: int = 0  # asked for
    turned_down: Counter[str] = field(default_factory=Counter)  # of the openings, by reason
    ended: Counter[str] = field(default_factory=Counter)  # dialogues shorter than asked for, by reason
    rounds: Counter[int] = field(default_factory=Counter)  # dialogues by their number of rounds
    unreached: int = 0  # dialogues that the budget did not reach
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)

    @property
    def made(self) -> int:
        return self.train + self.test

    def report(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "command": COMMAND,
            "version": __version__,
            "dialogues": {"wanted": self.wanted, "train_sft": self.train, "test_sft": self.test},
            "not_reached_by_the_budget": self.unreached,
            "openings": {
                "asked": self.openings,
                "turned_down": dict(self.turned_down.most_common()),
            },
            "rounds": {str(rounds): count for rounds, count in sorted(self.rounds.items())},
            "ended_early": dict(self.ended.most_common()),
            "seeds": None if self.seeds is None else self.seeds.note(),
            "spent": self.totals.as_dict(),
        }

    def lines(self) -> list[str]:
        """The result, one fact a line."""
        test = f", {self.test:,} in {TEST}" if self.test else ""
        rounds = ", ".join(f"{count:,} of {n}" for n, count in sorted(self.rounds.items(), reverse=True))
        result = [f"{self.out}: {self.made:,} of {self.wanted:,} dialogues: {self.train:,} in {TRAIN}{test}"]
        result.append(f"questions and answers: {rounds}")
        for title, counts in (("openings turned down", self.turned_down), ("ended early", self.ended)):
            if counts:
                result.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()))
        if self.budget_message:
            result.append(
                f"{self.unreached:,} dialogues are missing, {self.ended[BUDGET]:,} are shorter: {self.budget_message} "
                + CONTINUES
            )
        return result


def plan_distill(config: DistillConfig, seeds: Prompts | None) -> Distilled:
    """What a run is to make. Raises UserError if the grid cannot be read."""
    grid = read_grid(Path(config.grid) if config.grid else None, config.seed)
    most = len(seeds.prompts) if seeds is not None and config.openings == "seeds" else None
    wanted = config.count or most or len(grid.cells)
    return Distilled(Path(config.out), wanted if most is None else min(wanted, most), grid, seeds)


def run_distill(config: DistillConfig, result: Distilled, meter: Meter, *, back_off: float = 1.0) -> Distilled:
    """Make the data set in ``config.out``: train_sft.jsonl, test_sft.jsonl, report.json, requests.sqlite, config.yaml.

    The columns are ultrachat_200k's (prompt, prompt_id, messages), and topic and kind.

    Args:
        result: of ``plan_distill``; filled in.
        back_off: of ``ModelClient``.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no dialogue came out.
    """
    claim_folder(result.out, COMMAND, config)

    async def run() -> None:
        async with client_of(config, meter, back_off) as client:
            result.totals = client.totals
            passes = _Passes(client, config, result)
            missing = list(range(result.wanted))
            for attempt in range(config.tries):
                missing = await passes.run(missing, attempt, meter)
                if not missing or result.budget_message:
                    break
            result.unreached = len(missing) if result.budget_message else 0
            _write(config, result, passes.dialogues)

    run_job(run())
    write_json(result.out / REPORT, result.report())
    return result


class _Passes:
    """Passes over the dialogues that are missing; ``dialogues``: those that were made, by number."""

    def __init__(self, client: ModelClient, config: DistillConfig, result: Distilled) -> None:
        self.client, self.config, self.result = client, config, result
        self.from_seeds = config.openings == "seeds"
        self.examples = [prompt.text for prompt in result.seeds.prompts] if result.seeds is not None else []
        self.dialogues: dict[int, Dialogue] = {}
        self.avoid: dict[int, str] = {}  # the opening that a number's last one was too similar to
        self.openings = Openings(config.similarity)
        for text in [] if self.from_seeds else self.examples:  # an example that is handed back is no opening
            self.openings.take(text)

    async def run(self, numbers: list[int], attempt: int, meter: Meter) -> list[int]:
        """One pass; returns the numbers that need another."""
        result = self.result
        compared = [asyncio.Event() for _ in numbers]

        async def dialogue_of(place: int) -> Dialogue | Problem:
            opening: str | Problem
            try:
                opening = await self._opening(numbers[place], attempt)
            except PROBLEMS as problem:
                opening = problem
            if place:
                await compared[place - 1].wait()
            if isinstance(opening, str):
                opening = self._compared(numbers[place], attempt, opening)
            compared[place].set()
            result.openings += not isinstance(opening, BudgetSpent)
            if not isinstance(opening, str):
                return opening
            return await grow(self.client, self.config, result.grid, numbers[place], attempt, opening)

        again = []
        # a number waits for those before it: twice as many as can be asked at once
        window = 2 * sum(spec.concurrency for spec in self.config.endpoints().values())
        async for place, found in in_order(range(len(numbers)), dialogue_of, window):
            problem = found.ended if isinstance(found, Dialogue) else found
            if isinstance(problem, BudgetSpent):
                result.budget_message = str(problem)
            if isinstance(found, Dialogue):
                self.dialogues[numbers[place]] = found
                result.rounds[found.rounds] += 1
                result.ended.update([reason_of(problem)] if problem else [])
                meter.advance()
                continue
            result.turned_down.update([] if isinstance(found, BudgetSpent) else [reason_of(found)])
            if not (self.from_seeds and str(found) == NEAR):  # another try would be the same seed
                again.append(numbers[place])
        return again

    async def _opening(self, number: int, attempt: int) -> str:
        """Raises NotUsable, RequestFailed, BudgetSpent."""
        config = self.config
        if self.from_seeds:
            return self.examples[number]
        rng = random.Random(f"examples {config.seed} {number} {attempt}")
        shown = rng.sample(self.examples, min(config.examples, len(self.examples)))
        avoid = self.avoid.get(number)
        request = opening_request(config, self.result.grid, number, attempt, shown, avoid)
        return await ask_message(self.client, request, quoted=[*shown, avoid or ""])

    def _compared(self, number: int, attempt: int, opening: str) -> str | NotUsable:
        """The opening, if it is not too similar to an earlier one; a seed is compared in the first pass."""
        earlier = None if self.from_seeds and attempt else self.openings.take(opening)
        if earlier is None:
            return opening
        self.avoid[number] = earlier
        return NotUsable(NEAR)


def _write(config: DistillConfig, result: Distilled, dialogues: dict[int, Dialogue]) -> None:
    if not dialogues:
        down = ", ".join(f"{reason}: {n:,}" for reason, n in result.turned_down.most_common())
        what = f"dialogue came out of {result.wanted:,}"
        raise nothing_made(result.out, what, [down, result.budget_message], bool(result.budget_message))
    with file_aside(result.out / TRAIN) as train, file_aside(result.out / TEST) as test:
        for number, dialogue in sorted(dialogues.items()):
            prompt = dialogue.messages[0]["content"]
            prompt_id = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
            row = {"prompt": prompt, "prompt_id": prompt_id, "messages": dialogue.messages, "topic": "", "kind": ""}
            if config.openings == "grid":
                cell = result.grid.cell(number)
                row |= {"topic": cell.topic, "kind": cell.kind}
            held_out = int(prompt_id[:8], 16) < config.test_share * 2**32
            (test if held_out else train).write(json_line(row))
            result.test += held_out
            result.train += not held_out
    for count, name in ((result.train, TRAIN), (result.test, TEST)):
        if not count:  # readers refuse a file without rows
            (result.out / name).unlink()


def distill_bounds(config: DistillConfig, plan: Distilled) -> dict[str, Bound]:
    """{endpoint: upper bounds of what a job costs}, with all openings as long as the longest of the first ``SAMPLE``."""
    teacher, user, grid = config.teacher, config.user_endpoint, plan.grid
    bounds = {name: Bound() for name in config.endpoints()}
    question = opening = min(QUESTION_TOKENS, user.max_tokens)
    texts = sorted([] if plan.seeds is None else [prompt.text for prompt in plan.seeds.prompts], key=len)
    if config.openings == "seeds":
        opening = max(len(text.encode()) for text in texts)
    else:
        asked = max(
            prompt_bound(user, opening_request(config, grid, number, 0, texts[-config.examples :], None).messages)
            for number in range(min(plan.wanted, SAMPLE))
        )
        bounds[user.name].add(user, asked, question, times=plan.wanted)
    for round_ in range(config.rounds):
        # before this round's answer: the opening, and an answer and a question for each earlier round
        said = opening + round_ * (teacher.max_tokens + question)
        turns = [{"role": role, "content": ""} for role in (*("user", "assistant") * round_, "user")]
        bounds[teacher.name].add(teacher, prompt_bound(teacher, turns, said), teacher.max_tokens, times=plan.wanted)
        if round_:
            request = follow_up_request(config, grid, 0, 0, turns[:-1])
            longest = max(len(move.encode()) for move in grid.moves)  # whichever is drawn
            bounds[user.name].add(
                user, prompt_bound(user, request.messages, said - question + longest), question, times=plan.wanted
            )
    return bounds
