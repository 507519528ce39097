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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.chat_template import ChatTemplate
from ..data.messages import Message, RowError
from ..errors import UserError
from ..io.atomic import make_folder, write_text
from ..io.text import shown
from ..model.base import read_model_config
from ..model.loaded import template_of_folder
from ..model.tokenizer import load_tokenizer
from .gguf import end_ids, gguf_package, model_folder

Render = Callable[[list[Message], bool], str]
ROLES = ("system", "user", "assistant")
TEMPERATURE = 0.7


@dataclass
class Turns:
    """The parts of a chat template: ``head``, then every turn between its role's texts, then ``prompt``."""

    head: str  # BOS, or nothing
    unsaid: str  # the text in place of a system turn if there is none
    before: dict[str, str]  # role → the text around a turn's content
    after: dict[str, str]
    prompt: str  # the generation prompt
    notes: list[str] = field(default_factory=list)  # where the Go template differs

    def render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Build the text of a conversation from the parts."""
        text = self.head + (self.unsaid if messages[0]["role"] != "system" else "")
        for message in messages:
            text += self.before[message["role"]] + message["content"] + self.after[message["role"]]
        return text + (self.prompt if add_generation_prompt else "")

    def go(self) -> str:
        """The Go template over ``.Messages``."""
        unsaid = (
            f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_literal(self.unsaid)}{{{{ end }}}}' if self.unsaid else ""
        )
        turns = ""
        for place, role in enumerate(ROLES):
            turns += f'{{{{ {"else if" if place else "if"} eq .Role "{role}" }}}}'
            turns += f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
        return (
            f"{_literal(self.head)}{{{{ range $i, $_ := .Messages }}}}{unsaid}{turns}{{{{ end }}}}{{{{ end }}}}"
            f"{_literal(self.prompt)}"
        )


def _literal(text: str) -> str:
    """A text in a Go template in a Modelfile's triple quotes; braces and quotes become Go strings."""
    return re.sub(r'\{\{|\}\}|"""', lambda found: "{{ " + json.dumps(found[0]) + " }}", text)


def take_apart(render: Render, bos: str | None) -> Turns:
    """Split a chat template into its parts, and compare what they build with what the template renders.

    Args:
        render: (messages, add_generation_prompt) → text.
        bos: the tokenizer's BOS.

    Raises:
        UserError: the template is not a sequence of turns.
    """
    asked, told, more, rule = "a question QAQ", "an answer WAW", "another question QBQ", "a rule SAS"
    user, again = ({"role": "user", "content": text} for text in (asked, more))
    answer, system = {"role": "assistant", "content": told}, {"role": "system", "content": rule}
    start, _, after_user = render([user], False).partition(asked)
    whole = render([user, answer, again], False)
    before_answer = whole.partition(asked)[2].partition(told)[0].removeprefix(after_user)
    after_answer = render([user, answer], False).partition(told)[2]
    before_user = whole.partition(told)[2].partition(more)[0].removeprefix(after_answer)
    with_system = render([system, user], False)
    system_start, _, rest = with_system.partition(rule)
    start = start.removesuffix(before_user)
    head = bos if bos and start.startswith(bos) and system_start.startswith(bos) else ""
    turns = Turns(
        head,
        start.removeprefix(head),
        {"system": system_start.removeprefix(head), "user": before_user, "assistant": before_answer},
        {"system": rest.partition(asked)[0].removesuffix(before_user), "user": after_user, "assistant": after_answer},
        render([user], True).removeprefix(render([user], False)),
    )
    odd = [{"role": "assistant", "content": "x\n\ny"}, {"role": "user", "content": "z {{ .Role }} #"}]
    lines: Message = {"role": "user", "content": "line one\nline two"}
    for messages in ([user, answer, again, *odd], [system, user, answer, again], [lines]):
        for prompt in (False, True):
            if turns.render(messages, prompt) != render(messages, prompt):
                raise _refused(f"{len(messages)} turns differ from the same turns one by one")
    spaced: list[Message] = [{"role": "user", "content": " spaced \n"}]
    if turns.render(spaced, True) != render(spaced, True):
        turns.notes.append("the chat template strips white space around a turn's text, Ollama does not")
    return turns


def _refused(why: str) -> UserError:
    return UserError(
        f"the chat template is not made of turns in a row ({why}), so it cannot be written for Ollama.",
        "zephyr, chatml and llama3 can. llama.cpp's llama-server reads the template of the GGUF file itself.",
    )


def turns_of(template: ChatTemplate) -> Turns:
    """The parts of a model's chat template.

    Raises:
        UserError: as ``take_apart``; the template refuses plain turns.
    """
    try:
        return take_apart(template.text_of, template.tokenizer.bos_token)
    except RowError as error:
        raise _refused(str(error)) from None


def write_modelfile(
    folder: str | Path,
    gguf: Path,
    out: Path,
    *,
    temperature: float = TEMPERATURE,
    chat_template: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write a Modelfile for a GGUF file of a model's folder.

    Args:
        folder: the model's.
        gguf: the file that it was exported to.
        out: the Modelfile.
        temperature: Ollama's default for sampling.
        chat_template: instead of the folder's own, as the configuration's key.
        overwrite: replace a different ``out``, which may have been edited.

    Returns:
        lines for the console.
    Raises:
        UserError: a missing file; a GGUF file with another template or tokenizer, or whose servers would add a BOS;
            a template that cannot be written for Ollama; ``out`` exists and differs.
    """
    folder, gguf, out = model_folder(folder), gguf.expanduser(), out.expanduser()
    if not gguf.is_file():
        raise UserError(f"{gguf}: no such file.", f"Make it first: zephyr-lite export gguf {shlex.quote(str(folder))}")
    if out.is_dir():
        raise UserError(f"{out}: is a folder.", f"Name the file: --out {out / 'Modelfile'}")
    tokenizer = load_tokenizer(folder)
    template = template_of_folder(folder, tokenizer, chat_template)
    turns = turns_of(template)
    notes = _check_file(gguf, folder, tokenizer, None if chat_template else template.text, turns)
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
    if out.exists() and not overwrite and out.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"{out}: is there already, and says something else.", "Add --overwrite to replace it.")
    make_folder(out.parent)
    write_text(out, text)
    return [
        f"{out}: for {gguf}; answers end at {', '.join(stops)}",
        *(f"note: {note}" for note in [*turns.notes, *notes]),
        f"Next: ollama create {re.sub('[^a-z0-9._-]+', '-', folder.resolve().name.lower())} -f {shlex.quote(str(out))}",
    ]


def _check_file(path: Path, folder: Path, tokenizer: Any, template: str | None, turns: Turns) -> list[str]:
    """Check that a GGUF file has this model's tokenizer and template, and that BOS is added once.

    Args:
        template: the expected template; None: another one was asked for.

    Returns:
        warnings.
    Raises:
        UserError: the file does not match.
    """
    try:
        fields = {key: field.contents() for key, field in gguf_package().GGUFReader(path).fields.items()}
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise UserError(f"{path}: is no GGUF file that can be read: {error}.", "Export it again.") from None
    tokens, adds_bos = (
        dict(enumerate(fields.get("tokenizer.ggml.tokens") or [])),
        fields.get("tokenizer.ggml.add_bos_token"),
    )
    fault = None
    if template is not None and fields.get("tokenizer.chat_template") != template:
        fault = f"has another chat template than {folder}"
    elif any(tokens.get(index) != token for token, index in tokenizer.get_vocab().items()):
        fault = f"has another tokenizer than {folder}"
    elif adds_bos is not False and not turns.head:
        fault = "has a server add BOS, and the chat template writes none: training saw none"
    if fault is not None:
        raise UserError(f"{path}: {fault}.", f"Export it again: zephyr-lite export gguf {shlex.quote(str(folder))}")
    notes = []
    if adds_bos is not False:
        turns.head = ""
        notes.append("BOS is left out of the template: with this file Ollama adds it")
    if (name := fields.get("general.name")) not in (None, folder.resolve().name):
        notes.append(f"the GGUF file was made of a folder called {shown(name)}")
    return notes
