"""Tokens per second of `zephyr-lite chat`, beside transformers' own generate on the same model.

    python -m bench.chat SOURCE [--stage NAME] [--tokens 64] [--repeats 3] [--turns 4] [--out chat.json]

All greedy, and every answer is made to be exactly --tokens long (no token ends it), so that equal work is compared. The ways
take turns, and the median of their repetitions counts. `generate`: the library's loop with its own cache, batch of one.
`stream`: chat's. `compare`: all models of the run in one batch; `one by one`: the same answers, a model at a time. The
conversation of --turns turns is asked with the kept cache and without: the prompt's seconds, up to the first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.command import header, run, save
from zephyr_lite.chat import Chat
from zephyr_lite.chat.generate import Streamer
from zephyr_lite.model.loaded import open_live
from zephyr_lite.model.sampling import Sampling

QUESTION = "Tell me about the rivers of Europe, their sources, and the cities on their banks."
FOLLOWING = "And what else should one know about them?"


class Endless(Chat):
    """A model whose answers end at their length alone."""

    @property
    def ends(self) -> list[int]:
        return [-1]  # no token


def measure(source: str | None, stage: str | None, tokens: int, repeats: int, turns: int) -> dict[str, Any]:
    """All of it; speeds in tokens per second, of every model's tokens together where there are several."""
    live = open_live(source, stage=stage)
    chat = Endless(live)
    ids = [int(i) for i in chat.template.prompt_ids([{"role": "user", "content": QUESTION}])]
    names = live.models[live.policy]
    every = list(live.models.values())
    how = [Sampling(tokens, 0.0)]

    def generate() -> int:
        with torch.inference_mode(), live.stack.only(names):
            prompt = torch.tensor([ids], device=chat.device)
            out = live.stack.model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return int(out.shape[1]) - len(ids)

    def stream() -> int:
        return len(Streamer(chat, [names]).draw([ids], how)[0].tokens)

    def compare() -> int:
        return sum(len(row.tokens) for row in Streamer(chat, every).draw([ids] * len(every), how * len(every)))

    def one_by_one() -> int:
        return sum(len(Streamer(chat, [each]).draw([ids], how)[0].tokens) for each in every)

    ways: dict[str, Callable[[], int]] = {"generate": generate, "stream": stream}
    if len(every) > 1:
        ways |= {"compare": compare, "one by one": one_by_one}
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            count = way()
            if number:  # the first warms up
                speeds[name].append(count / (time.perf_counter() - started))
    return {
        "source": live.source,
        "models": list(live.models),
        "dtype": str(live.dtype).removeprefix("torch."),
        "load_in_4bit": bool(live.chain and live.chain.base.get("load_in_4bit", True)),
        "device": str(chat.device),
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "prompt_tokens": len(ids),
        "tokens_per_second": {name: round(statistics.median(found), 2) for name, found in speeds.items()},
        "first_token": first_tokens(chat, names, turns, min(tokens, 16)),
    }


def first_tokens(chat: Chat, names: list[str], turns: int, tokens: int) -> list[dict[str, Any]]:
    """Of each turn of a conversation: the prompt's length, what was reused, and the seconds up to the first token."""
    kept, anew = Streamer(chat, [names]), Streamer(chat, [names])
    messages = [{"role": "user", "content": QUESTION}]
    found = []
    for turn in range(turns):
        ids = [int(i) for i in chat.template.prompt_ids(messages)]
        anew.forget()
        row: dict[str, Any] = {"turn": turn + 1, "prompt_tokens": len(ids)}
        for name, streamer in (("without", anew), ("kept", kept)):
            first: list[float] = []
            started = time.perf_counter()
            (drawn,) = streamer.draw(
                [ids], [Sampling(tokens, 0.0)], lambda _, token, first=first: first.append(time.perf_counter())
            )
            row[f"seconds_{name}"] = round(first[0] - started, 4)
        row["reused"] = drawn.reused
        found.append(row)
        messages += [{"role": "assistant", "content": drawn.text}, {"role": "user", "content": FOLLOWING}]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="a run's folder, a stage's, or a model's")
    parser.add_argument("--stage")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = {**header(), **measure(given.source, given.stage, given.tokens, given.repeats, given.turns)}
    print(json.dumps(found, indent=1))
    save(given.out, found)


if __name__ == "__main__":
    run(main)
