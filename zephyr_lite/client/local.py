"""A model in a local folder as an endpoint: requests that wait are answered together, in one batch."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .types import Answer, EndpointSpec, Fault, Question
from .weights import Weights

if TYPE_CHECKING:
    from ..chat import Chat

GATHER = 0.02  # seconds in which those who ask at the same time come together
# Models share one device: only one of them generates at a time.
_DEVICE = threading.Lock()


class LocalEndpoint:
    """A run's folder, a stage's, or a model's, through transformers. It is loaded when it is first asked.

    A batch is at most the endpoint's ``concurrency``. A try has no time limit: nothing here can hang but the machine.

    Args:
        weights: what the endpoint's ``path`` holds; endpoints of one folder share it, so that its base is loaded once
            and adapters are switched between their batches.

    Raises:
        UserError: the folder has no such model.
    """

    def __init__(self, spec: EndpointSpec, weights: Weights) -> None:
        self.spec, self._weights = spec, weights
        try:
            self._identity = weights.identity(spec.model)
        except UserError as error:
            raise _named(spec, error) from None
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._stop = threading.Event()

    def identity(self) -> str:
        """Of the weights and the template: a stage that was trained anew is asked anew."""
        return self._identity

    async def ask(self, question: Question) -> Answer:
        """Raises Fault: the chat template refuses the conversation, or it is longer than the model's context."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return await future

    async def close(self) -> None:
        """A batch under way ends with its next token."""
        self._stop.set()
        for _, future in self._waiting:
            future.cancel()
        if self._worker is not None:
            await asyncio.wait([self._worker])
        self._weights.forget()

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER)
            batch, self._waiting = self._waiting[: self.spec.concurrency], self._waiting[self.spec.concurrency :]
            batch = [(question, future) for question, future in batch if not future.done()]
            if not batch:
                continue
            try:
                outcomes = await asyncio.to_thread(self._answer, [question for question, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            except BaseException:
                self._stop.set()  # the thread is not to go on alone
                raise
            for (_, future), outcome in zip(batch, outcomes):
                if future.done():
                    continue
                if isinstance(outcome, Answer):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)

    # In a thread of its own

    def _answer(self, questions: list[Question]) -> list[Answer | Exception]:
        with _DEVICE:
            if self._stop.is_set():
                raise _stopped()
            try:
                chat = self._weights.chat()
            except UserError as error:
                raise Fault("cannot be loaded", error.message, again=False, sent=False, hopeless=error) from None
            outcomes: list[Any] = [self._prepared(chat, question) for question in questions]
            places = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
            for place, answer in zip(places, self._sampled(chat, [outcomes[i] for i in places])):
                outcomes[place] = answer
            return outcomes

    def _prepared(self, chat: Chat, question: Question) -> Any:
        """(prompt's ids, how to draw), or the Fault of a conversation that cannot be asked."""
        from ..data.formats import RowError
        from ..model.sampling import Sampling

        try:
            ids = chat.template.prompt_ids(list(question.messages))
        except RowError as error:
            return Fault("refused by the chat template", str(error), again=False)
        context = getattr(chat.stack.base.config, "max_position_embeddings", None)
        room = question.max_tokens if context is None else min(question.max_tokens, context - len(ids))
        if room < 1:
            return Fault("longer than the context", f"{len(ids):,} tokens; the model has {context:,}", again=False)
        seed = 0 if question.seed is None else question.seed
        return ids, Sampling(room, question.temperature, question.top_p, seed)

    def _sampled(self, chat: Chat, rows: list[Any]) -> list[Answer | Exception]:
        """One batch, or two halves of it where the memory does not suffice."""
        import torch

        if not rows:
            return []
        on = None if self.spec.model is None else chat.live.models[self.spec.model]
        try:
            drawn = chat.sample([ids for ids, _ in rows], [how for _, how in rows], adapters=on, stop=self._stop.is_set)
        except torch.OutOfMemoryError:
            drawn = None  # the exception holds the batch's tensors: the halves are tried after it is gone
        if drawn is None:
            if len(rows) == 1:
                ids, how = rows[0]
                told = f"{len(ids):,} tokens and {how.max_new_tokens:,} to come do not fit into the GPU's memory"
                return [Fault("out of memory", told, again=False)]
            half = len(rows) // 2
            return [*self._sampled(chat, rows[:half]), *self._sampled(chat, rows[half:])]
        if self._stop.is_set():
            return [_stopped()] * len(rows)  # cut off in the middle: no answer
        return [Answer(s.text, s.finish_reason, s.prompt_tokens, s.completion_tokens) for s in drawn]


def weights_of(spec: EndpointSpec) -> Weights:
    """What the folder of an endpoint holds.

    Raises:
        UserError: there is no such folder, or it is no run's, stage's or model's.
    """
    path = Path(spec.path or "").expanduser()
    if not path.is_dir():
        raise UserError(f"endpoint {spec.name}: {path}: no such folder.", "Give a run's or a model's folder.")
    return Weights(path)


def _named(spec: EndpointSpec, error: UserError) -> UserError:
    return UserError(f"endpoint {spec.name}: {error.message}", error.hint)


def _stopped() -> Fault:
    return Fault("stopped", "the job was stopped", again=False)
