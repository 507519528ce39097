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
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .. import __version__
from ..client.client import BudgetSpent, Request, RequestFailed, seed_of
from ..client.cost import Client, cost_lines
from ..client.endpoints import EndpointKey, Message, validated
from ..client.jobs import (
    CONTINUES,
    JobConfig,
    Meter,
    NotBlank,
    distinct_name,
    in_order,
    json_line,
    nothing_made,
    run_job,
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
        if self.openings == "seeds" and (self.seeds is None or self.grid is not None):
            raise UserError("openings: seeds needs seeds, and uses no grid.", "Give --seeds FILE without --grid.")
        self.user = self.teacher if self.user is None else distinct_name(self.user, [self.teacher], "user")
        return self


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


# -- dialogues -------------------------------------------------------------------------------------------------------


class DistillJob:
    """Dialogues of a grid or of seeds, and what is counted meanwhile.

    Attributes:
        wanted: number of dialogues to make.
        made: number of dialogues by split's file.
        openings: number of openings asked for.
        turned_down: of the openings, by reason.
        ended: dialogues shorter than asked for, by reason.
        rounds: dialogues by their number of rounds.
        unreached: number of dialogues that the budget did not reach.

    Raises:
        UserError: the grid cannot be read.
    """

    def __init__(self, config: DistillConfig, seeds: Prompts | None) -> None:
        self.config, self.seeds, self.out = config, seeds, Path(config.out)
        self.grid = read_grid(Path(config.grid) if config.grid else None, config.seed)
        self.examples = [] if seeds is None else [prompt.text for prompt in seeds.prompts]
        self.wanted = config.count or self.grid.size
        if config.openings == "seeds":
            self.wanted = min(config.count or len(self.examples), len(self.examples))
        self.made, self.openings, self.unreached, self.budget_message = Counter[str](), 0, 0, ""
        self.turned_down, self.ended, self.rounds = Counter[str](), Counter[str](), Counter[int]()
        self.totals = Totals()

    def cost_lines(self) -> list[str]:
        """What the job costs at most, if every first opening can be used."""
        work = partial(self._make, lambda: None)
        return cost_lines(self.config.endpoints(), work, self.config.budget, self.out)

    def run(self, meter: Meter) -> None:
        """Make the data set in ``config.out``: train_sft.jsonl, test_sft.jsonl, report.json, requests.sqlite, config.yaml.

        The columns are ultrachat_200k's (prompt, prompt_id, messages), and topic and kind.

        Raises:
            UserError: the folder holds something else, an endpoint cannot answer at all, or no dialogue came out.
        """
        self._write(run_job(self.config, COMMAND, partial(self._make, meter.count_one), meter))
        self.totals = meter.totals
        write_json(self.out / REPORT, self.report())

    async def _make(self, on_dialogue: Callable[[], None], client: Client) -> dict[int, list[Message]]:
        """{number: messages} of all dialogues, in up to ``config.tries`` passes over the missing ones."""
        config = self.config
        earlier = Openings(config.similarity)
        missing = list(range(self.wanted))
        if config.openings == "seeds":
            missing = [number for number in missing if earlier.take(self.examples[number]) is None]
            self.openings = near = self.wanted - len(missing)
            self.turned_down.update([NEAR] * near)
        else:
            for text in self.examples:  # an example that is handed back is no opening
                earlier.take(text)
        dialogues: dict[int, list[Message]] = {}
        avoid: dict[int, str] = {}  # number → the opening that its last one was too similar to
        # a number waits for those before it: twice as many as can be asked at once
        window = 2 * sum(spec.concurrency for spec in config.endpoints())

        async def one_pass(numbers: list[int], attempt: int) -> None:
            """Try each number once."""
            turns = [asyncio.Event() for _ in range(len(numbers) + 1)]
            turns[0].set()

            async def dialogue_of(place: int) -> tuple[list[Message], RequestFailed | BudgetSpent | None]:
                number, opening = numbers[place], ""
                problem: RequestFailed | BudgetSpent | None = None
                try:
                    opening = await self._opening(client, number, attempt, avoid.get(number))
                except (RequestFailed, BudgetSpent) as error:
                    problem = error
                await turns[place].wait()
                if opening and config.openings == "grid" and (near := earlier.take(opening)) is not None:
                    avoid[number], problem = near, RequestFailed(NEAR)
                turns[place + 1].set()
                if problem is not None:
                    raise problem
                return await self._grow(client, number, attempt, opening)

            async for place, found in in_order(range(len(numbers)), dialogue_of, window):
                self.openings += not isinstance(found, BudgetSpent)
                messages, problem = found if isinstance(found, tuple) else ([], found)
                if isinstance(problem, BudgetSpent):
                    self.budget_message = str(problem)
                if messages:
                    dialogues[numbers[place]] = messages
                    self.rounds[len(messages) // 2] += 1
                    self.ended.update([problem.reason] if problem else [])
                    on_dialogue()
                elif isinstance(problem, RequestFailed):
                    self.turned_down[problem.reason] += 1

        for attempt in range(config.tries):
            await one_pass(missing, attempt)
            missing = [number for number in missing if number not in dialogues]
            if not missing or self.budget_message:
                break
        self.unreached = len(missing) if self.budget_message else 0
        return dialogues

    async def _opening(self, client: Client, number: int, attempt: int, avoid: str | None) -> str:
        """The first question of a dialogue.

        Args:
            number: the dialogue's; it determines the cell.
            attempt: number of openings of this dialogue that were turned down before.
            avoid: an earlier opening that the last attempt was too similar to.
        """
        config, grid = self.config, self.grid
        if config.openings == "seeds":
            return self.examples[number]
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
            "Everything that the assistant needs for the task must stand in the message.",
        ]
        quoted = random.Random(f"examples {config.seed} {number} {attempt}").sample(
            self.examples, min(config.examples, len(self.examples))
        )
        if quoted:
            shown = "\n".join(f"<example>\n{text}\n</example>" for text in quoted)
            lines.append(f"Messages of other people, to show how they write (the subject is another one):\n{shown}")
        if avoid is not None:
            quoted.append(avoid)
            lines.append(
                f"This has been asked already; ask for something clearly different:\n<asked>\n{avoid}\n</asked>"
            )
        request = self._user_request("\n\n".join(lines), "opening", number, attempt)
        return await ask_message(client, request, quoted=quoted)

    async def _follow_up(self, client: Client, number: int, attempt: int, messages: Sequence[Message]) -> str:
        """The user's next message, which refines or extends what was asked."""
        round_ = len(messages) // 2
        draw = random.Random(f"move {self.config.seed} {number} {attempt} {round_}")
        move = draw.choice(self.grid.moves).strip().rstrip(".")
        history = "\n\n".join(
            f"[{'You' if turn['role'] == 'user' else 'The assistant'}]\n{turn['content']}" for turn in messages
        )
        asked = (
            f"This is your conversation with an assistant so far.\n\n{history}\n\n[End]\n\n"
            f"Write your next message, in the same language. In it you {move}. It builds on the "
            "last answer and can be understood from the conversation alone. No thanks, no praise, no goodbye."
        )
        request = self._user_request(asked, "question", number, attempt, round_)
        return await ask_message(client, request, turns=[turn["content"] for turn in messages])

    def _user_request(self, text: str, *key: str | int) -> Request:
        user = self.config.user
        assert user is not None
        return Request(
            key="/".join(map(str, key)),
            endpoint=user.name,
            messages=({"role": "system", "content": USER}, {"role": "user", "content": text}),
            max_tokens=min(QUESTION_TOKENS, user.max_tokens),
            seed=seed_of(self.config.seed, *key),
        )

    async def _grow(
        self, client: Client, number: int, attempt: int, opening: str
    ) -> tuple[list[Message], RequestFailed | BudgetSpent | None]:
        """User and assistant in turn, up to ``config.rounds`` rounds; and why it has fewer, down to none."""
        messages: list[Message] = []
        try:
            for round_ in range(self.config.rounds):
                question = await self._follow_up(client, number, attempt, messages) if round_ else opening
                turns = [*messages, {"content": question, "role": "user"}]
                key = ("answer", number, attempt, round_)
                seed = seed_of(self.config.seed, *key)
                request = Request("/".join(map(str, key)), self.config.teacher.name, tuple(turns), seed=seed)
                reply = await client.ask(request)
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

    def _write(self, dialogues: dict[int, list[Message]]) -> None:
        """train_sft.jsonl and test_sft.jsonl; a split without rows has no file, since readers refuse one."""
        if not dialogues:
            down = ", ".join(f"{reason}: {n:,}" for reason, n in self.turned_down.most_common())
            raise nothing_made(self.out, f"dialogue came out of {self.wanted:,}", [down, self.budget_message])
        lines: dict[str, list[str]] = {TRAIN: [], TEST: []}
        for number, messages in sorted(dialogues.items()):
            prompt = messages[0]["content"]
            prompt_id = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
            topic, kind = self.grid.cell(number) if self.config.openings == "grid" else ("", "")
            row = {"prompt": prompt, "prompt_id": prompt_id, "messages": messages, "topic": topic, "kind": kind}
            held_out = int(prompt_id[:8], 16) < self.config.test_share * 2**32
            lines[TEST if held_out else TRAIN].append(json_line(row))
        for name, rows in lines.items():
            self.made[name] = len(rows)
            if not rows:
                (self.out / name).unlink(missing_ok=True)
                continue
            with file_aside(self.out / name) as file:
                file.writelines(rows)

    def report(self) -> dict[str, Any]:
        """For report.json."""
        return {
            "command": COMMAND,
            "version": __version__,
            "dialogues": {"wanted": self.wanted, "train_sft": self.made[TRAIN], "test_sft": self.made[TEST]},
            "not_reached_by_the_budget": self.unreached,
            "openings": {"asked": self.openings, "turned_down": dict(self.turned_down.most_common())},
            "rounds": {str(rounds): count for rounds, count in sorted(self.rounds.items())},
            "ended_early": dict(self.ended.most_common()),
            "seeds": None if self.seeds is None else self.seeds.note(),
            "spent": self.totals.as_dict(),
        }

    def lines(self) -> list[str]:
        """The result, one fact a line."""
        files = " and ".join(f"{count:,} in {name}" for name, count in self.made.items() if count)
        rounds = ", ".join(f"{count:,} of {n}" for n, count in sorted(self.rounds.items(), reverse=True))
        result = [
            f"{self.out}: {self.made.total():,} of {self.wanted:,} dialogues: {files}",
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
