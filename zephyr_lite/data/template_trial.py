"""A chat template is a program of a stranger's. Before any row is read, a child process renders it on trial, under limits.

Jinja's sandbox keeps a template from Python's objects; it does not keep one from looping for a year or from asking for all
the memory. What passes the trial renders real rows in a child too (``template_render``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jinja2
import markupsafe
from jinja2.exceptions import TemplateError

from ..errors import UserError
from ..strict_json import shown
from .templates import BOS, TEMPLATES

SECONDS = 2.0
MEMORY = 512 * 2**20
# Of the clock on the wall: a machine that is busy with other things starts and runs the child late.
PATIENCE = 30.0
LONGEST_TEMPLATE = 2**20
# What a template may add to a conversation of its own: characters, and how often it may repeat the content.
ADDED, REPEATED = 100_000, 20

_CHILD = Path(__file__).with_name("template_child.py")
_LIBRARIES = sorted({str(Path(str(library.__file__)).parent.parent) for library in (jinja2, markupsafe)})
# No secret of the environment reaches the child.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_OWN = {text for own in TEMPLATES.values() for text in (own, own.removeprefix(BOS))}
_CURE = "Choose chat_template=zephyr, chatml or llama3, or a template that you trust."
_passed: set[str] = set()


def _turns(count: int, *, system: bool = False, content: str = "word") -> list[dict[str, str]]:
    first = [{"role": "system", "content": content}] if system else []
    return first + [{"role": ("user", "assistant")[turn % 2], "content": f"{content} {turn}"} for turn in range(count)]


_CONVERSATIONS = [
    [], _turns(1), _turns(2), _turns(4), _turns(3, system=True), _turns(4, system=True), _turns(60),
    _turns(2, content="A longer line,\n\twith 'quotes', <tags>, {{ braces }} and é. " * 200),
]  # fmt: skip


def try_template(text: object, where: str, tokens: Mapping[str, object]) -> None:
    """Render a template in a child process first, unless it is the kit's own or passed before.

    Args:
        text: the template.
        where: what it is and where it comes from, for the message.
        tokens: the tokenizer's special tokens, which it is rendered with.

    Raises:
        UserError: it is no text or too long; it was stopped after ``SECONDS`` of computing; it asks for more than
            ``MEMORY``; it reaches for attributes that the sandbox forbids; its output is huge; or the child could not be
            started.
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: is a {type(text).__name__} and no text.", _CURE)
    if len(text) > LONGEST_TEMPLATE:
        raise UserError(
            f"{where}: is {len(text):,} characters long; {LONGEST_TEMPLATE:,} are the most that is read.", _CURE
        )
    if text in _OWN:
        return
    texts = texts_of(tokens)
    key = hashlib.sha256(json.dumps([text, texts], sort_keys=True).encode()).hexdigest()
    if key not in _passed:
        _run(text, where, texts)
        _passed.add(key)


def reason(error: Exception) -> str:
    """Why a template failed: its own words where it has any, else the type of Python's error too."""
    if isinstance(error, TemplateError):
        return shown(error.message, 300)
    return f"{type(error).__name__}: {shown(error, 300)}"


def _run(text: str, where: str, tokens: dict[str, str]) -> None:
    job = {
        "path": _LIBRARIES, "seconds": SECONDS, "bytes": MEMORY, "characters": ADDED, "factor": REPEATED,
        "template": text, "tokens": tokens, "conversations": _CONVERSATIONS,
    }  # fmt: skip
    try:
        done = subprocess.run(
            _command(),
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=PATIENCE,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{where}: was stopped after {PATIENCE:g} s on a plain conversation.", _CURE) from None
    except OSError as error:
        raise _not_started(where, error) from None
    if done.returncode != 0:
        raise stopped(where, done.returncode, done.stderr, "a plain conversation")
    found = json.loads(done.stdout)
    if found:
        raise refusal(where, found["kind"], found["what"], "a plain conversation")


def texts_of(tokens: Mapping[str, object]) -> dict[str, str]:
    """The special tokens that are text, by name."""
    return {name: str(token) for name, token in tokens.items() if isinstance(token, str)}


def is_own(text: str) -> bool:
    """Whether a template is the kit's own, which needs no child."""
    return text in _OWN


def start_child(where: str, job: dict[str, object]) -> subprocess.Popen[bytes]:
    """A child that has been told its job and waits for conversations, one a line.

    Raises:
        UserError: it cannot be started.
    """
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(_command(), stdin=pipe, stdout=pipe, stderr=pipe, env=_environment())
    except OSError as error:
        raise _not_started(where, error) from None
    assert child.stdin is not None
    with contextlib.suppress(OSError):  # where it ended at once, what it does not answer says so
        child.stdin.write(json.dumps({**job, "path": _LIBRARIES}).encode() + b"\n")
    return child


def _command() -> list[str]:
    return [sys.executable, "-I", "-S", str(_CHILD)]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _KEPT if name in os.environ}


def _not_started(where: str, error: OSError) -> UserError:
    return UserError(
        f"{where}: the process that tries it out cannot be started ({sys.executable or 'no Python'}: {error.strerror}).",
        "Choose chat_template=zephyr, chatml or llama3, which need no trial.",
    )


def stopped(where: str, status: int, errors: bytes, on: str) -> UserError:
    """What to say of a child that ended without an answer, by its exit status and what it wrote to standard error."""
    if status == -getattr(signal, "SIGPROF", 0):
        return UserError(f"{where}: was stopped after {SECONDS:g} s on {on}.", _CURE)
    last = errors.decode("utf-8", "replace").strip().splitlines()[-1:]
    what = f"signal {-status}" if status < 0 else shown(" ".join(last), 200)
    return UserError(f"{where}: the process that tries it out came to nothing ({what}).", _CURE)


def refusal(where: str, kind: str, what: str, on: str) -> UserError:
    """What to say of a template that a child refused; ``on`` is what it rendered."""
    return UserError(f"{where}: {_words(kind, what, on)}.", _CURE)


def _words(kind: str, what: str, on: str) -> str:
    return {
        "memory": f"asks for more than {MEMORY // 2**20} MiB for {on}",
        "nested": "is nested too deeply, or calls itself without end",
        "compile": f"cannot be compiled ({shown(what, 200)})",
        "length": f"writes more than {ADDED:,} characters around a conversation of {what}",
        "security": f"{shown(what, 200)}, which no template has any business with",
    }[kind]
