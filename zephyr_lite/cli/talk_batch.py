"""``zephyr-lite chat --prompts``: a file of prompts, answered in batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..chat.rows import append_rows
from ..chat.session import Session
from ..data.formats import RowError
from ..errors import Interrupted, UserError
from ..io.interrupts import StopRequest
from ..io.words import short
from ..model.sampling import Sampling


def answer_all(session: Session, prompts: list[str], out: Path, batch: int, say: Callable[[str], None]) -> None:
    """Answer every prompt with every model of the session; each batch is in the file as soon as it is answered.

    A row: ``messages`` (the training schema), ``model``, ``finish_reason``, and ``prompt_number`` (from 1). A prompt that
    cannot be asked is named, counted, and left out.

    Raises:
        UserError: not one of the prompts can be asked.
        Interrupted: Ctrl-C; what was answered is in the file.
    """
    usable, refused = _usable(session, prompts)
    for place, why in refused.items():
        say(f"note: prompt {place + 1} ({short(prompts[place], 60)}) is left out: {why}")
    if not usable:
        raise UserError("none of the prompts can be asked.", "See why above.")
    cut: Counter[str] = Counter()
    done = 0
    with StopRequest("the batch under way is given up") as stop:
        for start in range(0, len(usable), batch):
            part = usable[start : start + batch]
            rows = [row for column in session.columns for row in _answered(session, column.model, part, prompts, stop)]
            if stop.name is not None:
                raise Interrupted(f"interrupted; the answers to {done:,} of {len(prompts):,} prompts are in {out}")
            append_rows(out, rows)
            done += len(part)
            cut.update(row["finish_reason"] for row in rows)
            say(f"{done:,} of {len(usable):,} prompts answered")
    if cut["length"]:
        say(f"note: {cut['length']:,} answers were cut at their length; --max-new-tokens allows more")
    left = f"; {len(refused):,} prompts were left out" if refused else ""
    say(f"{sum(cut.values()):,} answers are in {out}{left}")


def _usable(session: Session, prompts: list[str]) -> tuple[list[tuple[int, Any, int]], dict[int, str]]:
    """[(place, ids, room for an answer)], and place → why not."""
    usable, refused = [], {}
    system, context = session.settings.system, session.chat.context
    for place, prompt in enumerate(prompts):
        messages = [{"role": "system", "content": system}] if system else []
        try:
            ids = session.chat.template.prompt_ids([*messages, {"role": "user", "content": prompt}])
        except RowError as error:
            refused[place] = str(error)
            continue
        room = (
            session.settings.max_new_tokens
            if context is None
            else min(session.settings.max_new_tokens, context - len(ids))
        )
        if room < 1:
            refused[place] = f"{len(ids):,} tokens; the model's context is {context:,}"
        else:
            usable.append((place, ids, room))
    return usable, refused


def _answered(
    session: Session, model: str, part: list[tuple[int, Any, int]], prompts: list[str], stop: StopRequest
) -> list[dict[str, Any]]:
    how = session.settings
    if stop.name is not None:
        return []
    sampling = [Sampling(room, how.temperature, how.top_p, how.seed * 1_000_003 + place) for place, _, room in part]
    sampled = session.chat.sample(
        [ids for _, ids, _ in part], sampling, adapters=session.chat.live.models[model], stop=lambda: bool(stop.name)
    )
    head = [{"role": "system", "content": how.system}] if how.system else []
    return [
        {
            "messages": [
                *head,
                {"role": "user", "content": prompts[place]},
                {"role": "assistant", "content": found.text},
            ],
            "model": model,
            "finish_reason": found.finish_reason,
            "prompt_number": place + 1,
        }
        for (place, _, _), found in zip(part, sampled)
    ]
