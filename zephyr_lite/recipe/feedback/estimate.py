"""What a job can cost at most, before anything is sent.

A prompt is counted by its bytes, of which a tokenizer makes at most as many tokens; a reply by its ``max_tokens``. So
the figures are bounds, usually three to five times what is spent; only a budget bounds a job for certain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...client.budget import TOKENS_OF_A_TEMPLATE, TOKENS_OF_A_TURN, dollars, most_prompt_tokens
from ...client.types import EndpointSpec, Message, Request
from .distill import Distilled
from .draw import draw_slots
from .grow import QUESTION_TOKENS, follow_up_request, opening_request
from .judge import ASPECTS, aspect_messages, overall_messages
from .prompts import Prompt
from .rate import completion_request
from .specs import DistillConfig, FeedbackConfig

# ``Desk.ask_parsed`` puts a question so often where the reply cannot be read
PARSED_TRIES = 3
SAMPLE = 2000  # openings whose length is looked at


@dataclass
class Bound:
    """Of some requests. ``worst_…``: each question put as often as it may be because its reply is of no use, and each of
    these as often as the endpoint's ``retries`` allow because the server fails."""

    requests: int = 0
    tokens: int = 0
    dollars: float = 0.0
    worst_requests: int = 0
    worst_tokens: int = 0
    worst_dollars: float = 0.0

    def add(self, spec: EndpointSpec, prompt_tokens: int, reply_tokens: int, *, times: int = 1, tries: int = 1) -> None:
        """So many requests of this size, each of which may be put ``tries`` times."""
        cost = dollars(spec, prompt_tokens, reply_tokens)
        worst = times * (1 + spec.retries) * tries
        self.requests += times
        self.tokens += times * (prompt_tokens + reply_tokens)
        self.dollars += times * cost
        self.worst_requests += worst
        self.worst_tokens += worst * (prompt_tokens + reply_tokens)
        self.worst_dollars += worst * cost


def prompt_bound(spec: EndpointSpec, messages: Sequence[Message], more_tokens: int = 0) -> int:
    """At most how many tokens a conversation has, the endpoint's own system turn included."""
    system = [] if spec.system is None or messages[0]["role"] == "system" else [{"content": spec.system}]
    return most_prompt_tokens([*system, *messages]) + more_tokens


def feedback_bounds(
    config: FeedbackConfig, prompts: Iterable[Prompt], principles: Mapping[str, Sequence[str]]
) -> dict[str, Bound]:
    """{endpoint's name: bound}.

    What the judge reads of a completion is counted with the completion's ``max_tokens``: its own tokenizer may make a
    few more or fewer of the same text.
    """
    specs = config.endpoints()
    bounds = {name: Bound() for name in specs}
    judge = config.judge
    for prompt in prompts:
        slots = draw_slots(prompt.id, config.models, config.completions, principles, config.principles, config.seed)
        for slot in slots:
            request: Request = completion_request(prompt, slot)
            spec = specs[slot.endpoint]
            bounds[slot.endpoint].add(spec, prompt_bound(spec, request.messages), spec.max_tokens, tries=1)
        texts = sum(specs[slot.endpoint].max_tokens for slot in slots)
        for aspect in ASPECTS:
            asked = aspect_messages(aspect, prompt.text, [""] * len(slots))
            bounds[judge.name].add(judge, prompt_bound(judge, asked, texts), judge.max_tokens, tries=PARSED_TRIES)
        if config.overall:
            for slot in slots:
                asked = overall_messages(prompt.text, "")
                longest = specs[slot.endpoint].max_tokens
                bounds[judge.name].add(judge, prompt_bound(judge, asked, longest), judge.max_tokens, tries=PARSED_TRIES)
    return bounds


def distill_bounds(config: DistillConfig, plan: Distilled) -> dict[str, Bound]:
    """{endpoint's name: bound}, with openings as long as the first ``SAMPLE`` of them are. An opening that is turned
    down comes on top, ``tries`` of them at most."""
    specs = config.endpoints()
    teacher, user = config.teacher, specs[config.user.name if config.user else config.teacher.name]
    bounds = {name: Bound() for name in specs}
    question = min(QUESTION_TOKENS, user.max_tokens)
    from_seeds = config.openings == "seeds"
    texts = [] if plan.seeds is None else [prompt.text for prompt in plan.seeds.prompts]
    longest = sorted(texts, key=len)[-config.examples :]
    if not from_seeds:
        asked = max(
            prompt_bound(user, opening_request(user, plan.grid, number, 0, config.seed, longest, None).messages)
            for number in range(min(plan.wanted, SAMPLE))
        )
        bounds[user.name].add(user, asked, question, times=plan.wanted, tries=config.tries)
    told = prompt_bound(
        user, follow_up_request(user, plan.grid, 0, 0, [{"role": "user", "content": ""}] * 2, 0).messages
    ) + max(len(move.encode()) for move in plan.grid.moves)  # whichever is drawn
    opening = question if not from_seeds else max(len(text.encode()) for text in texts)
    for round_ in range(config.rounds):
        # what was said before this round: the opening, an answer to it, and a question and an answer for each round
        said = opening + round_ * teacher.max_tokens + max(0, round_ - 1) * question + (round_ > 0) * question
        turns = TOKENS_OF_A_TEMPLATE + TOKENS_OF_A_TURN * (2 * round_ + 1)
        system = 0 if teacher.system is None else TOKENS_OF_A_TURN + len(teacher.system.encode())
        tries = config.tries if round_ == 0 else 1
        bounds[teacher.name].add(teacher, said + turns + system, teacher.max_tokens, times=plan.wanted, tries=tries)
        if round_:
            before = opening + round_ * teacher.max_tokens + (round_ - 1) * question
            bounds[user.name].add(user, told + before + 32 * round_, question, times=plan.wanted, tries=1)
    return bounds


def bound_lines(bounds: Mapping[str, Bound], priced: bool) -> list[str]:
    """A line for each endpoint, then all of them, then the worst case."""
    result = [f"{name}: {_line(b.requests, b.tokens, b.dollars, priced)}" for name, b in bounds.items()]
    every = bounds.values()
    result.append(
        "in all, every request answered at its first try: "
        + _line(sum(b.requests for b in every), sum(b.tokens for b in every), sum(b.dollars for b in every), priced)
    )
    result.append(
        "in the worst case, every reply of no use and every try failing, as often as is allowed "
        "(requests that a busy server turns away, 429, come on top): "
        + _line(
            sum(b.worst_requests for b in every),
            sum(b.worst_tokens for b in every),
            sum(b.worst_dollars for b in every),
            priced,
        )
    )
    if not priced:
        result.append("no prices are given (input_price, output_price: US dollars for a million tokens)")
    return result


def _line(requests: int, tokens: int, cost: float, priced: bool) -> str:
    return f"{requests:,} requests, {tokens:,} tokens at most" + (f", ${cost:,.2f} at most" if priced else "")


def priced(specs: Iterable[EndpointSpec]) -> bool:
    """Whether any endpoint has a price."""
    return any(spec.input_price or spec.output_price for spec in specs)
