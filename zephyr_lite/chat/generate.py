"""Answers from the models of a run, or from a merged model: one base for all of them, switched by its adapters.

The loop gives each token as soon as it is drawn, stops at any token, keeps keys and values from turn to turn, and draws the
answers of several models in one batch, each row with its own adapters.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..data.messages import RowError
from ..errors import UserError
from ..model.loaded import LoadedModel, open_live

Message = dict[str, str]
Prompt = Sequence[int] | np.ndarray

PREFILL = 512  # tokens of a prompt per forward pass: activations and mask stay small
MAKE_ROOM = "Ask less; in a session /undo, /reset or a shorter /system make room."


@dataclass(frozen=True)
class Sampling:
    """How one answer is drawn.

    Attributes:
        max_new_tokens: its maximum length, at least 1.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with at least this probability; None: all.
        seed: of its draws.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float | None = None
    seed: int = 0


class RowSampler:
    """Chooses the next token of each row by the inverse of the cumulative distribution at one uniform number.

    A row's draws depend on its own seed and the position in its answer (those of torch's generator: on the whole batch).
    """

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._draws = [random.Random(row.seed) for row in rows]

    def choose(self, scores: Tensor) -> Tensor:
        """The next token of each row, from logits [rows, vocab] → [rows] int64."""
        chosen = scores.argmax(dim=-1)
        for place, (row, draws) in enumerate(zip(self._rows, self._draws)):
            if row.temperature > 0:
                chosen[place] = _draw(scores[place].double(), row, draws.random())
        return chosen


def _draw(logits: Tensor, row: Sampling, uniform: float) -> Tensor:
    # the maximum is subtracted first: a temperature close to 0 then divides differences, and nothing overflows
    probabilities = torch.softmax((logits - logits.max()) / row.temperature, dim=-1)
    if row.top_p is not None and row.top_p < 1:
        ranked, order = probabilities.sort(descending=True, stable=True)  # of equal ones the first counts
        kept = order[ranked.cumsum(-1) - ranked < row.top_p]
        probabilities = torch.zeros_like(probabilities).scatter_(0, kept, probabilities[kept])
    total = probabilities.cumsum(-1)
    found = torch.searchsorted(total, total[-1:] * uniform, right=True)[0]
    # rounding could end behind the last token that has a probability
    return found.clamp(max=int(probabilities.nonzero()[-1]))


class TooLong(UserError):
    """A conversation that fills the model's context."""


@dataclass(frozen=True)
class Drawn:
    """One row's answer.

    Attributes:
        text: without special tokens and surrounding white space.
        tokens: without the end token.
        finish: "stop" (the model ended it), "length", "interrupted", or "context" (the model's context is full).
        prompt_tokens, reused: length of the prompt, and how many of its tokens were in the cache.
    """

    text: str
    tokens: list[int]
    finish: str
    prompt_tokens: int = 0
    reused: int = 0

    @property
    def finish_reason(self) -> str:
        """As in the OpenAI API: "stop" or "length"."""
        return "stop" if self.finish == "stop" else "length"

    @property
    def completion_tokens(self) -> int:
        """Number of tokens, the end token included."""
        return len(self.tokens) + (self.finish == "stop")

    @property
    def note(self) -> str:
        """Why the answer is cut or empty; "" if it is neither."""
        tokens = len(self.tokens)
        return {
            "length": f"cut at {tokens:,} tokens; a higher max-new-tokens allows more",
            "context": f"cut at {tokens:,} tokens: the model's context is full",
            "interrupted": f"stopped after {tokens:,} tokens",
        }.get(self.finish, "" if tokens else "the answer is empty: the model ended at once")


class Chat:
    """A model that answers.

    Attributes:
        live: the loaded base, its adapters, and the models that they make.
        stack: base and frozen adapters.
        template: the chat template of training.
    """

    def __init__(self, live: LoadedModel) -> None:
        self.live, self.stack, self.template = live, live.stack, live.template

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the template's, and the tokenizer's EOS."""
        return sorted({*self.template.end_token_ids, self.template.tokenizer.eos_token_id} - {None})

    @property
    def device(self) -> torch.device:
        return torch.device(self.stack.base.get_input_embeddings().weight.device)

    @property
    def context(self) -> int | None:
        """Maximum tokens of a conversation; None if the model's configuration has no such number."""
        return getattr(self.stack.base.config, "max_position_embeddings", None)

    def ask(
        self,
        prompts: Sequence[str | list[Message]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        adapters: Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Answer all prompts in one batch.

        Args:
            prompts: a user's turn, or a conversation that ends with one.
            max_new_tokens: maximum length of an answer.
            temperature: 0 is greedy.
            adapters: the active adapters; None: all, []: the base alone.
            seed: for sampling.
        """
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        ids = [self.prompt_ids(conversation) for conversation in conversations]
        rows = [Sampling(max_new_tokens, temperature, None, seed + place) for place in range(len(prompts))]
        return [answer.text for answer in self.sample(ids, rows, adapters=adapters)]

    def prompt_ids(self, messages: list[Message], variables: Mapping[str, Any] | None = None) -> np.ndarray:
        """The ids [P] of a conversation that ends with a user's turn, with these variables of the chat template.

        Raises:
            TooLong: there is no room for an answer.
            UserError: the chat template refuses it, it contains a control token, or it is not valid Unicode.
        """
        try:
            "".join(message["content"] for message in messages).encode("utf-8")
            ids = self.template.prompt_ids(messages, variables)
        except (UnicodeEncodeError, RowError) as error:
            why = error if isinstance(error, RowError) else "text that is not valid Unicode"
            hint = "Rephrase it; in a session, /undo or /reset may help after earlier turns."
            raise UserError(f"this cannot be sent to the model: {why}.", hint) from None
        if self.context is not None and len(ids) >= self.context:
            long = (
                f"the conversation with this question has {len(ids):,} tokens; the model's context is {self.context:,}."
            )
            raise TooLong(long, MAKE_ROOM)
        return ids

    def sample(
        self,
        prompt_ids: Sequence[Prompt],
        rows: Sequence[Sampling],
        *,
        adapters: Sequence[str] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Drawn]:
        """Answer all prompts [P_i] in one batch (``Streamer.draw``). ``adapters``: the active ones; None: all, []: the base."""
        names = self.stack.names if adapters is None else adapters
        return Streamer(self, [names] * len(prompt_ids)).draw(prompt_ids, rows, stop=stop)

    def decode(self, tokens: list[int]) -> str:
        """The text without special tokens."""
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))


def load_chat(
    source: str | Path | None = None,
    *,
    stage: str | None = None,
    base: str | None = None,
    chat_template: str | None = "auto",
) -> Chat:
    """Load a run's folder (its last complete stage), a stage's folder, or a model's folder; None: the newest run."""
    return Chat(open_live(source, stage=stage, base=base, chat_template=chat_template))


class Streamer:
    """Draws answers for a fixed set of rows, each with its own adapters.

    A single row keeps its keys and values for the next turn, uncut even if the model has a sliding window: after an undo the
    model may need what was outside of it.

    Args:
        chat: the model.
        adapters: names of the adapters of each row.
    """

    def __init__(self, chat: Chat, adapters: Sequence[Sequence[str]]) -> None:
        self._chat, self._adapters = chat, [list(names) for names in adapters]
        self._model = chat.stack.base
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self.forget()

    def forget(self) -> None:
        """Empty the cache."""
        self._past = DynamicCache()
        self._ids: list[int] = []  # of the only row

    def draw(
        self,
        prompts: Sequence[Prompt],
        rows: Sequence[Sampling],
        on_text: Callable[[int, str], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Drawn]:
        """Answer one prompt per row.

        Args:
            prompts: of each row, [P_i] ids.
            rows: the settings of each answer; the other rows change it by rounding only.
            on_text: called with (row, piece of text) as it is drawn. The pieces together are the answer's text.
            stop: called before every token; True ends all answers.
        """
        ends, context = set(self._chat.ends), self._chat.context
        sampler = RowSampler(rows)
        finish: list[str | None] = [None] * len(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        ids = [[int(token) for token in prompt] for prompt in prompts]
        told = [""] * len(prompts)

        def tell(row: int, text: str) -> None:
            piece, told[row] = text[len(told[row]) :], text
            if on_text is not None and piece:
                on_text(row, piece)

        past, kept = self._reusable(ids)
        self.forget()  # after an interrupt some layers can be a token ahead of others
        with torch.inference_mode(), self._chat.stack.by_row(self._adapters):
            tokens, positions, mask = self._left_padded(ids, kept, min(ends))
            for start in range(0, tokens.shape[1], PREFILL):
                piece = slice(start, start + PREFILL)
                logits = self._forward(tokens[:, piece], positions[:, piece], mask[:, : kept + piece.stop], past)
            positions = positions[:, -1:]
            while not stop():
                chosen = sampler.choose(logits).tolist()
                for row, token in enumerate(chosen):
                    if finish[row] is not None:
                        continue
                    if token in ends:
                        finish[row] = "stop"
                        continue
                    answers[row].append(token)
                    text = "" if on_text is None else self._chat.decode(answers[row]).strip()
                    if not text.endswith("\ufffd"):  # some bytes of a character, whose others are in the next tokens
                        tell(row, text)
                    if len(answers[row]) >= rows[row].max_new_tokens:
                        finish[row] = "length"
                    elif context is not None and len(ids[row]) + len(answers[row]) >= context:
                        finish[row] = "context"
                if all(finish):
                    break
                positions = positions + 1
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                logits = self._forward(torch.tensor(chosen, device=mask.device)[:, None], positions, mask, past)
        # the cache may be one token shorter, whose keys are then computed again
        self._past, self._ids = past, (ids[0] + answers[0])[: past.get_seq_length()]
        texts = [self._chat.decode(answer).strip() for answer in answers]
        for row, text in enumerate(texts):
            tell(row, text)
        return [
            Drawn(text, answer, end or "interrupted", len(prompt), kept)
            for text, answer, end, prompt in zip(texts, answers, finish, ids)
        ]

    def _reusable(self, prompts: list[list[int]]) -> tuple[DynamicCache, int]:
        """The cache, cut to the tokens that a single row's prompt begins with, and their number; at least one token of the
        prompt is computed."""
        kept = 0
        if len(prompts) == 1:
            equal = takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompts[0]))
            kept = min(len(list(equal)), len(prompts[0]) - 1)
        if not kept:
            return DynamicCache(), 0
        if removed := self._past.get_seq_length() - kept:
            self._past.crop(-removed)
        return self._past, kept

    def _left_padded(self, prompts: list[list[int]], kept: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens behind the first ``kept``, padded on the left.

        Returns:
            tokens and positions [rows, M] int64; mask [rows, kept + M] int64 over the cached tokens and these, 0 for padding.
        """
        width = max(map(len, prompts)) - kept
        tokens = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.ones((len(prompts), kept + width), dtype=torch.int64)
        for row, ids in enumerate(prompts):
            new = ids[kept:]
            tokens[row, width - len(new) :] = torch.tensor(new)
            mask[row, : kept + width - len(ids)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, kept:]
        device = self._chat.device
        return tokens.to(device), positions.to(device), mask.to(device)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, past: DynamicCache) -> Tensor:
        """Logits [rows, vocab] float32 after the last of the tokens [rows, n]."""
        some: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}  # not every family takes both
        given = {name: value for name, value in some.items() if name in self._takes}
        out = self._model(input_ids=tokens, attention_mask=mask, past_key_values=past, use_cache=True, **given)
        logits: Tensor = out.logits[:, -1].float()
        if bool(logits.isnan().any()):
            hint = "Its weights or an adapter's are damaged, or too large for the data type."
            raise UserError("the model computes NaN instead of logits.", hint)
        return logits
