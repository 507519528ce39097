"""Models of a local folder: identified by their files, loaded once when one is asked, and asked in batches."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .client import RequestFailed
from .endpoints import EndpointSpec
from .request_log import Reply

if TYPE_CHECKING:
    from ..chat import Chat

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
        from ..model.adapters import resolve_frozen_names
        from ..model.base_folder import fingerprint
        from ..model.loaded import BASE, WHOLE, find_chain

        self.path = None if path is None else Path(path).expanduser()
        self.chain = chain = find_chain(self.path, stage=stage, adapters=adapters, base=base)
        self._chat_template = chat_template
        if chain is None:
            self.source, self.models = str(self.path), {WHOLE: [fingerprint(Path(str(self.path)))]}
            return
        self.source = chain.source
        name, known = chain.base["name_or_path"], chain.base.get("fingerprint")
        if known is None and chain.run is None:  # explicit adapters
            folder = Path(name).expanduser()
            known = fingerprint(folder) if folder.is_dir() else f"{name}@{chain.base.get('revision')}"
        hashes = [str(known), *(str(adapter.sha256) for adapter in chain.adapters)]
        models = [BASE, *resolve_frozen_names([adapter.path for adapter in chain.adapters])]
        self.models = {model: hashes[: n + 1] for n, model in enumerate(models)}

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
        """A hash of a model's weights and template, for the request log. None: the model at the top of the chain."""
        if model is not None and model not in self.models:
            raise UserError(
                f"{self.source} has no model {model!r}; it has {', '.join(self.models)}.", "Name one of these."
            )
        digest = hashlib.sha256()
        hashes = self.models[list(self.models)[-1] if model is None else model]
        digest.update("".join(f"{part}\n" for part in hashes).encode())
        for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            file = self.tokenizer_from / name
            digest.update(file.read_bytes() if file.is_file() else b"")
        if self._chat_template is not None and self._chat_template != "auto":
            file = Path(self._chat_template).expanduser()
            digest.update(file.read_bytes() if file.is_file() else self._chat_template.encode())
        return f"local {digest.hexdigest()}"

    @cached_property
    def chat(self) -> Chat:
        """The models, loaded. Raises UserError: they cannot be loaded."""
        from ..chat import Chat
        from ..model.loaded import live_of, open_live

        if self.chain is None:
            return Chat(open_live(self.path, chat_template=self._chat_template))
        return Chat(live_of(self.chain, chat_template=self._chat_template))


class LocalModel:
    """One model of a folder. Requests that wait are answered in one batch of up to ``concurrency``.

    Args:
        weights: shared by the endpoints of one folder: one base, its adapters switched between batches.

    Attributes:
        identity: a hash of the weights and the template, so that a stage that was trained again is asked again.
    """

    def __init__(self, spec: EndpointSpec, weights: Weights) -> None:
        self.spec, self.weights = spec, weights
        self.identity = weights.identity(spec.model)
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[Reply | Exception]]] = []
        self._batch = asyncio.Lock()
        self._stop = threading.Event()

    async def ask(self, body: dict[str, Any]) -> Reply:
        """The answer to ``Request.body``.

        Raises:
            RequestFailed: the template refuses the conversation, or it does not fit into the context or the memory.
        """
        answered: asyncio.Future[Reply | Exception] = asyncio.get_running_loop().create_future()
        self._waiting.append((body, answered))
        async with self._batch:
            if not answered.done():  # by the batch of an earlier request
                await asyncio.sleep(GATHER)
                batch, self._waiting = self._waiting[: self.spec.concurrency], self._waiting[self.spec.concurrency :]
                outcomes = await asyncio.to_thread(self._answer, [waiting for waiting, _ in batch])
                for (_, future), each in zip(batch, outcomes):
                    future.set_result(each)
        outcome = answered.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        """End a batch in progress with its next token."""
        self._stop.set()

    def _answer(self, bodies: list[dict[str, Any]]) -> list[Reply | Exception]:
        """A reply to each request, or why there is none; in a thread."""
        with _DEVICE:
            try:
                return self._sample(self.weights.chat, bodies)
            except UserError as error:
                return [RequestFailed("cannot be loaded", error.message, hint=error.hint or "") for _ in bodies]
            except Exception as error:
                return [error] * len(bodies)

    def _sample(self, chat: Chat, bodies: list[dict[str, Any]]) -> list[Reply | Exception]:
        """Answer one batch, or its two halves if the memory is too small or a conversation cannot be asked."""
        import torch

        from ..chat.generate import Sampling

        adapters = None if self.spec.model is None else chat.live.models[self.spec.model]
        rows = [Sampling(b["max_tokens"], b["temperature"], b.get("top_p"), b.get("seed", 0)) for b in bodies]
        try:
            ids = [chat.prompt_ids(body["messages"]) for body in bodies]
            sampled = chat.sample(ids, rows, adapters=adapters, stop=self._stop.is_set)
        except UserError as error:
            failed = RequestFailed("cannot be asked", error.message)
        except torch.OutOfMemoryError:  # which holds the batch's tensors: the halves are tried outside
            failed = RequestFailed("out of memory", f"prompt and {rows[0].max_new_tokens:,} tokens do not fit into it")
        else:
            if self._stop.is_set():  # an answer that was cut off is none
                return [RequestFailed("stopped", "the job was stopped") for _ in bodies]
            return [Reply(s.text, s.finish_reason, s.prompt_tokens, s.completion_tokens) for s in sampled]
        if len(bodies) == 1:
            return [failed]
        half = len(bodies) // 2
        return [*self._sample(chat, bodies[:half]), *self._sample(chat, bodies[half:])]


def open_local_models(specs: Sequence[EndpointSpec], known: Weights | None = None) -> list[LocalModel]:
    """The models of local endpoints; those of one folder, or of a run and its last stage, share their weights.

    Args:
        known: weights that are open already.
    """
    opened = {} if known is None else {known.source: known}
    models: list[LocalModel] = []
    for spec in specs:
        try:
            weights = opened.get(str(spec.path)) or Weights(spec.path)
            models.append(LocalModel(spec, opened.setdefault(weights.source, weights)))
        except UserError as error:
            raise UserError(f"endpoint {spec.name}: {error.message}", error.hint) from None
    return models
