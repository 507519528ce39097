"""Talk to a stage of a run, or to a merged model: the same base for every stage, switched by its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..data.formats import RowError
from ..errors import UserError
from ..model.loaded import LoadedModel, open_live
from ..model.sampling import RowLimits, RowSampler, Sampled, Sampling

Message = dict[str, str]


class Chat:
    """A model that answers.

    Attributes:
        live: base, adapters, and which of them make which model.
        stack: base and frozen adapters.
        template: of training; it gives the prompt's ids and the tokens that end an answer.
        adapters: names of the adapters, from the bottom up.
    """

    def __init__(self, live: LoadedModel) -> None:
        self.live, self.stack, self.template, self.dtype = live, live.stack, live.template, live.dtype

    @property
    def adapters(self) -> list[str]:
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
        """How many tokens a conversation may have; None where the model does not say."""
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
            max_new_tokens: an answer's length at most.
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
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        torch.manual_seed(seed)
        with self.stack.only(self.adapters if adapters is None else adapters):
            out = self._generate(prompt_ids, max_new_tokens=max_new_tokens, **sampling)
        return [self.text(row) for row, _ in out]

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int] | np.ndarray],
        rows: Sequence[Sampling],
        *,
        adapters: Sequence[str] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Sampled]:
        """Answer all prompts in one batch, each with settings and a seed of its own.

        Args:
            prompt_ids: of each conversation (``template.prompt_ids``), [P_i].
            rows: how each answer is drawn. It does not depend on the others, but for rounding.
            adapters: which of the adapters are on; None: all, []: the base alone.
            stop: asked at every token; True ends all of them ("length").
        """
        longest = max(len(ids) for ids in prompt_ids)
        with self.stack.only(self.adapters if adapters is None else adapters):
            out = self._generate(
                prompt_ids,
                max_new_tokens=max(row.max_new_tokens for row in rows),
                do_sample=False,
                logits_processor=LogitsProcessorList([RowSampler(rows)]),
                stopping_criteria=StoppingCriteriaList([RowLimits(longest, rows, stop)]),
            )
        sampled = []
        for ids, row, (answer, ended) in zip(prompt_ids, rows, out):
            kept = answer[: row.max_new_tokens]
            ended = ended and len(answer) < row.max_new_tokens
            text = self.text(kept)
            sampled.append(Sampled(text, "stop" if ended else "length", len(ids), len(kept) + ended))
        return sampled

    def _generate(
        self, prompt_ids: Sequence[Sequence[int] | np.ndarray], **settings: Any
    ) -> list[tuple[list[int], bool]]:
        """The tokens of each answer, without the one that ends it, and whether there is one."""
        longest = max(len(ids) for ids in prompt_ids)
        model = self.stack.model
        ends = self.ends
        tokens = torch.full((len(prompt_ids), longest), ends[0], device=self.device)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(prompt_ids):  # padded on the left, and masked
            tokens[row, longest - len(ids) :] = torch.as_tensor(ids, dtype=torch.int64)
            mask[row, longest - len(ids) :] = 1
        with torch.inference_mode():
            out = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                eos_token_id=ends,
                pad_token_id=ends[0],
                use_cache=True,
                **settings,
            )
        answers = []
        for row in out[:, longest:].tolist():
            end = next((i for i, token in enumerate(row) if token in ends), len(row))
            answers.append((row[:end], end < len(row)))
        return answers

    def decode(self, tokens: list[int]) -> str:
        """Without special tokens."""
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True))

    def text(self, tokens: list[int]) -> str:
        """An answer's: without special tokens, nor white space around it."""
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
        UserError: as ``live.open_live``.
    """
    return Chat(open_live(source, stage=stage, base=base, chat_template=chat_template))
