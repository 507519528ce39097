"""The child process of ``template_trial``: renders a stranger's template under limits. A script; nothing imports it.

It knows jinja2 and the standard library only, so that it starts in a tenth of a second. Standard input holds a job in
JSON, standard output gets what was wrong, in JSON; a time limit ends it by a signal.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from typing import NoReturn


def main() -> None:
    job = json.load(sys.stdin)
    sys.path[:0] = job["path"]
    environment = make_environment()
    limit(job["seconds"], job["bytes"])
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
    # its default action ends the process even inside one long operation of C
    signal.setitimer(signal.ITIMER_PROF, seconds)


def make_environment() -> object:
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

        def parse(self, parser):  # type: ignore[no-untyped-def]
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # type: ignore[no-untyped-def]
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment


def trial(environment, job: dict) -> dict:  # type: ignore[no-untyped-def,type-arg]
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


if __name__ == "__main__":
    main()
