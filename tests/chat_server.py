"""A real HTTP server that speaks the OpenAI chat API, for tests: what it answers, and how it fails, is a script.

    with ChatServer(lambda seen: ok("hello")) as server:
        ...  # server.url, server.seen

It listens on a free port, in a thread.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any


@dataclass
class Seen:
    """A request that came in: its number (from 0), its body, its headers (names in lower case), when it came."""

    number: int
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    at: float

    @property
    def question(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class Act:
    """What the server does: sleeps, then sends so much of an answer, then perhaps cuts the connection."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    sleep: float = 0.0
    cut: int | None = None  # bytes of the body after which the connection ends


Script = Callable[[Seen], Act]
USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}


def ok(text: str, *, usage: dict[str, Any] | None = USAGE, finish_reason: str = "stop", sleep: float = 0.0) -> Act:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    body: dict[str, Any] = {"object": "chat.completion", "choices": [choice]}
    return answer_json(body | ({"usage": usage} if usage is not None else {}), sleep=sleep)


def answer_json(body: Any, status: int = 200, sleep: float = 0.0, **headers: str) -> Act:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Act(status, json.dumps(body).encode(), named, sleep)


def error(status: int, message: str = "no", **headers: str) -> Act:
    """A refusal; ``retry_after="2"`` is the header Retry-After."""
    return answer_json({"error": {"message": message, "type": "error"}}, status, **headers)


def hang(seconds: float = 60.0) -> Act:
    return Act(sleep=seconds)


def disconnect(after: int = 0) -> Act:
    """The connection ends after so many bytes of the body (0: before the status line)."""
    return Act(body=ok("this will not arrive").body, cut=after)


def not_json() -> Act:
    return Act(body=b'{"choices": [{"message": {"content": "torn')


def by_hash(seen: Seen) -> Act:
    """A deterministic model: its answer depends on all of the request's body."""
    digest = hashlib.sha256(json.dumps(seen.body, sort_keys=True).encode()).hexdigest()
    return ok(f"answer {digest[:8]}")


class ChatServer:
    """See above.

    Attributes:
        seen: every request, in the order of its arrival.
        most_at_once: requests under way at the same time, at most.
    """

    def __init__(self, script: Script = by_hash, port: int = 0) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._connections: list[socket.socket] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer._connections.append(self.connection)

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer._serve(self)

            do_GET = do_POST

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # of 5, a burst of connections would wait for a second

            def server_bind(self) -> None:  # HTTPServer's asks for the name of 127.0.0.1, which may wait for a DNS
                TCPServer.server_bind(self)
                self.server_name, self.server_port = self.server_address[:2]

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no fault
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No answer any more; connections end."""
        if not self._over.is_set():
            self._over.set()
            self._server.shutdown()
            self._server.server_close()
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("content-length") or 0)
        content = handler.rfile.read(length)
        if len(content) < length:  # the client was killed while it wrote: no server sees that as a request
            handler.close_connection = True
            return
        with self._lock:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            seen = Seen(len(self.seen), json.loads(content or b"{}"), headers, handler.path, time.monotonic())
            self.seen.append(seen)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self._act(handler, self.script(seen))
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client has gone
        finally:
            with self._lock:
                self._at_once -= 1

    def _act(self, handler: BaseHTTPRequestHandler, act: Act) -> None:
        if act.sleep and self._over.wait(act.sleep):
            handler.close_connection = True
            return
        if act.cut == 0:
            handler.close_connection = True
            return
        handler.send_response(act.status)
        for name, value in {"Content-Type": "application/json", **act.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(act.body)))
        handler.end_headers()
        handler.wfile.write(act.body if act.cut is None else act.body[: act.cut])
        handler.wfile.flush()
        if act.cut is not None:
            handler.close_connection = True
