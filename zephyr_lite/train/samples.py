"""Answers of the model under training to held-out prompts, at the start and at every evaluation.

They are generated as ``chat`` does, with the live adapters, and do not disturb training: no random number is drawn, and
modes, gradients and adapters stay as they were. A streamed base is not supported: generation would take minutes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.chat_template import Example
from ..errors import UserError
from .observer import Sample

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .stage import Stage


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
    if stage.plan.stream or stage.decoder.stream is not None:
        return _give_up(stage, "the base is in main memory, where answers would take minutes")
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for example in stage.eval_data.examples[: 4 * wanted]:  # some may have no prompt
        if (parts := _prompt_and_reference(stage, example)) is not None:
            found.append(parts)
        if len(found) == wanted:
            break
    if not found:
        return _give_up(stage, "no held-out row has a prompt before its first answer")
    decode = stage.template.tokenizer.decode
    try:
        answers = _answers(stage, [prompt for prompt, _ in found])
    except torch.OutOfMemoryError:
        answers = None  # the cache is emptied after the error is gone
    except UserError as error:
        return _give_up(stage, error.message)
    if answers is None:
        torch.cuda.empty_cache()
        return _give_up(stage, "the card's memory does not suffice for them")
    return [
        Sample(step, decode(prompt.tolist()), answer, decode(reference.tolist(), skip_special_tokens=True).strip())
        for (prompt, reference), answer in zip(found, answers)
    ]


def _give_up(stage: Stage, why: str) -> list[Sample]:
    stage.draws_samples = False
    logger.info(f"no samples are drawn: {why}. Training is not affected.")
    return []


def _answers(stage: Stage, prompts: list[np.ndarray]) -> list[str]:
    """One answer per prompt.

    Raises:
        UserError: the model's logits are not finite.
    """
    from ..chat.generate import Chat, Streamer
    from ..model.loaded import LoadedModel
    from ..model.sampling import Sampling

    stack = stage.stack
    live = LoadedModel(str(stage.dir.path), stage.base, stack, stage.template, {stage.config.stage: stack.names})
    chat = Chat(live)
    answers = []
    with _evaluating(stack.model):
        for prompt in prompts:  # one at a time: the smallest cache, and no answer depends on another
            room = stage.config.sample_tokens
            if chat.context is not None:
                room = min(room, chat.context - len(prompt))
            if room < 1:
                answers.append("")
                continue
            drawn = Streamer(chat, [stack.names]).draw([prompt.tolist()], [Sampling(room, temperature=0.0)])
            answers.append(drawn[0].text)
    return answers


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A context with every module in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _prompt_and_reference(stage: Stage, example: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of the conversation up to its first answer, and of that answer; None if the row has none."""
    if not isinstance(example, Example):
        return example.prompt_ids, example.chosen_ids
    if stage.config.loss_on == "all":  # the mask does not mark answers
        first = _first_answer(stage, example.ids)
        if first is None:
            return None
        rest = example.ids[first:]
        ends = np.flatnonzero(np.isin(rest, stage.template.end_token_ids))
        return example.ids[:first], rest[: ends[0] + 1] if len(ends) else rest
    first = int(np.argmax(example.mask))
    if first == 0 or not example.mask[first]:
        return None
    after = np.flatnonzero(~example.mask[first:])
    return example.ids[:first], example.ids[first : first + int(after[0]) if len(after) else None]


def _first_answer(stage: Stage, ids: np.ndarray) -> int | None:
    """The number of ids before the first answer: up to the template's opening of an answer."""
    decode = stage.template.tokenizer.decode
    asked = [{"role": "user", "content": "?"}]
    before, opened = stage.template.text_of(asked), stage.template.text_of(asked, True)
    opening = opened[len(before) :].strip()
    if not opening or not opened.startswith(before):
        return None
    low, high = 0, len(ids)
    while low < high:  # the fewest ids whose text holds it
        middle = (low + high) // 2
        if opening in decode(ids[:middle].tolist()):
            high = middle
        else:
            low = middle + 1
    text = decode(ids[:low].tolist())
    if opening not in text or not text.rstrip().endswith(opening):
        return None
    while low < len(ids) and not decode(ids[: low + 1].tolist())[len(text) :].strip():
        low += 1  # white space between the opening and the answer
    return low
