"""``zephyr-lite distill``: dialogues that a teacher writes, spread evenly over a grid of topics and kinds.

Dialogues are numbered, and each number belongs to a cell. In a first pass every number gets an opening; a number whose
opening is turned down (too similar to an earlier one, unusable, without a first answer) gets another in the next pass, up to
``tries`` times. Openings are asked for in parallel and compared in the order of their numbers, so that the result does not
depend on which reply came first, nor on interruptions.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...client.client import (
    TOKENS_OF_A_TEMPLATE,
    TOKENS_OF_A_TURN,
    BudgetSpent,
    ModelClient,
    RequestFailed,
    open_client,
)
from ...client.cost import Bound, Meter, prompt_bound
from ...client.jobs import claim_folder, in_order, json_line, run_job
from ...client.request_log import Totals
from ...errors import UserError
from ...io.atomic import file_aside, write_json
from .config import DistillConfig
from .dialogue import (
    QUESTION_TOKENS,
    Dialogue,
    Grid,
    NotUsable,
    ask_message,
    follow_up_request,
    grow,
    opening_request,
    read_grid,
    shingles,
)
from .prompts import Prompts

COMMAND = "distill"
TRAIN, TEST, REPORT = "train_sft.jsonl", "test_sft.jsonl", "report.json"
NEAR = "too near to an earlier opening or to a seed"
NO_ANSWER = "no first answer"
BUDGET = "the budget"
EXAMPLES = 5  # near-duplicates in the report
SAMPLE = 2000  # openings whose length is measured for the upper bound


class Openings:
    """The openings taken so far, compared by the Jaccard similarity of their shingles.

    Two sets of similarity s share one of the first ⌊(1 - s) n⌋ + 1 elements of each, in any fixed order (Chaudhuri et al.
    2006); only openings that share such an element are compared.

    Args:
        similarity: from which a text is a near-duplicate.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._texts: list[str] = []
        self._sets: list[frozenset[int]] = []
        self._index: defaultdict[int, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._texts)

    def take(self, text: str) -> str | None:
        """Take a text that is new and return None; or return the earliest one that it is too similar to."""
        # pairs of words are rarer than words, and come first
        ordered = sorted(shingles(text), key=lambda s: (" " not in s, s))
        hashes = [int.from_bytes(hashlib.blake2b(s.encode(), digest_size=8).digest()) for s in ordered]
        mine, prefix = frozenset(hashes), hashes[: len(hashes) - math.ceil(self._similarity * len(hashes) - 1e-9) + 1]
        for number in sorted({number for each in prefix for number in self._index[each]}):
            shared = len(mine & self._sets[number])
            if shared >= self._similarity * (len(mine) + len(self._sets[number]) - shared):
                return self._texts[number]
        for each in prefix:
            self._index[each].append(len(self._texts))
        self._texts.append(text[:500])
        self._sets.append(mine)
        return None


@dataclass
class Distilled:
    """The result of a run.

    Attributes:
        wanted, train, test: numbers of dialogues.
        openings: asked for; turned_down: of these, by reason; near: examples (the opening, the earlier one).
        ended: dialogues that are shorter than was asked for, by reason; rounds: how many have this many.
        cells: dialogues of each (topic, kind), empty ones included; none where the openings are seeds.
        unreached: dialogues that the budget did not reach; budget_message: why, or "".
    """

    out: Path
    wanted: int
    grid: Grid
    seeds: Prompts | None
    train: int = 0
    test: int = 0
    openings: int = 0
    turned_down: Counter[str] = field(default_factory=Counter)
    near: list[tuple[str, str]] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    rounds: Counter[int] = field(default_factory=Counter)
    cells: Counter[tuple[str, str]] = field(default_factory=Counter)
    unreached: int = 0
    budget_message: str = ""
    totals: Totals = field(default_factory=Totals)

    @property
    def made(self) -> int:
        return self.train + self.test

    def report(self) -> dict[str, Any]:
        """For report.json."""
        topics, kinds = Counter[str](), Counter[str]()
        for (topic, kind), count in self.cells.items():
            topics[topic] += count
            kinds[kind] += count
        return {
            "command": COMMAND,
            "version": __version__,
            "dialogues": {"wanted": self.wanted, "train_sft": self.train, "test_sft": self.test},
            "not_reached_by_the_budget": self.unreached,
            "openings": {
                "asked": self.openings,
                "turned_down": dict(self.turned_down.most_common()),
                "near_duplicates": [{"opening": text, "earlier": earlier} for text, earlier in self.near],
            },
            "rounds": {str(rounds): count for rounds, count in sorted(self.rounds.items())},
            "ended_early": dict(self.ended.most_common()),
            "cells": len(self.cells),
            "dialogues_in_a_cell": {str(n): often for n, often in sorted(Counter(self.cells.values()).items())},
            "topics": dict(sorted(topics.items())),
            "kinds": dict(sorted(kinds.items())),
            "seeds": None if self.seeds is None else self.seeds.note(),
            "spent": self.totals.as_dict(),
        }

    def lines(self) -> list[str]:
        """The result, one fact a line."""
        test = f", {self.test:,} in {TEST}" if self.test else ""
        rounds = ", ".join(f"{count:,} of {n}" for n, count in sorted(self.rounds.items(), reverse=True))
        result = [f"{self.out}: {self.made:,} of {self.wanted:,} dialogues: {self.train:,} in {TRAIN}{test}"]
        result.append(f"questions and answers: {rounds}")
        if self.cells:
            few, many = min(self.cells.values()), max(self.cells.values())
            spread = f"{few:,}" if few == many else f"{few:,} to {many:,}"
            result.append(f"{len(self.cells):,} cells of topic and kind, {spread} dialogues in each")
        for title, counts in (("openings turned down", self.turned_down), ("ended early", self.ended)):
            if counts:
                result.append(f"{title}: " + ", ".join(f"{reason} {count:,}" for reason, count in counts.most_common()))
        if self.budget_message:
            result.append(
                f"{self.unreached:,} dialogues are missing, {self.ended[BUDGET]:,} are shorter: {self.budget_message} "
                "The same command with a larger budget continues the job and sends no answered request again."
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
        back_off: of ``open_client``.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no dialogue came out. All replies
            are in the request log in each case.
    """
    claim_folder(result.out, COMMAND, config)
    run_job(_run(config, result, meter, back_off))
    write_json(result.out / REPORT, result.report())
    return result


async def _run(config: DistillConfig, result: Distilled, meter: Meter, back_off: float) -> None:
    async with open_client(
        list(config.endpoints().values()),
        result.out,
        max_requests=config.budget.requests,
        max_tokens=config.budget.tokens,
        on_progress=meter.totals,
        back_off=back_off,
    ) as client:
        result.totals = client.totals
        passes = _Passes(client, config, result, meter)
        missing = list(range(result.wanted))
        for attempt in range(config.tries):
            missing = await passes.run(missing, attempt)
            if not missing or result.budget_message:
                break
        result.unreached = len(missing) if result.budget_message else 0
        _write(config, result, passes.dialogues)


class _Passes:
    """Passes over the dialogues that are missing.

    Attributes:
        dialogues: by number.
    """

    def __init__(self, client: ModelClient, config: DistillConfig, result: Distilled, meter: Meter) -> None:
        self.client, self.config, self.result, self.meter = client, config, result, meter
        self.dialogues: dict[int, Dialogue] = {}
        self.openings = Openings(config.similarity)
        if result.seeds is not None and config.openings == "grid":
            for prompt in result.seeds.prompts:  # an example that is handed back is no opening
                self.openings.take(prompt.text)
        self.avoid: dict[int, str] = {}  # the opening that a number's last one was too similar to
        # a number waits for those before it: twice as many as can be asked at once
        self.window = 2 * sum(spec.concurrency for spec in config.endpoints().values())

    async def run(self, numbers: list[int], attempt: int) -> list[int]:
        """One pass; returns the numbers that need another."""
        config, result = self.config, self.result
        compared = [asyncio.Event() for _ in numbers]
        again = []

        async def dialogue_of(place: int) -> Dialogue | NotUsable | RequestFailed | BudgetSpent | None:
            """The dialogue; why there is none; or None for a seed that is too similar to an earlier one."""
            number = numbers[place]
            opening: str | Exception
            try:
                opening = await self._opening(number, attempt)
            except (NotUsable, RequestFailed, BudgetSpent) as problem:
                opening = problem
            result.openings += not isinstance(opening, BudgetSpent)
            if place:
                await compared[place - 1].wait()
            earlier = None
            is_seed = config.openings == "seeds"
            if isinstance(opening, str) and not (is_seed and attempt):  # a seed is compared in the first pass
                earlier = self.openings.take(opening)
            compared[place].set()
            if not isinstance(opening, str):
                return opening  # type: ignore[return-value]
            if earlier is not None:
                if len(result.near) < EXAMPLES:
                    result.near.append((opening[:300], earlier[:300]))
                self.avoid[number] = earlier
                return None if is_seed else NotUsable(NEAR)
            dialogue = await grow(self.client, config, result.grid, number, attempt, opening)
            if dialogue.by_budget:
                result.budget_message = dialogue.ended
            if not dialogue.messages:
                return BudgetSpent() if dialogue.by_budget else NotUsable(f"{NO_ANSWER}: {dialogue.ended}")
            return dialogue

        async for place, found in in_order(range(len(numbers)), dialogue_of, self.window):
            if isinstance(found, Dialogue):
                self._keep(numbers[place], found)
            elif found is None:
                result.turned_down[NEAR] += 1
            else:
                again.append(numbers[place])
                if isinstance(found, BudgetSpent):
                    result.budget_message = result.budget_message or str(found)
                else:
                    result.turned_down[found.reason if isinstance(found, RequestFailed) else str(found)] += 1
        return again

    async def _opening(self, number: int, attempt: int) -> str:
        """Raises NotUsable, RequestFailed, BudgetSpent."""
        config, seeds = self.config, self.result.seeds
        if config.openings == "seeds":
            assert seeds is not None
            return seeds.prompts[number].text
        examples = []
        if seeds is not None:
            rng = random.Random(f"examples {config.seed} {number} {attempt}")
            chosen = rng.sample(seeds.prompts, min(config.examples, len(seeds.prompts)))
            examples = [prompt.text for prompt in chosen]
        avoid = self.avoid.get(number)
        request = opening_request(config, self.result.grid, number, attempt, examples, avoid)
        return await ask_message(self.client, request, quoted=[*examples, *([] if avoid is None else [avoid])])

    def _keep(self, number: int, dialogue: Dialogue) -> None:
        self.dialogues[number] = dialogue
        self.result.rounds[dialogue.rounds] += 1
        if dialogue.ended:
            self.result.ended[BUDGET if dialogue.by_budget else dialogue.ended] += 1
        self.meter.advance()


def _write(config: DistillConfig, result: Distilled, dialogues: dict[int, Dialogue]) -> None:
    if not dialogues:
        reasons = [
            ", ".join(f"{reason}: {n:,}" for reason, n in result.turned_down.most_common()),
            result.budget_message,
        ]
        raise UserError(
            f"{result.out}: no dialogue came out of {result.wanted:,}: {'; '.join(filter(None, reasons))}",
            ("Give a larger budget" if result.budget_message else "Look at the reasons")
            + "; the same command continues the job, and all replies so far are kept.",
        )
    has_cells = config.openings == "grid"
    if has_cells:
        result.cells.update({(cell.topic, cell.kind): 0 for cell in result.grid.cells})
    with file_aside(result.out / TRAIN) as train, file_aside(result.out / TEST) as test:
        for number, dialogue in sorted(dialogues.items()):
            prompt = dialogue.messages[0]["content"]
            prompt_id = hashlib.sha256(prompt.encode("utf-8")).hexdigest()
            row = {"prompt": prompt, "prompt_id": prompt_id, "messages": dialogue.messages, "topic": "", "kind": ""}
            if has_cells:
                cell = result.grid.cell(number)
                row |= {"topic": cell.topic, "kind": cell.kind}
                result.cells[cell.topic, cell.kind] += 1
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
    question = min(QUESTION_TOKENS, user.max_tokens)
    texts = [] if plan.seeds is None else [prompt.text for prompt in plan.seeds.prompts]
    if config.openings == "seeds":
        opening = max(len(text.encode()) for text in texts)
    else:
        opening = question
        longest = sorted(texts, key=len)[-config.examples :]
        asked = max(
            prompt_bound(user, opening_request(config, grid, number, 0, longest, None).messages)
            for number in range(min(plan.wanted, SAMPLE))
        )
        bounds[user.name].add(user, asked, question, times=plan.wanted, tries=config.tries)
    empty = follow_up_request(config, grid, 0, 0, [{"role": "user", "content": ""}] * 2)
    asked = prompt_bound(user, empty.messages) + max(len(move.encode()) for move in grid.moves)  # whichever is drawn
    system = 0 if teacher.system is None else TOKENS_OF_A_TURN + len(teacher.system.encode())
    for round_ in range(config.rounds):
        # before this round's answer: the opening, and an answer and a question for each earlier round
        said = opening + round_ * (teacher.max_tokens + question)
        turns = TOKENS_OF_A_TEMPLATE + TOKENS_OF_A_TURN * (2 * round_ + 1)
        tries = 1 if round_ else config.tries
        bounds[teacher.name].add(teacher, said + turns + system, teacher.max_tokens, times=plan.wanted, tries=tries)
        if round_:
            bounds[user.name].add(user, asked + said - question + 32 * round_, question, times=plan.wanted)
    return bounds
