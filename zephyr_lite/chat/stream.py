"""Answers token by token: the loop of a conversation, which ``generate`` has no place for.

It gives every token when it is there, ends at the next one when it is asked to, keeps the keys and values from turn to
turn, and draws the answers of several models in one batch, each row with its own adapters on the one base.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..model.sampling import RowSampler, Sampling
from .cache import RowCache
from .model import Chat

# Tokens of a prompt that are computed at a time: a long one can be interrupted, and its mask stays small.
PREFILL = 512


@dataclass(frozen=True)
class Drawn:
    """One row's answer.

    Attributes:
        tokens: without the one that ends it.
        finish: "stop" (the model ended it), "length", or "interrupted".
        prompt_tokens, reused: the prompt's length, and how much of it was in the cache.
    """

    tokens: list[int]
    finish: str
    prompt_tokens: int
    reused: int


class Streamer:
    """Draws answers for a fixed set of rows, each with adapters of its own.

    Args:
        chat: the model.
        rows: for each row the names of the adapters that are on.

    Raises:
        UserError: an architecture whose state is no list of keys and values (Mamba and its kind).
    """

    def __init__(self, chat: Chat, rows: Sequence[Sequence[str]]) -> None:
        self._chat, self._adapters = chat, [list(names) for names in rows]
        self._model = chat.stack.base
        if getattr(self._model, "_is_stateful", False):
            raise UserError(
                f"chat cannot stream from {type(self._model).__name__}: it keeps a state instead of keys and values.",
                "zephyr-lite chat --prompts FILE --out FILE answers through transformers' generate.",
            )
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._cache = RowCache(len(self._adapters))

    def forget(self) -> None:
        """Let go of the cache."""
        self._cache.forget()

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sampling],
        on_token: Callable[[int, int], None] = lambda row, token: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Drawn]:
        """Answer, one prompt a row.

        Args:
            prompts: of each row, [P_i] ids.
            rows: how each answer is drawn.
            on_token: told (row, token) as soon as it is drawn; not of tokens that end an answer.
            stop: asked before every token, and between pieces of a long prompt.

        Raises:
            UserError: the model computes no numbers (NaN).
        """
        ends = set(self._chat.ends)
        pad = min(ends)
        sampler = RowSampler(rows)
        finish: list[str | None] = [None] * len(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        try:
            with torch.inference_mode(), self._chat.stack.by_row(self._adapters):
                chunk = self._cache.begin([[int(i) for i in ids] for ids in prompts], self._chat.device, pad)
                logits = self._prefill(chunk.tokens, chunk.positions, chunk.mask, stop)
                mask, positions = chunk.mask, chunk.positions[:, -1:]
                if logits is not None:
                    for row, ids in enumerate(prompts):
                        self._cache.ids[row] = [int(i) for i in ids]
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
                    for row, token in enumerate(chosen):
                        if finish[row] is None:
                            self._cache.ids[row].append(token)
        except BaseException:
            self.forget()  # an interrupt leaves some layers a token ahead of others
            raise
        if logits is None:
            self.forget()
        return [
            Drawn(answer, end or "interrupted", len(ids), reused)
            for answer, end, ids, reused in zip(answers, finish, prompts, chunk.reused)
        ]

    def _prefill(
        self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, stop: Callable[[], bool]
    ) -> torch.Tensor | None:
        """The logits [rows, vocab] after the chunk; None where it was stopped."""
        width, before = tokens.shape[1], mask.shape[1] - tokens.shape[1]
        logits = None
        for start in range(0, width, PREFILL):
            if stop():
                return None
            end = min(start + PREFILL, width)
            logits = self._forward(tokens[:, start:end], positions[:, start:end], mask[:, : before + end])
        return logits

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] float32 after the last of the tokens [rows, n]."""
        given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        out = self._model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=self._cache.past,
            use_cache=True,
            **{name: value for name, value in given.items() if name in self._takes},
        )
        logits = out.logits[:, -1].float()
        if bool(logits.isnan().any()):
            raise UserError(
                "the model computes NaN where it should compute logits.",
                "Its weights or an adapter's are damaged, or too large for the data type.",
            )
        return logits
