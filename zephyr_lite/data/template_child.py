"""The child process of ``template_trial`` and ``template_render``: renders a stranger's template under limits. A script;
the environment that it renders in serves the kit's own templates too, without a child.

It knows jinja2 and the standard library only, so that it starts in a tenth of a second. Standard input's first line holds
a job in JSON. A trial writes what was wrong to standard output, in JSON; a job with ``serve`` answers each line that
follows, a conversation, with one. A time limit ends it by a signal.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn


def main() -> None:
    job = json.loads(sys.stdin.buffer.readline())
    sys.path[:0] = job["path"]
    environment = make_environment()
    limit(job["seconds"], job["bytes"])
    if job.get("serve"):
        serve(environment, job)
    else:
        json.dump(trial(environment, job), sys.stdout)


def limit(seconds: float, size: int) -> None:
    """Time on the processor, memory, and no file written; where the system knows no such limits, the parent's clock alone
    remains."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, value in ((resource.RLIMIT_AS, size), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (value, value))
        except (ValueError, OSError):  # macOS refuses one on the address space
            continue
    clock(seconds)


def clock(seconds: float) -> None:
    """The signal that comes after so many seconds of computing, never for 0: its default action ends the process even inside
    one long operation of C."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def make_environment() -> Any:
    """jinja2's sandbox as transformers sets it up, but strict: reaching for an unsafe attribute ends the trial, where
    transformers prints nothing in its place."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Strict(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: object, attribute: str) -> NoReturn:
            raise SecurityError(f"reaches for the attribute {attribute!r} of a {type(obj).__name__}")

    class Generation(jinja2.ext.Extension):
        """``{% generation %}…{% endgeneration %}`` marks an answer; it changes no text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment


def trial(environment, job: dict) -> dict:
    """{} for a template that may be rendered, else {"kind": …, "what": …}. A template's own errors are not this one's to
    report: a row of theirs may be refused, and the parent says so with the row."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    try:
        template = environment.from_string(job["template"])
    except TemplateSyntaxError:
        return {}
    except MemoryError:
        return {"kind": "memory", "what": ""}
    except RecursionError:
        return {"kind": "nested", "what": ""}
    except Exception as error:
        return {"kind": "compile", "what": f"{type(error).__name__}: {error}"}
    for messages in job["conversations"]:
        content = sum(len(message["content"]) for message in messages)
        for prompt in (False, True):
            try:
                length = 0
                for part in template.generate(
                    messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **job["tokens"]
                ):
                    length += len(part)
                    if length > job["characters"] + job["factor"] * content:
                        return {"kind": "length", "what": f"{content:,}"}
            except SecurityError as error:
                return {"kind": "security", "what": str(error.message)}
            except MemoryError:
                return {"kind": "memory", "what": ""}
            except RecursionError:
                return {"kind": "nested", "what": ""}
            except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
                continue
    return {}


def serve(environment, job: dict) -> None:
    """Answer each conversation with {"text": …}, or with {"kind": …, "what": …} where there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the parent's to answer
    template = None
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        clock(job["seconds"])
        answer = fault = None
        try:
            template = template or environment.from_string(job["template"])
            answer = render(template, asked, job["tokens"])
        except Exception as error:
            fault = failure(error)
        clock(0)
        sys.stdout.write(json.dumps(fault or answer) + "\n")
        sys.stdout.flush()


def render(template, asked: dict, tokens: dict) -> dict:
    parts: list[str] = []
    length = 0
    for part in template.generate(
        messages=asked["messages"], tools=None, documents=None, add_generation_prompt=asked["prompt"], **tokens
    ):
        parts.append(part)
        length += len(part)
        if length > asked["most"]:
            return {"kind": "length", "what": f"more than {asked['most']:,} characters"}
    return {"text": "".join(parts)}


def failure(error: Exception) -> dict:
    """What a template was stopped for, or (own) its own fault, in words."""
    from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

    if isinstance(error, TemplateSyntaxError):
        return {"kind": "syntax", "what": str(error.message), "line": error.lineno}
    if isinstance(error, SecurityError):
        return {"kind": "security", "what": str(error.message)}
    if isinstance(error, MemoryError):
        return {"kind": "memory", "what": ""}
    if isinstance(error, RecursionError):
        return {"kind": "nested", "what": ""}
    return {
        "kind": "own",
        "what": str(error.message) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}",
    }


if __name__ == "__main__":
    main()
