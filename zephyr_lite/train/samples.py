"""Answers of the model under training to held-out prompts, at the start and at every evaluation.

They are generated as ``chat`` does, with the live adapters, and do not disturb training: no random number is drawn, and
modes, gradients and adapters stay as they were. A streamed base is not supported: generation would take minutes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from ..chat.generate import Chat, Sampling
from ..data.chat_template import Example
from ..errors import UserError
from ..model.loaded import LoadedModel
from .stage import Sample, Stage

logger = logging.getLogger(__name__)


def draw_samples(stage: Stage, step: int) -> list[Sample]:
    """Greedy answers of at most ``config.sample_tokens`` tokens to the first ``config.samples`` held-out prompts. If they
    cannot be generated (no memory, logits that are not finite), the reason is printed once, and training continues.

    Args:
        stage: its policy answers.
        step: optimizer steps done.
    """
    wanted = stage.config.samples
    if wanted == 0 or stage.eval_data is None or not stage.draws_samples:
        return []
    # some rows may have no prompt
    parts = [_prompt_and_reference(stage, example) for example in stage.eval_data.examples[: 4 * wanted]]
    found = [part for part in parts if part is not None][:wanted]
    why = None
    if stage.plan.stream:
        why = "the base is in main memory, where answers would take minutes"
    elif not found:
        why = "no held-out row has a prompt before its first answer"
    else:
        try:
            answers = _answers(stage, [prompt for prompt, _ in found])
        except torch.OutOfMemoryError:
            why = "the card's memory does not suffice for them"
        except UserError as error:
            why = error.message
    if why is not None:
        if stage.base.device.type == "cuda":
            torch.cuda.empty_cache()
        stage.draws_samples = False
        logger.warning(f"no samples are drawn: {why}. Training is not affected.")
        return []
    return [
        Sample(step, stage.template.tokenizer.decode(prompt), answer, reference)
        for (prompt, reference), answer in zip(found, answers)
    ]


def _answers(stage: Stage, prompts: list[list[int]]) -> list[str]:
    """One answer per prompt."""
    stack = stage.stack
    live = LoadedModel(str(stage.dir.path), stage.base, stack, stage.template, {stage.config.stage: stack.names})
    chat = Chat(live)
    training = [module for module in stack.model.modules() if module.training]
    stack.model.eval()
    answers = []
    try:
        for prompt in prompts:  # one at a time: the smallest cache, and no answer depends on another
            room = stage.config.sample_tokens
            if chat.context is not None:
                room = min(room, chat.context - len(prompt))
            answers.append(chat.sample([prompt], [Sampling(room, temperature=0.0)])[0].text if room > 0 else "")
    finally:
        for module in training:
            module.training = True
    return answers


def _prompt_and_reference(stage: Stage, example: Any) -> tuple[list[int], str] | None:
    """Ids of the conversation up to its first answer, and that answer; None if the row has none."""
    template, tokenizer = stage.template, stage.template.tokenizer
    if not isinstance(example, Example):
        prompt, answer = example.prompt_ids, example.chosen_ids
    elif stage.config.loss_on != "all":
        first = int(np.argmax(example.mask))
        after = np.flatnonzero(~example.mask[first:])
        prompt, answer = example.ids[:first], example.ids[first : first + int(after[0]) if len(after) else None]
    else:
        # the mask does not mark answers: the text is split at what the template writes before the first of them
        asked = [{"role": "user", "content": "?"}]
        opening = template.text_of(asked, True).removeprefix(template.text_of(asked))
        before, found, _ = tokenizer.decode(example.ids.tolist()).partition(opening)
        if not opening.strip() or not found:
            return None
        prompt = np.array(tokenizer(before + found, add_special_tokens=False)["input_ids"])
        rest = example.ids[len(prompt) :]
        ends = np.flatnonzero(np.isin(rest, template.end_token_ids))
        answer = rest[: ends[0]] if len(ends) else rest
    if len(prompt) == 0:
        return None
    return prompt.tolist(), tokenizer.decode(answer.tolist(), skip_special_tokens=True).strip()
