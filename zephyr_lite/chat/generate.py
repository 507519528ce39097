"""Answers from the stages of a run, or from a merged model: one base for all, switched by its adapters.

The generation loop is ours: it gives each token as soon as it is drawn, can be stopped at every token, keeps the keys and
values from turn to turn, and draws the answers of several models in one batch, each row with its own adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..data.formats import RowError
from ..errors import UserError
from ..model.loaded import LoadedModel, open_live
from ..model.sampling import RowSampler, Sampling

Message = dict[str, str]
Prompt = Sequence[int] | np.ndarray

# Tokens of a prompt that are computed at a time: a long one can be interrupted, and its mask stays small.
PREFILL = 512


@dataclass(frozen=True)
class Drawn:
    """One row's answer.

    Attributes:
        text: without special tokens and surrounding white space.
        tokens: without the one that ends it.
        finish: "stop" (the model ended it), "length", or "interrupted".
        prompt_tokens, reused: the prompt's length, and how much of it was in the cache.
    """

    text: str
    tokens: list[int]
    finish: str
    prompt_tokens: int
    reused: int

    @property
    def finish_reason(self) -> str:
        """As the OpenAI API has it: "stop" or "length"."""
        return "stop" if self.finish == "stop" else "length"

    @property
    def completion_tokens(self) -> int:
        """Its tokens, the one that ends it included."""
        return len(self.tokens) + (self.finish == "stop")


class Chat:
    """A model that answers.

    Attributes:
        live: base, adapters, and which of them make which model.
        stack: base and frozen adapters.
        template: of training; it gives the prompt's ids and the tokens that end an answer.
    """

    def __init__(self, live: LoadedModel) -> None:
        self.live, self.stack, self.template, self.dtype = live, live.stack, live.template, live.dtype

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, from the bottom up."""
        return self.stack.names

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: the template's, and the tokenizer's own."""
        return sorted({*self.template.end_token_ids, self.template.tokenizer.eos_token_id} - {None})

    @property
    def device(self) -> torch.device:
        return torch.device(self.stack.base.get_input_embeddings().weight.device)

    @property
    def context(self) -> int | None:
        """The maximum length of a conversation in tokens; None where the model does not say."""
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
            prompts: a user's words, or a conversation that ends with a user's turn.
            max_new_tokens: maximum length of an answer.
            temperature: 0 is greedy.
            adapters: which of the adapters are on; None: all, []: the base alone.
            seed: for sampling.

        Raises:
            UserError: a prompt that the chat template refuses, or that holds one of its control tokens.
        """
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        try:
            prompt_ids = [self.template.prompt_ids(messages) for messages in conversations]
        except RowError as error:
            raise UserError(f"the prompt cannot be rendered: {error}.") from None
        rows = [Sampling(max_new_tokens, temperature, None, seed + place) for place in range(len(prompts))]
        return [answer.text for answer in self.sample(prompt_ids, rows, adapters=adapters)]

    def sample(
        self,
        prompt_ids: Sequence[Prompt],
        rows: Sequence[Sampling],
        *,
        adapters: Sequence[str] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Drawn]:
        """Answer all prompts in one batch, each with settings and a seed of its own.

        Args:
            prompt_ids: of each conversation (``template.prompt_ids``), [P_i].
            rows: how each answer is drawn. It does not depend on the others, but for rounding.
            adapters: which of the adapters are on; None: all, []: the base alone.
            stop: called at every token; True ends all answers.
        """
        names = self.adapters if adapters is None else adapters
        return Streamer(self, [names] * len(prompt_ids)).draw(prompt_ids, rows, stop=stop)

    def decode(self, tokens: list[int]) -> str:
        """The text without special tokens."""
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))

    def text(self, tokens: list[int]) -> str:
        """An answer's text: without special tokens and surrounding white space."""
        return self.decode(tokens).strip()


def load_chat(
    source: str | Path | None = None,
    *,
    stage: str | None = None,
    base: str | None = None,
    chat_template: str | None = "auto",
) -> Chat:
    """A run's folder (its last complete stage), a stage's folder, or a model's folder; None: the newest run.

    Raises:
        UserError: as ``open_live``.
    """
    return Chat(open_live(source, stage=stage, base=base, chat_template=chat_template))


class Streamer:
    """Draws answers for a fixed set of rows, each with its own adapters. A row alone keeps its keys and values for the next
    turn, whole even where the model has a sliding window: an undo may need what slid out of it.

    Args:
        chat: the model.
        adapters: of each row, the names of its adapters.
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
        on_token: Callable[[int, int], None] = lambda row, token: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Drawn]:
        """Answer, one prompt a row.

        Args:
            prompts: of each row, [P_i] ids.
            rows: how each answer is drawn.
            on_token: called with (row, token) as soon as it is drawn; not with tokens that end an answer.
            stop: called before every token, and between pieces of a long prompt.

        Raises:
            UserError: the model computes NaN.
        """
        ends = set(self._chat.ends)
        sampler = RowSampler(rows)
        finish: list[str | None] = [None] * len(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        ids = [[int(token) for token in prompt] for prompt in prompts]
        try:
            with torch.inference_mode(), self._chat.stack.by_row(self._adapters):
                tokens, positions, mask, kept = self._begin(ids, min(ends))
                logits = self._prefill(tokens, positions, mask, stop)
                positions = positions[:, -1:]
                while logits is not None:
                    chosen = sampler.choose(logits).tolist()
                    for row, token in enumerate(chosen):
                        if finish[row] is not None:
                            continue
                        if token in ends:
                            finish[row] = "stop"
                            continue
                        answers[row].append(token)
                        on_token(row, token)
                        if len(answers[row]) >= rows[row].max_new_tokens:
                            finish[row] = "length"
                    if all(finish) or stop():
                        break
                    positions = positions + 1
                    mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                    logits = self._forward(torch.tensor(chosen, device=mask.device)[:, None], positions, mask)
        except BaseException:
            self.forget()  # an interrupt leaves some layers a token ahead of others
            raise
        if logits is None:
            self.forget()
        else:
            self._ids = ids[0] + answers[0][:-1]  # the last token was not fed back
        return [
            Drawn(self._chat.text(answer), answer, end or "interrupted", len(prompt), kept)
            for answer, end, prompt in zip(answers, finish, ids)
        ]

    def _begin(self, prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """The part of the prompts to compute. One row alone keeps the keys and values that its prompt shares with the cache;
        at least one token is computed, for its logits.

        Returns:
            tokens and positions [rows, M] int64 to compute, padded on the left; mask [rows, K + M] int64 over the K kept
            slots and these, 0 for padding; K.
        """
        kept = 0
        if len(prompts) == 1:
            kept = min(
                sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompts[0]))),
                len(prompts[0]) - 1,
            )
        removed = self._past.get_seq_length() - kept
        if not kept:
            self._past = DynamicCache()
        elif removed:
            self._past.crop(-removed)
        width = max(map(len, prompts)) - kept
        tokens = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.ones((len(prompts), kept + width), dtype=torch.int64)
        for row, ids in enumerate(prompts):
            new = ids[kept:]
            tokens[row, width - len(new) :] = torch.tensor(new)
            mask[row, : kept + width - len(ids)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, kept:]
        device = self._chat.device
        return tokens.to(device), positions.to(device), mask.to(device), kept

    def _prefill(self, tokens: Tensor, positions: Tensor, mask: Tensor, stop: Callable[[], bool]) -> Tensor | None:
        """The logits [rows, vocab] after the tokens; None where it was stopped."""
        width, before = tokens.shape[1], mask.shape[1] - tokens.shape[1]
        logits = None
        for start in range(0, width, PREFILL):
            if stop():
                return None
            end = min(start + PREFILL, width)
            logits = self._forward(tokens[:, start:end], positions[:, start:end], mask[:, : before + end])
        return logits

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Logits [rows, vocab] float32 after the last of the tokens [rows, n]."""
        given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self._past,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        logits: Tensor = out.logits[:, -1].float()
        if bool(logits.isnan().any()):
            raise UserError(
                "the model computes NaN instead of logits.",
                "Its weights or an adapter's are damaged, or too large for the data type.",
            )
        return logits


class TextStream:
    """Tokens to text as they come. The pieces together are the decoded answer without surrounding white space.

    Args:
        decode: ids → text, without special tokens.
    """

    # A character has four bytes at most: more tokens than this without one are not the beginning of a character.
    HELD = 8

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._shown, self._done = "", 0  # the text given out, and its tokens

    def push(self, token: int) -> str:
        """The text that is complete with this token; often empty, since a character's bytes may span several tokens."""
        self._tokens.append(token)
        return self._next(last=len(self._tokens) - self._done >= self.HELD)

    def finish(self) -> str:
        """The text that was held back."""
        return self._next(last=True)

    def _next(self, last: bool) -> str:
        text = self._decode(self._tokens).strip()
        if text.endswith("\ufffd") and not last:  # what a decoder writes for an incomplete character
            return ""
        piece = text[len(self._shown) :]
        if piece:
            self._shown, self._done = text, len(self._tokens)
        return piece
