"""``zephyr-lite distill``: dialogues that a teacher writes, over a grid of topics and kinds that is filled evenly.

Dialogues are numbered, and a number belongs to a cell. In a first pass every number gets an opening; those that are
turned down (too near to an earlier one, unusable, or without a first answer) get another in the next pass, up to
``tries`` times. Openings are asked for many at a time, and judged in the order of their numbers: so what is taken does not
depend on which reply came first, and a job that was interrupted ends like one that was not.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...client.budget import Totals
from ...client.desk import open_desk
from ...client.types import BudgetSpent, Desk, RequestFailed
from ...errors import UserError
from ...io.interrupts import pythons_ctrl_c
from ...io.run_dir import file_aside, write_json
from .files import Spool, claim, line_of, write_config
from .grid import Grid, read_grid
from .grow import Dialogue, NotUsable, ask_message, grow, opening_request
from .meter import Meter
from .near import Openings
from .pool import Turns, grace_said, in_order
from .prompts import Prompts
from .specs import DistillConfig

COMMAND = "distill"
TRAIN, TEST, REPORT = "train_sft.jsonl", "test_sft.jsonl", "report.json"
NEAR = "too near to an earlier opening or to a seed"
NO_ANSWER = "no first answer"
BUDGET = "the budget"
_EXAMPLES = 5  # of near-duplicates, in the report


@dataclass
class Distilled:
    """What a run made.

    Attributes:
        wanted, train, test: dialogues.
        openings: asked for; turned_down: of these, by reason; near: examples (the opening, the earlier one).
        ended: dialogues that are shorter than was asked for, by reason; rounds: how many have so many.
        cells: dialogues for each (topic, kind), those without any included; none where the openings are seeds.
        unreached: dialogues that the budget did not reach; why: what it said.
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
    why: str = ""
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
        """One fact a line."""
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
        if self.why:
            result.append(
                f"{self.unreached:,} dialogues are not there, {self.ended[BUDGET]:,} are shorter: {self.why} "
                "The same command with a larger budget goes on; what the journal holds is not asked again."
            )
        return result


def plan_distill(config: DistillConfig, seeds: Prompts | None) -> Distilled:
    """What is to be made; nothing is asked yet.

    Raises:
        UserError: a grid that cannot be read.
    """
    grid = read_grid(Path(config.grid) if config.grid else None, config.seed)
    most = len(seeds.prompts) if seeds is not None and config.openings == "seeds" else None
    wanted = config.count or most or len(grid.cells)
    return Distilled(Path(config.out), wanted if most is None else min(wanted, most), grid, seeds)


def run_distill(
    config: DistillConfig,
    result: Distilled,
    meter: Meter,
    *,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> Distilled:
    """Make the set in ``config.out``: train_sft.jsonl, test_sft.jsonl, report.json, journal.jsonl, config.yaml.

    The columns are ultrachat_200k's (prompt, prompt_id, messages), and topic and kind.

    Args:
        result: of ``plan_distill``; filled in.
        back_off: of ``open_desk``.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no dialogue came out. What was
            answered is in the journal in each case.
    """
    claim(result.out, COMMAND, config)
    with pythons_ctrl_c():
        asyncio.run(_run(config, result, meter, say, back_off))
    write_json(result.out / REPORT, result.report())
    return result


async def _run(
    config: DistillConfig, result: Distilled, meter: Meter, say: Callable[[str], None], back_off: float
) -> None:
    async with open_desk(
        list(config.endpoints().values()),
        result.out,
        max_requests=config.budget.requests,
        max_tokens=config.budget.tokens,
        on_progress=meter.totals,
        back_off=back_off,
    ) as desk:
        result.totals = desk.totals
        write_config(result.out, COMMAND, config)
        meter.totals(desk.totals)
        spool = Spool(result.out)
        try:
            with grace_said(say):
                await Passes(desk, config, result, meter, spool).run()
            _write(config, result, spool)
        finally:
            spool.close()


@dataclass(frozen=True)
class _Outcome:
    """Of one number in one pass: a dialogue; or the reason why there is none; or neither, where the budget ended it."""

    dialogue: Dialogue | None = None
    reason: str = ""
    final: bool = False  # another pass cannot help


class Passes:
    """Pass after pass over the dialogues that are not there yet."""

    def __init__(self, desk: Desk, config: DistillConfig, result: Distilled, meter: Meter, spool: Spool) -> None:
        self.desk, self.config, self.result, self.meter, self.spool = desk, config, result, meter, spool
        self.taken = Openings(config.similarity)
        if result.seeds is not None and config.openings == "grid":
            for prompt in result.seeds.prompts:  # an example handed back is no opening
                self.taken.take(prompt.text)
        self.avoid: dict[int, str] = {}  # the opening that a number's last one was too near to
        ends = config.endpoints().values()
        # a number waits for those before it: twice as many as can be asked at once
        self.window = 2 * sum(spec.concurrency for spec in ends)

    async def run(self) -> None:
        """Fill ``spool``, and count in ``result``."""
        missing = list(range(self.result.wanted))
        for attempt in range(self.config.tries):
            missing = await self._pass(missing, attempt)
            if not missing or self.result.why:
                break
        self.result.unreached = len(missing) if self.result.why else 0

    async def _pass(self, numbers: list[int], attempt: int) -> list[int]:
        """The numbers that need another."""
        turns = Turns()
        stop = len(numbers)
        again = []

        async def work(place: int) -> _Outcome:
            nonlocal stop
            try:
                if place >= stop:
                    return _Outcome()
                number = numbers[place]
                opening = await self._opening(number, attempt)
                await turns.wait(place)
                is_kept = self.config.openings == "seeds" and attempt > 0  # the seed was taken in the first pass
                earlier = None if is_kept else self.taken.take(opening)
            except BudgetSpent as spent:
                # what an earlier run finished beyond this one lies within a window of it
                stop = min(stop, place + self.window)
                self.result.why = self.result.why or str(spent)
                return _Outcome()
            except RequestFailed as failed:
                return _Outcome(reason=failed.reason)
            except NotUsable as reason:
                return _Outcome(reason=str(reason))
            finally:
                turns.done(place)
            if earlier is not None:
                return self._too_near(number, opening, earlier)
            dialogue = await grow(
                self.desk,
                self.config.teacher,
                self.config.endpoints()[self._user],
                self.result.grid,
                number,
                attempt,
                opening,
                self.config.rounds,
                self.config.seed,
            )
            if dialogue.by_budget:
                stop = min(stop, place + self.window)
                self.result.why = self.result.why or dialogue.ended
            if not dialogue.messages:
                return _Outcome() if dialogue.by_budget else _Outcome(reason=f"{NO_ANSWER}: {dialogue.ended}")
            return _Outcome(dialogue)

        async for place, outcome in in_order(range(len(numbers)), work, self.window):
            number = numbers[place]
            if outcome.dialogue is not None:
                self._keep(number, outcome.dialogue)
            else:
                if outcome.reason:
                    self.result.turned_down[outcome.reason] += 1
                if not outcome.final:
                    again.append(number)
        return again

    @property
    def _user(self) -> str:
        assert self.config.user is not None
        return self.config.user.name

    async def _opening(self, number: int, attempt: int) -> str:
        """Raises NotUsable, RequestFailed, BudgetSpent."""
        self.result.openings += 1
        seeds = self.result.seeds
        if self.config.openings == "seeds":
            assert seeds is not None
            return seeds.prompts[number].text
        examples = []
        if seeds is not None:
            rng = random.Random(f"examples {self.config.seed} {number} {attempt}")
            chosen = rng.sample(seeds.prompts, min(self.config.examples, len(seeds.prompts)))
            examples = [prompt.text for prompt in chosen]
        user = self.config.endpoints()[self._user]
        avoid = self.avoid.get(number)
        request = opening_request(user, self.result.grid, number, attempt, self.config.seed, examples, avoid)
        return await ask_message(self.desk, request, quoted=[*examples, *([] if avoid is None else [avoid])])

    def _too_near(self, number: int, opening: str, earlier: str) -> _Outcome:
        if len(self.result.near) < _EXAMPLES:
            self.result.near.append((opening[:300], earlier[:300]))
        self.avoid[number] = earlier
        return _Outcome(reason=NEAR, final=self.config.openings == "seeds")  # a seed stays as it is

    def _keep(self, number: int, dialogue: Dialogue) -> None:
        cell = self.result.grid.cell(number) if self.config.openings == "grid" else None
        prompt = dialogue.messages[0]["content"]
        row = {
            "prompt": prompt,
            "prompt_id": hashlib.sha256(prompt.encode("utf-8")).hexdigest(),
            "messages": dialogue.messages,
            "topic": cell.topic if cell else "",
            "kind": cell.kind if cell else "",
        }
        self.spool.put(number, row)
        self.result.rounds[dialogue.rounds] += 1
        if dialogue.ended:
            self.result.ended[BUDGET if dialogue.by_budget else dialogue.ended] += 1
        self.meter.advance()


def _write(config: DistillConfig, result: Distilled, spool: Spool) -> None:
    if not len(spool):
        why = [", ".join(f"{reason}: {count:,}" for reason, count in result.turned_down.most_common()), result.why]
        raise UserError(
            f"{result.out}: no dialogue came out of {result.wanted:,}: {'; '.join(part for part in why if part)}",
            "What was answered is in the journal there. "
            + ("Give a larger budget" if result.why else "Look at the reasons")
            + "; the same command goes on.",
        )
    if config.openings == "grid":
        result.cells.update({(cell.topic, cell.kind): 0 for cell in result.grid.cells})
    with file_aside(result.out / TRAIN) as train, file_aside(result.out / TEST) as test:
        for _, row in spool.rows():
            held_out = int(row["prompt_id"][:8], 16) < config.test_share * 2**32
            (test if held_out else train).write(line_of(row))
            result.test += held_out
            result.train += not held_out
            if config.openings == "grid":
                result.cells[row["topic"], row["kind"]] += 1
    for count, name in ((result.train, TRAIN), (result.test, TEST)):
        if not count:  # a file without rows is refused as broken by whoever reads it
            (result.out / name).unlink()
