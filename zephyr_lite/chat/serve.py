"""The OpenAI chat API over a run's models: prompts have the ids of training, and answers are those of ``zephyr-lite chat``."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..data.messages import RowError, as_text
from ..errors import UserError
from ..io.text import expected
from .generate import Chat, Drawn, Message, Streamer, TooLong
from .session import Settings, trained_system

logger = logging.getLogger(__name__)


class Part(BaseModel):
    """An object in a request. Unknown keys are rejected; keys that are null or have the default of OpenAI's API are ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    needless: ClassVar[dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_needless(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {key: value for key, value in given.items() if value is not None and cls.needless.get(key) != value}


def joined(content: Any) -> Any:
    """The text of a content that is a list of texts."""
    try:
        return as_text(content, "content") if isinstance(content, list) else content
    except RowError:
        raise ValueError("only text parts are supported") from None


class Turn(Part):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined)]


NotEmpty = Annotated[str, Field(min_length=1)]


class StreamOptions(Part):
    include_usage: bool = False


class ChatRequest(Part, Settings):
    """The body of ``POST /v1/chat/completions``. Defaults are those of ``zephyr-lite chat``, except for a random seed."""

    needless: ClassVar[dict[str, Any]] = {
        **{"n": 1, "logprobs": False, "store": False, "tools": [], "response_format": {"type": "text"}},
        **{"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}},
    }
    model: str
    messages: list[Turn] = Field(min_length=1)
    max_new_tokens: int = Field(512, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    seed: int = Field(default_factory=lambda: random.getrandbits(31), ge=0, le=2**63 - 1)
    system: None = None  # it is one of the messages
    stop: Annotated[list[NotEmpty], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] = []
    chat_template_kwargs: dict[str, Any] = {}  # vLLM's and llama-server's
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # which of the client's users asks; read by OpenAI alone
    metadata: dict[str, Any] = {}  # stored by OpenAI alone

    @field_validator("messages")
    @classmethod
    def _as_in_training(cls, turns: list[Turn]) -> list[Turn]:
        turns = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
        roles = [turn.role for turn in turns]
        if roles[-1:] != ["user"] or "system" in roles[1:]:
            raise ValueError("expected a system turn at most at the beginning, and a user's turn at the end")
        if not all(turn.content.strip() for turn in turns):
            raise ValueError("a turn is empty")
        return turns


class Answers:
    """Answers requests, one at a time; the keys and values of the last conversation are kept for its next turn.

    Attributes:
        system: the system turn of conversations without one, as in training.
    """

    def __init__(self, chat: Chat) -> None:
        self.chat, self.system = chat, trained_system(chat)
        self._model, self._streamer = "", Streamer(chat, [[]])

    def answer(self, asked: ChatRequest, on_text: Callable[[str], None], is_over: Callable[[], bool]) -> Drawn:
        """The answer, up to a stop sequence.

        Args:
            on_text: called with pieces of the text, which together are the answer's.
            is_over: called before every token; True ends the answer.

        Raises:
            HTTPException: the conversation cannot be answered.
        """
        started, text, told, cut = time.monotonic(), "", 0, False
        held_back = max(map(len, asked.stop), default=1) - 1  # characters that may be the beginning of a stop sequence

        def on_piece(row: int, piece: str) -> None:
            nonlocal text, told, cut
            if not cut:
                text += piece
            if places := [text.find(sequence) for sequence in asked.stop if sequence in text]:
                text, cut = text[: min(places)], True
            if (upto := len(text) - (0 if cut else held_back)) > told:
                on_text(text[told:upto])
                told = upto

        try:
            turns: list[Message] = [turn.model_dump() for turn in asked.messages]
            if self.system is not None and turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": self.system})
            ids = self.chat.prompt_ids(turns, asked.chat_template_kwargs)
            if asked.model != self._model:
                self._model, self._streamer = asked.model, Streamer(self.chat, [self.chat.live.models[asked.model]])
            turn = sum(turn.role == "user" for turn in asked.messages) - 1
            (drawn,) = self._streamer.draw([ids], [asked.sampling(turn)], on_piece, lambda: cut or is_over())
        except UserError as error:
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise refusal(400, error.message, "messages", code) from None
        except torch.OutOfMemoryError:
            raise refusal(400, "the GPU's memory is too small for this conversation.", "messages") from None
        if told < len(text):
            on_text(text[told:])
        drawn = replace(drawn, text=text, finish="stop" if cut else drawn.finish)
        asked_tokens, tokens, seconds = drawn.prompt_tokens, drawn.completion_tokens, time.monotonic() - started
        logger.info(
            f"{asked.model}: {asked_tokens:,} tokens asked, {tokens:,} answered, {tokens / seconds:.1f} tokens/s, "
            f"{drawn.finish}"
        )
        return drawn


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> HTTPException:
    """A refusal in OpenAI's form."""
    logger.info(f"refused: {message}")
    return HTTPException(status, {"message": message, "type": "invalid_request_error", "param": param, "code": code})


def make_app(chat: Chat, is_ending: Callable[[], bool], host: str) -> FastAPI:
    """The application.

    Args:
        is_ending: whether the server was asked to end, which ends an answer in progress.
        host: the address that it listens on. A web page that gives this machine a name of its own is refused.
    """
    app = FastAPI(openapi_url=None)
    hosts = ["127.0.0.1", "localhost", f"[{host}]" if ":" in host else host]
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["*"] if host in ("0.0.0.0", "::") else hosts)
    answers, worker = Answers(chat), ThreadPoolExecutor(1)

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        if isinstance(error.detail, str):  # of an unknown path or method
            error = refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}.")
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def refuse_invalid(request: Request, error: RequestValidationError) -> Response:
        fault = error.errors()[0]
        # of a document that is no JSON the place is a byte's
        param = None if fault["type"] == "json_invalid" else ".".join(map(str, fault["loc"][1:])) or None
        why = "not supported by this server" if fault["type"] == "extra_forbidden" else expected(fault)
        return await refuse(request, refusal(400, f"{param or 'the request'}: {why}.", param))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = reversed(chat.live.models)  # clients take the first by default
        listed = [{"id": name, "object": "model", "owned_by": "zephyr-lite"} for name in names]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, request: Request) -> Response:
        if asked.model not in chat.live.models:
            known = ", ".join(chat.live.models)
            raise refusal(404, f"there is no model {asked.model!r}; there are {known}.", "model", "model_not_found")
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()  # None: the answer has ended

        def is_over() -> bool:
            return is_ending() or asyncio.run_coroutine_threadsafe(request.is_disconnected(), loop).result()

        def put(piece: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> Drawn:
            try:
                return answers.answer(asked, put, is_over)
            finally:
                put(None)

        async def finished() -> Drawn:
            drawn = await answer
            if drawn.finish == "interrupted":  # or the client has gone, and reads nothing
                raise HTTPException(503, {"message": "the server is ending.", "type": "server_error"})
            return drawn

        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        answer = loop.run_in_executor(worker, work)
        if not asked.stream:
            drawn = await finished()
            message = {"role": "assistant", "content": drawn.text}
            choice = {"index": 0, "message": message, "finish_reason": drawn.finish_reason}
            return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage(drawn)})
        first = await pieces.get()
        if first is None:
            await finished()  # raises what refuses the request

        async def events() -> AsyncIterator[str]:
            def event(delta: dict[str, str], finish_reason: str | None = None, **others: Any) -> str:
                choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
                return sse({**head, "object": "chat.completion.chunk", "choices": choices, **others})

            yield event({"role": "assistant", "content": ""})
            piece = first
            while piece is not None:
                yield event({"content": piece})
                piece = await pieces.get()
            try:
                drawn = await finished()
            except HTTPException as error:
                yield sse({"error": error.detail})
                return
            yield event({}, drawn.finish_reason)
            if asked.stream_options.include_usage:
                yield event({}, choices=[], usage=usage(drawn))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


def usage(drawn: Drawn) -> dict[str, int]:
    prompt, completion = drawn.prompt_tokens, drawn.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def sse(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0: a free one. Raises UserError: the address cannot be used."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}.", "Choose another --port.") from None


def make_server(chat: Chat, host: str = "127.0.0.1") -> uvicorn.Server:
    """The server; ``run(sockets=[listen(...)])`` returns when it was asked to end."""
    config = uvicorn.Config(
        make_app(chat, lambda: server.should_exit, host),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
    )
    server = uvicorn.Server(config)
    return server
