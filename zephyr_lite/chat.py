"""Talk to a stage of a run, or to a merged model: the same base for every stage, switched by its adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from .config import RunConfig
from .data.chat import ChatTemplate, resolve_template
from .data.formats import RowError
from .errors import UserError
from .model.adapters import AdapterStack, resolve_frozen_names
from .model.chain import chain_of_run
from .model.load import load_base, load_tokenizer
from .rundir import STAGE_FILE, newest_run
from .sampling import RowLimits, RowSampler, Sampled, Sampling

Message = dict[str, str]


class Chat:
    """A model that answers.

    Attributes:
        stack: base and frozen adapters.
        template: of training; it gives the prompt's ids and the tokens that end an answer.
        adapters: names of the adapters, from the bottom up.
    """

    def __init__(self, stack: AdapterStack, template: ChatTemplate, dtype: torch.dtype) -> None:
        self.stack, self.template, self.dtype = stack, template, dtype

    @property
    def adapters(self) -> list[str]:
        return self.stack.names

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
        return [self._text(row) for row, _ in out]

    def sample(
        self,
        prompt_ids: Sequence[Sequence[int] | np.ndarray],
        rows: Sequence[Sampling],
        *,
        stop: Callable[[], bool] = lambda: False,
    ) -> list[Sampled]:
        """Answer all prompts in one batch, each with settings and a seed of its own; all adapters are on.

        Args:
            prompt_ids: of each conversation (``template.prompt_ids``), [P_i].
            rows: how each answer is drawn. It does not depend on the others, but for rounding.
            stop: asked at every token; True ends all of them ("length").
        """
        longest = max(len(ids) for ids in prompt_ids)
        with self.stack.only(self.adapters):
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
            text = self._text(kept)
            sampled.append(Sampled(text, "stop" if ended else "length", len(ids), len(kept) + ended))
        return sampled

    def _generate(
        self, prompt_ids: Sequence[Sequence[int] | np.ndarray], **settings: Any
    ) -> list[tuple[list[int], bool]]:
        """The tokens of each answer, without the one that ends it, and whether there is one."""
        longest = max(len(ids) for ids in prompt_ids)
        model = self.stack.model
        device = self.stack.base.get_input_embeddings().weight.device
        ends = sorted({*self.template.end_token_ids, self.template.tokenizer.eos_token_id} - {None})
        tokens = torch.full((len(prompt_ids), longest), ends[0], device=device)
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

    def _text(self, tokens: list[int]) -> str:
        return str(self.template.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def load_chat(source: str | Path | None = None) -> Chat:
    """A run's folder (its newest finished stage), a stage's folder, or a model's folder; None: the newest run.

    Raises:
        UserError: it is none of these, or the stage is not finished.
    """
    path = Path(source) if source is not None else newest_run(Path("runs"))
    if path is None:
        raise UserError("there is no run under runs/.", "Run `zephyr-lite sft` first, or name a model's folder.")
    if (path / "config.json").is_file():
        base = load_base(RunConfig(model_name_or_path=str(path), load_in_4bit=False))
        return Chat(AdapterStack(base.model), resolve_template("auto", base.tokenizer), base.dtype)
    chain = chain_of_run(path.parent, stage=path.name) if (path / STAGE_FILE).is_file() else chain_of_run(path)
    described = chain.base
    base = load_base(
        RunConfig(
            model_name_or_path=described["name_or_path"],
            model_revision=described["revision"],
            load_in_4bit=described["load_in_4bit"],
            bnb_4bit_use_double_quant=described["double_quant"],
            engine=chain.info.get("engine", "fused"),  # which decides what architectures are known
        )
    )
    if base.fingerprint != described["fingerprint"]:
        raise UserError(
            f"{base.path}: is not the model that {path} was trained on (its files changed since).", "Restore it."
        )
    stack = AdapterStack(base.model)
    for name, adapter in zip(resolve_frozen_names([a.path for a in chain.adapters]), chain.adapters):
        stack.add_frozen(name, adapter)
    assert chain.tokenizer_from is not None
    return Chat(stack, resolve_template("auto", load_tokenizer(chain.tokenizer_from)), base.dtype)
