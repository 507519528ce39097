"""``zephyr-lite feedback``: prompts → completions → ratings → a set in UltraFeedback's raw schema, and pairs of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...client.budget import Totals
from ...client.desk import open_desk
from ...client.types import BudgetSpent, Desk
from ...data.load import summarise
from ...errors import UserError
from ...io.interrupts import pythons_ctrl_c
from ...io.run_dir import file_aside, write_json
from .draw import read_principles
from .files import claim, line_of, write_config
from .judge import ASPECTS
from .meter import Meter
from .pool import grace_said, in_order
from .prompts import Prompt, Prompts
from .rate import NoRow, Tally, rate_prompt
from .report import places, tally_report
from .specs import FeedbackConfig

COMMAND = "feedback"
ROWS = "train.jsonl"
REPORT = "report.json"
PAIRS = "pairs"


@dataclass
class Feedback:
    """What a run made.

    Attributes:
        rows: written to train.jsonl.
        dropped: reason → the places of the prompts that gave no row.
        unreached: how many prompts the budget did not reach, or reached in part.
        why: what the budget said, or "".
        totals: what the job has spent in all.
        replies: of this run: from the journal, and new.
    """

    out: Path
    read: Prompts
    tally: Tally = field(default_factory=Tally)
    rows: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    unreached: int = 0
    why: str = ""
    totals: Totals = field(default_factory=Totals)

    def report(self, config: FeedbackConfig) -> dict[str, Any]:
        """For report.json: counts, places of what was left out, ratings, spending."""
        return {
            "command": COMMAND,
            "version": __version__,
            "prompts": {
                "source": self.read.label,
                "rows": self.read.read,
                "prompts": len(self.read.prompts),
                "left_out": places(self.read.dropped),
            },
            "rows": self.rows,
            "dropped": places(self.dropped),
            "not_reached_by_the_budget": self.unreached,
            **tally_report(self.tally),
            "spent": self.totals.as_dict(),
            "prices_given": any(spec.input_price or spec.output_price for spec in config.endpoints().values()),
        }

    def lines(self) -> list[str]:
        """One fact a line."""
        result = [f"{self.out / ROWS}: {self.rows:,} rows of {len(self.read.prompts):,} prompts"]
        if self.dropped:
            result.append(f"dropped: {summarise(self.dropped)}")
        if self.unreached:
            result.append(
                f"{self.unreached:,} prompts are not done: {self.why} "
                "The same command with a larger budget goes on; what the journal holds is not asked again."
            )
        return result


def run_feedback(
    config: FeedbackConfig,
    read: Prompts,
    meter: Meter,
    *,
    say: Callable[[str], None],
    back_off: float = 1.0,
) -> Feedback:
    """Make the set in ``config.out``: train.jsonl, report.json, journal.jsonl, config.yaml.

    The rows stand in the prompts' order, and are the same however many requests run at once and however often the job
    was interrupted, as far as the servers give the same replies.

    Args:
        read: of ``read_prompts``.
        back_off: of ``open_desk``.

    Raises:
        UserError: the folder holds something else, an endpoint cannot answer at all, or no row came out. What was
            answered is in the journal in each case.
    """
    out = Path(config.out)
    principles = read_principles(Path(config.principles_file) if config.principles_file else None)
    claim(out, COMMAND, config)
    result = Feedback(out, read)
    with pythons_ctrl_c():
        asyncio.run(_run(config, principles, result, meter, say, back_off))
    write_json(out / REPORT, result.report(config))
    return result


def make_pair_folder(config: FeedbackConfig, say: Callable[[str], None]) -> list[str]:
    """``OUT/pairs`` from ``OUT/train.jsonl``, as ``data pairs`` makes it by default; lines that say what came of it.

    Rows of which no pair can be made are no error here: the ratings are there, and other rules may find pairs.
    """
    from ..pairs import make_pairs
    from ..ultrafeedback import PairRules

    out = Path(config.out)
    rows, pairs = out / ROWS, out / PAIRS
    try:
        report = make_pairs([str(rows)], pairs, PairRules(seed=config.seed), overwrite=True, say=say)
    except UserError as error:
        earlier = f" {pairs} is from an earlier run." if pairs.exists() else ""
        return [f"no pairs: {error.message}{earlier}", f"With other rules: zephyr-lite data pairs {rows} --out {pairs}"]
    assert report is not None  # overwritten
    return [
        *report.lines(),
        f"Next: zephyr-lite dpo dataset.path={pairs} dataset.split=train_prefs",
    ]


def _empty(result: Feedback) -> UserError:
    failed = {
        **result.tally.failed,
        **{f"judge, {name}": count for name, count in result.tally.unread.items() if count},
    }
    why = [summarise(result.dropped), result.why, ", ".join(f"{reason}: {count:,}" for reason, count in failed.items())]
    return UserError(
        f"{result.out}: no row came out of {len(result.read.prompts):,} prompts: {'; '.join(part for part in why if part)}",
        "What was answered is in the journal there. "
        + ("Give a larger budget" if result.unreached else "Look at the reasons")
        + "; the same command goes on.",
    )


def window_of(config: FeedbackConfig) -> int:
    """How many prompts are under way: enough to keep every endpoint busy, and few enough that little is half done when
    a budget ends. Twice, because they stand in order and one is slower than the next."""
    busy = math.ceil(sum(spec.concurrency for spec in config.models) / config.completions)
    judged = math.ceil(config.judge.concurrency / len(ASPECTS))
    return 2 * (busy + judged)


async def _run(
    config: FeedbackConfig,
    principles: dict[str, list[str]],
    result: Feedback,
    meter: Meter,
    say: Callable[[str], None],
    back_off: float,
) -> None:
    window = window_of(config)
    prompts = result.read.prompts
    # Once the budget is spent nothing new is begun; prompts that a run before this one may have finished are looked up
    # all the same: they lie within a window of the first that is not.
    stop = len(prompts)

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

        async def work(number: int) -> dict[str, Any] | str | None:
            nonlocal stop
            if number >= stop:
                return None
            try:
                return await _row(desk, config, principles, prompts[number], result)
            except BudgetSpent as spent:
                stop = min(stop, number + window)
                result.why = result.why or str(spent)
                return None

        with file_aside(result.out / ROWS) as file, grace_said(say):
            async for number, row in in_order(range(len(prompts)), work, window):
                if isinstance(row, dict):
                    file.write(line_of(row))
                    result.rows += 1
                elif row is not None:
                    result.dropped.setdefault(row, []).append(prompts[number].where)
                else:
                    result.unreached += 1
                meter.advance()
            if not result.rows:
                raise _empty(result)  # an earlier file stays as it is


async def _row(
    desk: Desk, config: FeedbackConfig, principles: dict[str, list[str]], prompt: Prompt, result: Feedback
) -> dict[str, Any] | str:
    """The row, or the reason why there is none."""
    try:
        return await rate_prompt(desk, config, principles, prompt, result.tally)
    except NoRow as reason:
        return str(reason)
