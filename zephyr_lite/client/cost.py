"""Upper bounds of what a job costs.

A prompt is counted by its bytes and a reply by its ``max_tokens``: usually three to five times what is spent. Only a budget
limits a job exactly.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from .client import ModelClient, Request, RequestFailed, prompt_token_bound
from .endpoints import EndpointSpec
from .jobs import Budget
from .request_log import NAME, Reply


class CostClient:
    """Takes the place of a ``ModelClient`` to learn what a job costs at most: sends nothing and adds up its requests.

    Each reply is as long as it may be, with a text of one byte a token that differs from all others; none can be parsed.

    Attributes:
        bounds: {endpoint: {"requests": …, "tokens": …, "dollars": …}}, each request answered at its first try.
    """

    def __init__(self, specs: Iterable[EndpointSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self.bounds: dict[str, Counter[str]] = {name: Counter() for name in self._specs}

    async def ask(self, request: Request) -> Reply:
        spec = self._specs[request.endpoint]
        body = request.body(spec)
        prompt, length = prompt_token_bound(body["messages"]), body["max_tokens"]
        cost: dict[str, Any] = {"requests": 1, "tokens": prompt + length, "dollars": spec.dollars(prompt, length)}
        self.bounds[spec.name].update(cost)
        name = hashlib.sha256(request.key.encode()).hexdigest()
        return Reply((name * (length // len(name) + 1))[:length], "stop", prompt, length)

    async def ask_parsed(self, request: Request, parse: Callable[[str], Any], tries: int = 3) -> Any:
        await self.ask(request)
        raise RequestFailed("nothing is sent")


Client = ModelClient | CostClient


def cost_lines(
    specs: Iterable[EndpointSpec], work: Callable[[CostClient], Coroutine[Any, Any, Any]], budget: Budget, out: Path
) -> list[str]:
    """What ``work`` costs at most, a line for each endpoint and one for all; what limits it; and whether ``out`` holds replies."""
    client = CostClient(specs)
    asyncio.run(work(client))
    total = sum(client.bounds.values(), Counter())
    lines = [
        f"{name}: {b['requests']:,} requests, {b['tokens']:,} tokens at most"
        + (f", ${b['dollars']:,.2f}" if total["dollars"] else "")
        for name, b in {**client.bounds, "in all, every request answered at its first try": total}.items()
    ]
    if not total["dollars"]:
        lines.append("no prices are given (input_price, output_price: US dollars per million tokens)")
    lines.append("failed tries and unreadable replies come on top; --max-requests and --max-tokens are exact limits")
    limits = [f"{value:,} {unit}" for unit, value in budget if value is not None]
    lines.append(
        f"budget: {' and '.join(limits)}, never exceeded" if limits else "no budget (--max-requests, --max-tokens)"
    )
    if (out / NAME).is_file():
        lines.append(f"requests that {out} holds are not sent again; they are not deducted here")
    return lines
