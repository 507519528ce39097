"""Write an Ollama Modelfile: the GGUF file, the chat template as a Go template, and the stop tokens.

Ollama does not read Jinja from a GGUF file. So the chat template is rendered with known turns, split into parts,
rebuilt from them and compared on other conversations; a template that is not a sequence of turns is refused.

Source: docs.ollama.com/modelfile and docs.ollama.com/template.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.chat_template import ChatTemplate
from ..data.messages import Message, RowError
from ..errors import UserError
from ..io.atomic import write_text
from ..model.base_folder import read_model_config
from ..model.loaded import template_of_folder
from ..model.tokenizer import load_tokenizer
from .gguf import end_ids, gguf_package, model_folder

Render = Callable[[list[Message], bool], str]
TEMPERATURE = 0.7


@dataclass
class Turns:
    """The parts of a chat template: ``head``, then every turn between its role's texts, then ``prompt``."""

    head: str  # BOS, or nothing
    unsaid: str  # the text in place of a system turn if there is none
    around: dict[str, tuple[str, str]]  # role → the texts before and after a turn's content
    prompt: str  # the generation prompt
    joined: bool = False  # the system turn is the beginning of the user's, as in Gemma's templates

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Build the text of a conversation from the parts."""
        text = self.head + (self.unsaid if messages[0]["role"] != "system" else "")
        for place, message in enumerate(messages):
            before, after = self.around[message["role"]]
            begun = self.joined and place == 1 and messages[0]["role"] == "system"
            text += ("" if begun else before) + message["content"] + after
        return text + (self.prompt if add_generation_prompt else "")

    def go(self) -> str:
        """The Go template over ``.Messages``."""
        text = f"{_literal(self.head)}{{{{ range $i, $_ := .Messages }}}}"
        if self.unsaid:
            text += f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_literal(self.unsaid)}{{{{ end }}}}'
        for place, (role, (before, after)) in enumerate(self.around.items()):
            text += f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}'
            before = _literal(before)
            if self.joined and role == "user":
                before = f'{{{{ if or (ne $i 1) (ne (index $.Messages 0).Role "system") }}}}{before}{{{{ end }}}}'
            text += f"{before}{{{{ .Content }}}}{_literal(after)}"
        return f"{text}{{{{ end }}}}{{{{ end }}}}{_literal(self.prompt)}"


def _literal(text: str) -> str:
    """A text in a Go template in a Modelfile's triple quotes; braces and quotes become Go strings."""
    return re.sub(r'\{\{|\}\}|"""', lambda found: "{{ " + json.dumps(found[0]) + " }}", text)


def turns_of(template: ChatTemplate) -> Turns:
    """The parts of a model's chat template, which are compared with what the template renders."""
    tokenizer, question = template.tokenizer, [{"role": "user", "content": "a question"}]
    try:
        # Phi's templates write eos after the last turn, unless an answer follows
        closes = not template.text_of(question, True).startswith(template.text_of(question))

        def render(messages: list[Message], add_generation_prompt: bool) -> str:
            text = template.text_of(messages, add_generation_prompt)
            return text.removesuffix(tokenizer.eos_token) if closes and not add_generation_prompt else text

        return _take_apart(render, tokenizer.bos_token or "")
    except RowError as error:
        raise _refused(str(error)) from None


def _refused(why: str) -> UserError:
    return UserError(
        f"the chat template is not made of turns in a row ({why}), so it cannot be written for Ollama.",
        "zephyr, chatml and llama3 can. llama.cpp's llama-server reads the template of the GGUF file itself.",
    )


def _take_apart(render: Render, bos: str) -> Turns:
    asked, told, more, rule = "a question QAQ", "an answer WAW", "another question QBQ", "a rule SAS"
    user, again = ({"role": "user", "content": text} for text in (asked, more))
    answer, system = {"role": "assistant", "content": told}, {"role": "system", "content": rule}
    start, _, after_user = render([user], False).partition(asked)
    whole = render([user, answer, again], False)
    before_answer = whole.partition(asked)[2].partition(told)[0].removeprefix(after_user)
    after_answer = render([user, answer], False).partition(told)[2]
    before_user = whole.partition(told)[2].partition(more)[0].removeprefix(after_answer)
    before_system, _, rest = render([system, user], False).partition(rule)
    after_system = rest.partition(asked)[0]
    start = start.removesuffix(before_user)
    head = bos if start.startswith(bos) and before_system.startswith(bos) else ""
    turns = Turns(
        head,
        start.removeprefix(head),
        {
            "system": (before_system.removeprefix(head), after_system.removesuffix(before_user)),
            "user": (before_user, after_user),
            "assistant": (before_answer, after_answer),
        },
        render([user], True).removeprefix(render([user], False)),
        not after_system.endswith(before_user),
    )
    odd = [{"role": "assistant", "content": "x\n\ny"}, {"role": "user", "content": "z {{ .Role }} #"}]
    lines: Message = {"role": "user", "content": "line one\nline two"}
    for messages in ([user, answer, again, *odd], [system, user, answer, again], [lines]):
        for prompt in (False, True):
            if turns.render(messages, prompt) != render(messages, prompt):
                raise _refused(f"{len(messages)} turns differ from the same turns one by one")
    return turns


def write_modelfile(
    folder: str | Path,
    gguf: Path,
    out: Path,
    *,
    temperature: float = TEMPERATURE,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a Modelfile ``out`` for a GGUF file of a model's folder; returns lines for the console.

    Args:
        temperature: Ollama's default for sampling.
        chat_template: instead of the folder's own, as the configuration's key.
        overwrite: replace a different ``out``, which may have been edited.

    Raises:
        UserError: a missing file; a GGUF file with another template or tokenizer, or whose servers would add a BOS;
            a template that cannot be written for Ollama; ``out`` exists and differs.
    """
    folder, gguf, out = model_folder(folder), gguf.expanduser(), out.expanduser()
    tokenizer = load_tokenizer(folder)
    template = template_of_folder(folder, tokenizer, chat_template)
    turns = turns_of(template)
    notes = []
    if _server_adds_bos(gguf, folder, tokenizer, None if chat_template else template.text):
        if not turns.head:
            raise _mismatch(gguf, "has a server add BOS, and the chat template writes none: training saw none", folder)
        turns.head = ""
        notes.append("note: BOS is left out of the template: with this file Ollama adds it")
    spaced: list[Message] = [{"role": "user", "content": " spaced \n"}]
    if spaced[0]["content"] not in template.text_of(spaced, True):
        notes.append("note: the chat template strips white space around a turn's text, Ollama does not")
    ids = list(dict.fromkeys([*template.end_token_ids, *end_ids(folder, read_model_config(folder))]))
    stops = [str(tokenizer.convert_ids_to_tokens(index)) for index in ids]
    # relative to the Modelfile, as Ollama reads it; without a leading dot it would be a model's name
    place = os.path.relpath(gguf.resolve(), out.absolute().parent.resolve()).replace(os.sep, "/")
    lines = [
        f"FROM {place if place.startswith('../') else f'./{place}'}",
        f'TEMPLATE """{turns.go()}"""',
        *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
        f"PARAMETER temperature {temperature:g}",
    ]
    text = "\n".join(lines) + "\n"
    if out.is_dir() or (out.exists() and not overwrite and out.read_text(encoding="utf-8", errors="replace") != text):
        raise UserError(f"{out}: is there already, and says something else.", "Add --overwrite, or name another file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    return [
        f"{out}: for {gguf}; answers end at {', '.join(stops)}",
        *notes,
        f"Next: ollama create {re.sub('[^a-z0-9._-]+', '-', folder.resolve().name.lower())} -f {shlex.quote(str(out))}",
    ]


def _mismatch(gguf: Path, what: str, folder: Path) -> UserError:
    return UserError(f"{gguf}: {what}.", f"Make it: zephyr-lite export gguf {shlex.quote(str(folder))}")


def _server_adds_bos(gguf: Path, folder: Path, tokenizer: Any, template: str | None) -> bool:
    """Whether servers add BOS to what they feed from a GGUF file.

    Args:
        template: the expected chat template; None: another one was asked for.
    """
    try:
        fields = {key: field.contents() for key, field in gguf_package().GGUFReader(gguf).fields.items()}
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise _mismatch(gguf, f"is no GGUF file that can be read ({error})", folder) from None
    tokens = dict(enumerate(fields.get("tokenizer.ggml.tokens") or []))
    if template is not None and fields.get("tokenizer.chat_template") != template:
        raise _mismatch(gguf, f"has another chat template than {folder}", folder)
    if any(tokens.get(index) != token for token, index in tokenizer.get_vocab().items()):
        raise _mismatch(gguf, f"has another tokenizer than {folder}", folder)
    return fields.get("tokenizer.ggml.add_bos_token") is not False
