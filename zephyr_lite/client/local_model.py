"""Models of a local folder: identified by their files, loaded once when one is asked, and asked in batches."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .endpoints import Answer, EndpointSpec, Question, TryFailed

if TYPE_CHECKING:
    from ..chat import Chat
    from ..model.chain import Chain

GATHER = 0.02  # seconds in which requests are collected into a batch
_DEVICE = threading.Lock()  # all models share one device: one of them generates at a time


class Weights:
    """The models of a run's folder, a stage's, a model's, or of explicit adapters on a base.

    Torch is imported when a method needs it: jobs that ask servers alone do without.

    Attributes:
        path: the folder; None: the newest run under ``runs/``, or explicit adapters.
        chain: the adapters; None for a model's folder.
        source: as ``LoadedModel.source``.
        models: model → the hashes that identify it, its base's first. The names are those of ``LoadedModel.models``.

    Raises:
        UserError: the folder is none of these, or a stage of it is incomplete or was changed.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        stage: str | None = None,
        adapters: Sequence[str] = (),
        base: str | None = None,
        chat_template: str | None = "auto",
    ) -> None:
        from ..model.base import fingerprint
        from ..model.loaded import WHOLE, find_chain, source_of_chain

        self.path = None if path is None else Path(path).expanduser()
        self.chain = find_chain(self.path, stage=stage, adapters=adapters, base=base)
        self._chat_template = chat_template
        self._chat: Chat | None = None
        if self.chain is None:
            self.source, self.models = str(self.path), {WHOLE: [fingerprint(Path(str(self.path)))]}
        else:
            self.source, self.models = source_of_chain(self.chain), _identities(self.chain)

    def is_same(self, other: Weights) -> bool:
        """Whether both have the same models under the same names, with the same template."""
        return list(self.models.items()) == list(other.models.items()) and self.identity() == other.identity()

    @cached_property
    def tokenizer_from(self) -> Path:
        """The folder of the tokenizer and the chat template."""
        from ..model.files import fetch_base

        if self.chain is None:
            assert self.path is not None
            return self.path
        if self.chain.tokenizer_from is not None:
            return self.chain.tokenizer_from
        return fetch_base(self.chain.base["name_or_path"], self.chain.base.get("revision", "main"), weights=False)

    def identity(self, model: str | None = None) -> str:
        """A hash of a model's weights and template, for the request log. None: the model at the top of the chain.

        Raises:
            UserError: there is no such model.
        """
        if model is not None and model not in self.models:
            raise UserError(
                f"{self.source} has no model {model!r}; it has {', '.join(self.models)}.", "Name one of these."
            )
        digest = hashlib.sha256()
        hashes = self.models[list(self.models)[-1] if model is None else model]
        # a model folder's hash has no line end, as in the logs of earlier versions
        digest.update(hashes[0].encode() if self.chain is None else "".join(f"{part}\n" for part in hashes).encode())
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            file = self.tokenizer_from / name
            digest.update(file.read_bytes() if file.is_file() else b"")
        if self._chat_template is not None and self._chat_template != "auto":
            file = Path(self._chat_template).expanduser()
            digest.update(file.read_bytes() if file.is_file() else self._chat_template.encode())
        return f"local {digest.hexdigest()}"

    def chat(self) -> Chat:
        """Load the models, once.

        Raises:
            UserError: they cannot be loaded.
        """
        if self._chat is None:
            from ..chat import Chat
            from ..model.loaded import live_of, open_live

            if self.chain is None:
                self._chat = Chat(open_live(self.path, chat_template=self._chat_template))
            else:
                self._chat = Chat(live_of(self.chain, chat_template=self._chat_template))
        return self._chat

    def forget(self) -> None:
        """Free the loaded models."""
        self._chat = None


def _identities(chain: Chain) -> dict[str, list[str]]:
    """``Weights.models`` of a chain."""
    from ..model.base import fingerprint
    from ..model.loaded import BASE, model_names

    name = chain.base["name_or_path"]
    known = chain.base.get("fingerprint")
    if known is None and Path(name).expanduser().is_dir():  # explicit adapters
        known = fingerprint(Path(name).expanduser())
    parts = [str(known if known is not None or chain.run is not None else f"{name}@{chain.base.get('revision')}")]
    models = {BASE: list(parts)}
    for model, adapter in zip(model_names(chain), chain.adapters):
        parts.append(str(adapter.sha256))
        models[model] = list(parts)
    return models


class LocalModel:
    """One model of a folder. Requests that wait are answered in one batch of up to ``concurrency``.

    Args:
        weights: shared by the endpoints of one folder: one base, its adapters switched between batches.
    """

    def __init__(self, spec: EndpointSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights
        self._identity = weights.identity(spec.model)
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._worker: asyncio.Task[None] | None = None
        self._stop = threading.Event()

    def identity(self) -> str:
        """A hash of the weights and the template, so that a stage that was trained again is asked again."""
        return self._identity

    async def ask(self, question: Question) -> Answer:
        """Raises TryFailed: the template refuses the conversation, or it does not fit into the context or the memory."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._serve())
        return await future

    async def close(self) -> None:
        """End a batch in progress with its next token, and free the weights."""
        self._stop.set()
        for _, future in self._waiting:
            future.cancel()
        if self._worker is not None:
            await asyncio.wait([self._worker])
        self.weights.forget()

    async def _serve(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER)
            batch, self._waiting = self._waiting[: self.spec.concurrency], self._waiting[self.spec.concurrency :]
            batch = [(question, future) for question, future in batch if not future.done()]
            if not batch:
                continue
            outcomes: list[Answer | Exception]
            try:
                outcomes = await asyncio.to_thread(self._answer, [question for question, _ in batch])
            except Exception as error:
                outcomes = [error] * len(batch)
            for (_, future), outcome in zip(batch, outcomes):
                if future.done():
                    continue
                if isinstance(outcome, Answer):
                    future.set_result(outcome)
                else:
                    future.set_exception(outcome)

    def _answer(self, questions: list[Question]) -> list[Answer | Exception]:
        """In a thread."""
        with _DEVICE:
            if self._stop.is_set():
                raise TryFailed("stopped", "the job was stopped", retry=False)
            try:
                chat = self.weights.chat()
            except UserError as error:
                raise TryFailed("cannot be loaded", error.message, retry=False, reached=False, fatal=error) from None
            outcomes: list[Any] = [_prepare(chat, question) for question in questions]
            places = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Exception)]
            for place, answer in zip(places, self._sample(chat, [outcomes[i] for i in places])):
                outcomes[place] = answer
            return outcomes

    def _sample(self, chat: Chat, rows: list[Any]) -> list[Answer | Exception]:
        """Answer one batch, or its two halves if it does not fit into the memory."""
        import torch

        if not rows:
            return []
        adapters = None if self.spec.model is None else chat.live.models[self.spec.model]
        ids, settings = [row[0] for row in rows], [row[1] for row in rows]
        try:
            sampled = chat.sample(ids, settings, adapters=adapters, stop=self._stop.is_set)
        except torch.OutOfMemoryError:
            sampled = None  # the halves are tried outside: the exception holds the batch's tensors
        if sampled is None:
            if len(rows) == 1:
                detail = (
                    f"{len(ids[0]):,} tokens and {settings[0].max_new_tokens:,} new ones do not fit into the memory"
                )
                return [TryFailed("out of memory", detail, retry=False)]
            half = len(rows) // 2
            return [*self._sample(chat, rows[:half]), *self._sample(chat, rows[half:])]
        if self._stop.is_set():  # an answer that was cut off is none
            return [TryFailed("stopped", "the job was stopped", retry=False)] * len(rows)
        return [Answer(s.text, s.finish_reason, s.prompt_tokens, s.completion_tokens) for s in sampled]


def _prepare(chat: Chat, question: Question) -> Any:
    """(prompt's ids, sampling settings); or the TryFailed of a conversation that cannot be asked."""
    from ..data.formats import RowError
    from ..model.sampling import Sampling

    try:
        ids = chat.template.prompt_ids(list(question.messages))
    except RowError as error:
        return TryFailed("refused by the chat template", str(error), retry=False)
    context = getattr(chat.stack.base.config, "max_position_embeddings", None)
    room = question.max_tokens if context is None else min(question.max_tokens, context - len(ids))
    if room < 1:
        detail = f"{len(ids):,} tokens; the model has {context:,}"
        return TryFailed("longer than the context", detail, retry=False)
    return ids, Sampling(room, question.temperature, question.top_p, question.seed or 0)


def open_local_models(specs: Sequence[EndpointSpec], known: Mapping[str, Weights]) -> list[LocalModel]:
    """The models of local endpoints; those of one folder, or of a run and its last stage, share their weights.

    Args:
        known: ``path`` of an endpoint → weights that are open already.
    """
    opened: dict[str, Weights] = dict(known)
    models: list[LocalModel] = []
    for spec in specs:
        assert spec.path is not None
        try:
            if spec.path not in opened:
                weights = Weights(spec.path)
                opened[spec.path] = next((w for w in opened.values() if w.is_same(weights)), weights)
            models.append(LocalModel(spec, opened[spec.path]))
        except UserError as error:
            raise UserError(f"endpoint {spec.name}: {error.message}", error.hint) from None
    return models
