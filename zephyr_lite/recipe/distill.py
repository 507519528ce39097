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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .. import __version__
from ..client.client import BudgetSpent, ModelClient, Request, RequestFailed, seed_of
from ..client.cost import Bound, CostClient, Meter
from ..client.endpoints import EndpointKey, EndpointSpec, Message
from ..client.jobs import (
    CONTINUES,
    JobConfig,
    NotBlank,
    claim_folder,
    distinct_name,
    in_order,
    json_line,
    nothing_made,
    run_job,
    validated,
)
from ..client.request_log import Totals
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..io.atomic import file_aside, write_json
from .prompts import Prompts, PromptsKey
from .user_messages import Openings, ask_message

COMMAND = "distill"
TRAIN, TEST, REPORT = "train_sft.jsonl", "test_sft.jsonl", "report.json"
GRID = Path(__file__).parent / "grid.yaml"
NEAR = "too near to an earlier opening or to a seed"
QUESTION_TOKENS = 512  # of a user's message, at most
USER = (
    "You write what a person types to an AI assistant. You are that person, never the assistant: you ask, request, and "
    "say what you want; you do not answer. Your reply is the message itself, word for word as it is sent: no quotation "
    "marks around it, no heading, no comment."
)


class DistillConfig(JobConfig):
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


class Grid(BaseModel):
    """The keys of a grid's YAML file; its cells are all pairs of a topic and a kind, and each dialogue belongs to one."""

    model_config = ConfigDict(extra="forbid")

    topics: dict[NotBlank, list[NotBlank] | None] = Field(min_length=1)  # {name: parts}, or a list of names
    kinds: dict[NotBlank, str | None] = Field(min_length=1)  # of texts; {name: meaning}, or a list of names
    manners: list[NotBlank] = []  # ways to put an opening
    moves: list[NotBlank] = []  # what a user does next

    @field_validator("topics", "kinds", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return dict.fromkeys(value) if isinstance(value, list) else value

    @property
    def size(self) -> int:
        """Number of cells."""
        return len(self.topics) * len(self.kinds)

    def cell(self, number: int) -> tuple[str, str]:
        """(topic, kind) of a dialogue: all cells in turn, and every beginning has all topics about equally often, and all
        kinds."""
        place = number % self.size
        turn = place // math.lcm(len(self.topics), len(self.kinds))
        return list(self.topics)[place % len(self.topics)], list(self.kinds)[(place + turn) % len(self.kinds)]


def read_grid(path: Path | None, seed: int) -> Grid:
    """A grid from YAML, or the built-in one, in an order drawn by the seed; manners and moves that it lacks are the built-in
    ones."""
    grid, built_in = (validated(Grid, read_yaml(file), str(file)) for file in (path or GRID, GRID))
    rng = random.Random(f"cells {seed}")
    grid.topics = dict(rng.sample(list(grid.topics.items()), len(grid.topics)))
    grid.kinds = dict(rng.sample(list(grid.kinds.items()), len(grid.kinds)))
    grid.manners, grid.moves = grid.manners or built_in.manners, grid.moves or built_in.moves
    return grid


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
    topic, kind = grid.cell(number)
    part = ""
    if parts := grid.topics[topic]:  # the parts of a topic take turns from one visit of the cell to the next
        start = seed_of(config.seed, "part", number % grid.size)
        part = f", in particular {parts[(start + number // grid.size + attempt) % len(parts)]}"
    lines = [
        "Write one message to an assistant.",
        f"It is about {topic}{part}.",
        f"What the person wants from the assistant is {grid.kinds[kind] or kind}.",
        random.Random(f"opening {config.seed} {number} {attempt}").choice(grid.manners),
    ]
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


# -- dialogues -------------------------------------------------------------------------------------------------------


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
        result = [
            f"{self.out}: {self.made:,} of {self.wanted:,} dialogues: {self.train:,} in {TRAIN}{test}",
            f"questions and answers: {rounds}",
        ]
        for title, counts in (("openings turned down", self.turned_down), ("ended early", self.ended)):
            if counts:
                result.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()))
        if self.budget_message:
            shorter = self.ended[BudgetSpent.reason]
            result.append(
                f"{self.unreached:,} dialogues are missing, {shorter:,} are shorter: {self.budget_message} {CONTINUES}"
            )
        return result


def plan_distill(config: DistillConfig, seeds: Prompts | None) -> Distilled:
    """What a run is to make. Raises UserError if the grid cannot be read."""
    grid = read_grid(Path(config.grid) if config.grid else None, config.seed)
    most = len(seeds.prompts) if seeds is not None and config.openings == "seeds" else None
    wanted = config.count or most or grid.size
    return Distilled(Path(config.out), wanted if most is None else min(wanted, most), grid, seeds)


def run_distill(config: DistillConfig, result: Distilled, meter: Meter) -> Distilled:
    """Make the data set in ``config.out``: train_sft.jsonl, test_sft.jsonl, report.json, requests.sqlite, config.yaml.

    The columns are ultrachat_200k's (prompt, prompt_id, messages), and topic and kind.

    Args:
        result: of ``plan_distill``; filled in.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no dialogue came out.
    """
    claim_folder(result.out, COMMAND, config)

    async def run() -> dict[int, list[Message]]:
        async with config.client() as client:
            result.totals = meter.totals = client.totals
            return await make_dialogues(client, config, result, meter.advance)

    _write(config, result, run_job(run()))
    write_json(result.out / REPORT, result.report())
    return result


async def make_dialogues(
    client: ModelClient | CostClient, config: DistillConfig, result: Distilled, on_dialogue: Callable[[], None]
) -> dict[int, list[Message]]:
    """{number: messages} of all dialogues, in up to ``config.tries`` passes over the missing ones; counts into ``result``."""
    examples = [prompt.text for prompt in result.seeds.prompts] if result.seeds is not None else []
    earlier = Openings(config.similarity)
    missing = list(range(result.wanted))
    if config.openings == "seeds":
        missing = [number for number in missing if earlier.take(examples[number]) is None]
        result.openings = near = result.wanted - len(missing)
        result.turned_down.update([NEAR] * near)
    else:
        for text in examples:  # an example that is handed back is no opening
            earlier.take(text)
    dialogues: dict[int, list[Message]] = {}
    avoid: dict[int, str] = {}  # number → the opening that its last one was too similar to
    # a number waits for those before it: twice as many as can be asked at once
    window = 2 * sum(spec.concurrency for spec in config.endpoints().values())

    async def opening_of(number: int, attempt: int) -> str:
        if config.openings == "seeds":
            return examples[number]
        rng = random.Random(f"examples {config.seed} {number} {attempt}")
        shown = rng.sample(examples, min(config.examples, len(examples)))
        request = opening_request(config, result.grid, number, attempt, shown, avoid.get(number))
        return await ask_message(client, request, quoted=[*shown, avoid.get(number, "")])

    async def one_pass(numbers: list[int], attempt: int) -> None:
        """Try each number once."""
        turns = [asyncio.Event() for _ in range(len(numbers) + 1)]
        turns[0].set()

        async def dialogue_of(place: int) -> tuple[list[Message], RequestFailed | BudgetSpent | None]:
            number, opening = numbers[place], ""
            problem: RequestFailed | BudgetSpent | None = None
            try:
                opening = await opening_of(number, attempt)
            except (RequestFailed, BudgetSpent) as error:
                problem = error
            await turns[place].wait()
            if opening and config.openings == "grid" and (near := earlier.take(opening)) is not None:
                avoid[number], problem = near, RequestFailed(NEAR)
            turns[place + 1].set()
            if problem is not None:
                raise problem
            return await grow(client, config, result.grid, number, attempt, opening)

        async for place, found in in_order(range(len(numbers)), dialogue_of, window):
            result.openings += not isinstance(found, BudgetSpent)
            messages, problem = found if isinstance(found, tuple) else ([], found)
            if isinstance(problem, BudgetSpent):
                result.budget_message = str(problem)
            if messages:
                dialogues[numbers[place]] = messages
                result.rounds[len(messages) // 2] += 1
                result.ended.update([problem.reason] if problem else [])
                on_dialogue()
            elif isinstance(problem, RequestFailed):
                result.turned_down[problem.reason] += 1

    for attempt in range(config.tries):
        await one_pass(missing, attempt)
        missing = [number for number in missing if number not in dialogues]
        if not missing or result.budget_message:
            break
    result.unreached = len(missing) if result.budget_message else 0
    return dialogues


async def grow(
    client: ModelClient | CostClient, config: DistillConfig, grid: Grid, number: int, attempt: int, opening: str
) -> tuple[list[Message], RequestFailed | BudgetSpent | None]:
    """User and assistant in turn, up to ``config.rounds`` rounds; and why it has fewer, down to none."""
    messages: list[Message] = []
    question = opening
    try:
        for round_ in range(config.rounds):
            if round_:
                request = follow_up_request(config, grid, number, attempt, messages)
                question = await ask_message(client, request, turns=[turn["content"] for turn in messages])
            turns = [*messages, {"content": question, "role": "user"}]
            key = ("answer", number, attempt, round_)
            seed = seed_of(config.seed, *key)
            reply = await client.ask(Request("/".join(map(str, key)), config.teacher.name, tuple(turns), seed=seed))
            if reply.finish_reason == "length":
                raise RequestFailed("an answer cut at max_tokens")
            if not reply.text.strip():
                raise RequestFailed("an empty answer")
            messages = [*turns, {"content": reply.text.strip(), "role": "assistant"}]
    except RequestFailed as error:
        return messages, error if messages else RequestFailed(f"no first answer: {error.reason}")
    except BudgetSpent as error:
        return messages, error
    return messages, None


def _write(config: DistillConfig, result: Distilled, dialogues: dict[int, list[Message]]) -> None:
    """train_sft.jsonl and test_sft.jsonl; a split without rows has no file, since readers refuse one."""
    if not dialogues:
        down = ", ".join(f"{reason}: {n:,}" for reason, n in result.turned_down.most_common())
        what = f"dialogue came out of {result.wanted:,}"
        raise nothing_made(result.out, what, [down, result.budget_message])
    with file_aside(result.out / TRAIN) as train, file_aside(result.out / TEST) as test:
        for number, messages in sorted(dialogues.items()):
            prompt = messages[0]["content"]
            prompt_id = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
            topic, kind = result.grid.cell(number) if config.openings == "grid" else ("", "")
            row = {"prompt": prompt, "prompt_id": prompt_id, "messages": messages, "topic": topic, "kind": kind}
            held_out = int(prompt_id[:8], 16) < config.test_share * 2**32
            (test if held_out else train).write(json_line(row))
            result.test += held_out
            result.train += not held_out
    for count, name in ((result.train, TRAIN), (result.test, TEST)):
        if not count:
            (result.out / name).unlink()


def distill_bounds(config: DistillConfig, plan: Distilled) -> dict[str, Bound]:
    """{endpoint: upper bounds of what a job costs, if every first opening can be used}; counts into ``plan``."""
    client = CostClient(config.endpoints())
    asyncio.run(make_dialogues(client, config, plan, lambda: None))
    return client.bounds
