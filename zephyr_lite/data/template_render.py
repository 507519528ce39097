"""Renders a stranger's chat template, always in a child process under limits.

What passed its trial may still know a real row when it sees one, and loop or fill the memory only then. So none but the
kit's own templates is rendered in this process: a child, the script of the trial, stays and answers a line with a line.
A row costs some tens of microseconds more that way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError, TemplateSyntaxError

from ..errors import UserError
from .template_child import make_environment
from .template_trial import MEMORY, SECONDS, refusal, start_child, stopped, texts_of


@functools.cache
def own_template(text: str) -> Template:
    """One of the kit's own templates, compiled in this process."""
    return make_environment().from_string(text)


class Renderer:
    """One template with the tokenizer's special tokens; the child is started by the first conversation, in each process.

    Args:
        text: the template.
        where: what it is and where it comes from, for messages.
        tokens: the tokenizer's special tokens, which it is rendered with.
    """

    def __init__(self, text: str, where: str, tokens: Mapping[str, object]) -> None:
        self.text = text
        self.where = where
        self.tokens = texts_of(tokens)
        self._start_over()

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "where": self.where, "tokens": self.tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_over()

    def _start_over(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None
        self._process = os.getpid()

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, most: int) -> str:
        """The text of a conversation, as transformers' ``apply_chat_template`` gives it.

        Args:
            most: characters that the text may have.

        Raises:
            TemplateError: the template refuses the conversation, or fails.
            ValueError: the text is longer than ``most``.
            UserError: it computes for more than ``SECONDS``, asks for more than ``MEMORY``, or reaches for attributes that
                the sandbox forbids.
        """
        if self._process != os.getpid():  # the child of another process answers that one
            self._start_over()
        asked = {"messages": messages, "prompt": add_generation_prompt, "most": most}
        with self._lock:
            try:
                answer = self._ask(json.dumps(asked).encode() + b"\n")
            except BaseException:  # an answer that nobody read would be taken for the next one's
                self._stop()
                raise
        if "text" in answer:
            return str(answer["text"])
        kind, what = answer["kind"], answer["what"]
        if kind == "syntax":
            raise TemplateSyntaxError(what, answer["line"])
        if kind == "own":
            raise TemplateError(what)
        if kind == "length":
            raise ValueError(what)
        raise refusal(self.where, kind, what, "a conversation")

    def _ask(self, line: bytes) -> dict[str, Any]:
        if self._child is None:
            job = {"seconds": SECONDS, "bytes": MEMORY, "template": self.text, "tokens": self.tokens, "serve": True}
            self._child = start_child(self.where, job)
            self._end = weakref.finalize(self, _close, self._child, os.getpid())
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
            answer = self._child.stdout.readline()
        except OSError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise self._fallen()
        return dict(json.loads(answer))

    def _fallen(self) -> UserError:
        assert self._child is not None and self._child.stderr is not None
        errors = self._child.stderr.read()
        return stopped(self.where, self._child.wait(), errors, "a conversation")

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._child = self._end = None


def _close(child: subprocess.Popen[bytes], process: int) -> None:
    """End a child: it ends by itself where its input does."""
    if process != os.getpid():
        return
    for pipe in (child.stdin, child.stdout, child.stderr):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    child.kill()
    child.wait()
