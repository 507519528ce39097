"""A chat template is a program of a stranger's. Before this process renders one, a child process does, under limits.

Jinja's sandbox keeps a template from Python's objects; it does not keep one from looping for a year or from asking for all
the memory. What passes the trial is rendered in this process, still in the sandbox.
"""

from __future__ import annotations

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
    texts = {name: str(token) for name, token in tokens.items() if isinstance(token, str)}
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
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=json.dumps(job).encode(),
            capture_output=True,
            timeout=PATIENCE,
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{where}: was stopped after {PATIENCE:g} s on a plain conversation.", _CURE) from None
    except OSError as error:
        raise UserError(
            f"{where}: the process that tries it out cannot be started ({sys.executable or 'no Python'}: "
            f"{error.strerror}).",
            "Choose chat_template=zephyr, chatml or llama3, which need no trial.",
        ) from None
    if done.returncode == -getattr(signal, "SIGPROF", 0):
        raise UserError(f"{where}: was stopped after {SECONDS:g} s on a plain conversation.", _CURE)
    if done.returncode != 0:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        what = f"signal {-done.returncode}" if done.returncode < 0 else shown(" ".join(last), 200)
        raise UserError(f"{where}: the process that tries it out came to nothing ({what}).", _CURE)
    found = json.loads(done.stdout)
    if found:
        raise UserError(f"{where}: {_words(found['kind'], found['what'])}.", _CURE)


def _words(kind: str, what: str) -> str:
    return {
        "memory": f"asks for more than {MEMORY // 2**20} MiB for a plain conversation",
        "nested": "is nested too deeply, or calls itself without end",
        "compile": f"cannot be compiled ({shown(what, 200)})",
        "length": f"writes more than {ADDED:,} characters around a conversation of {what}",
        "security": f"{shown(what, 200)}, which no template has any business with",
    }[kind]
