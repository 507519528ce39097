"""The text of a conversation, and the answers in it.

Each answer is rendered as at inference as well: the generation prompt of the turns before it, and the template's text for it as
the last turn. An answer can be supervised if the whole text has the same answer at the same place.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..io.text import shown
from .messages import Message, RowError

# a conversation that every template must render
PROBE: list[Message] = [
    {"role": "user", "content": "question one"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "question two"},
    {"role": "assistant", "content": "answer two"},
]
_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_TAG = re.compile(r"(</?think>)")
# an empty block of reasoning, whose beginning may be in the generation prompt
_EMPTY_THINKING = re.compile(r"(?:\s*(?:<think>\s*)?</think>\n*)?")


class Span(NamedTuple):
    """Characters ``start:end`` of a text: an answer with its end token, after the generation prompt."""

    start: int
    end: int


@dataclass
class Rendered:
    """The text of a conversation."""

    text: str
    spans: dict[int, Span] = field(default_factory=dict)  # turn → its answer, if it can be supervised; in order
    notes: list[str] = field(default_factory=list)  # what the template leaves out, or writes differently at inference


class Renderer:
    """A Jinja template with what it reads besides the turns.

    Attributes:
        tokenizer: its special tokens are the template's.
        text: the Jinja template.
        now: the time for templates that write it.
        content_parts: the template reads contents as lists of parts.
        variables: of the template (``chat_template_kwargs`` elsewhere), such as enable_thinking.
    """

    def __init__(self, tokenizer: Any, text: str, now: datetime.datetime) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.now = now
        self.content_parts = False
        self.variables: dict[str, Any] = {}
        self._special_tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}

    @cached_property
    def control_tokens(self) -> re.Pattern[str]:
        """Texts that the tokenizer reads as control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        scaffold = self.text_of(PROBE)
        words = set(self.tokenizer.all_special_tokens)
        words |= {token.content for token in added if token.special or token.content in scaffold}
        words -= {"<think>", "</think>", ""}  # rows write them themselves
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))

    def text_of(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The template's text of the turns, equal to transformers' ``apply_chat_template``.

        Raises:
            RowError: the template refuses the turns.
        """
        return self._render(self._form(messages, tools), add_generation_prompt, tools)

    def render(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Rendered:
        """The conversation's text and the answers in it.

        An answer begins at the end of the generation prompt of the turns before it, and includes its end token. A
        greeting before the first user turn is not an answer; the answer to a system turn alone is one. Earlier answers
        that the template changes once later turns follow (it cuts their reasoning, or moves the system turn) are context
        and have no span.

        Raises:
            RowError: the template refuses the turns, leaves one out, gives the last answer another prompt than at
                inference, or writes no end token after it.
        """
        form = self._form(messages, tools)
        rendered = Rendered(self._render(form, False, tools))
        # templates omit roles, tools and calls that they do not know
        if tools and not self._differs(form, rendered.text, None):
            raise RowError("the chat template does not write the tools")
        if not self._writes_calls(form, rendered.text, tools):
            raise RowError("the chat template does not write the tool calls")
        roles, position = [message["role"] for message in messages], 0
        for message, role in zip(messages, roles):
            said = _written(message, rendered.text, 0 if role == "system" else position)
            if said is None:
                raise RowError(f"the chat template does not write the {role} turn")
            if role != "system":
                position = rendered.text.index(said, position) + len(said)
        first = roles.index("user") if "user" in roles else roles.index("system") if "system" in roles else len(roles)
        for turn in range(first, len(messages)):
            if roles[turn] == "assistant":
                self._find_answer(messages, form, turn, tools, rendered)
        rendered.notes = list(dict.fromkeys(rendered.notes))
        return rendered

    def _find_answer(
        self, messages: Sequence[Message], form: list[Any], turn: int, tools: list[Any] | None, rendered: Rendered
    ) -> None:
        """Add the span of one answer, if the text has it at the same place as a text that ends with it."""
        text, last = rendered.text, turn == len(messages) - 1
        before = self._render(form[:turn], True, tools)
        upto = text if last else self._render(form[: turn + 1], False, tools)
        content = _written(messages[turn], upto) or ""
        start = common_length(before, upto)
        if start < len(before):  # the generation prompt ends in a text that does not come before an answer
            history = common_length(before, self._render(form[:turn], False, tools))
            if start < history:
                raise RowError("the chat template rewrites earlier turns when an answer is added")
            tags = list(self.control_tokens.finditer(upto, history))
            # equal characters may belong to the answer or to its first control token
            begins = [start, *(tag.start() for tag in tags if tag.start() < start < tag.end())]
            # search behind control tokens: "A" is also a part of <|Assistant|>
            place = upto.find(content, max([history, *(tag.end() for tag in tags if tag.end() <= start)]))
            start = min([*begins, *([place] if content and place >= 0 else [])])
            rendered.notes.append(
                f"the generation prompt ends in {before[start:]!r}, which the template does not write before an answer"
            )
        # an empty block of reasoning is the template's, unless the row has one that the template always writes
        skipped, found, own = (_after_empty_thinking(*at) for at in ((upto, start), (text, start), (content, 0)))
        if own and found > start and upto[start:].lstrip().startswith(content):
            skipped = found = start
        elif own and not upto.startswith(content, skipped):
            content = content[own:].strip()
        answer = upto[skipped:]
        for what, parts in zip(("the reasoning", "all of the text"), _parts(messages[turn])):
            if any(part not in upto[start:] for part in parts):
                which = "the last" if last else "an earlier"
                rendered.notes.append(f"the chat template does not write {what} of {which} answer")
        same = common_length(answer, text[found:]) if text.startswith(upto[:start]) else 0
        end = max((match.end() for match in self.control_tokens.finditer(answer) if match.end() <= same), default=0)
        if end and content in answer[:end] and not self.control_tokens.sub("", answer[end:]).strip():
            rendered.spans[turn] = Span(found, found + end)
        elif (
            content in answer and same == len(answer) and (tag := self._next_tag(form, tools, last, text, found + same))
        ):
            # as in GLM's templates
            rendered.text += tag if last else ""
            rendered.spans[turn] = Span(found, found + same + len(tag))
        elif last and content not in answer:
            raise RowError("the chat template does not write the last answer after the generation prompt")
        elif last:
            raise RowError("the chat template writes no end token after an answer")
        else:
            system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
            rendered.notes.append(
                "the chat template writes the system turn with the last user turn only: earlier answers are not supervised"
                if upto.find(system) != text.find(system)
                else "the chat template writes earlier answers otherwise than the last one: they are not supervised"
            )

    def _next_tag(self, form: list[Any], tools: list[Any] | None, last: bool, text: str, end: int) -> str:
        """The control token of the next turn right after an answer, or ""."""
        following = text
        if last:
            role = "tool" if form[-1].get("tool_calls") else "user"
            following = self._render([*form, {"role": role, "content": "?"}], False, tools)
        match = self.control_tokens.match(following, end) if following.startswith(text) else None
        if match is None and last:  # a following turn removes the answer's reasoning: search after its last line
            line = text[text.rfind("\n") + 1 :]
            tags = [m for m in self.control_tokens.finditer(following) if following[: m.start()].endswith(line)]
            match = tags[-1] if line and tags else None
        return match.group() if match else ""

    def _form(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Any]:
        """The messages in the form that this template reads: templates with tool calls read an empty content or null, and
        arguments as an object or as JSON text."""
        form: list[Any] = []
        has_calls = False
        for message in messages:
            turn = dict(message)
            turn.pop("train", None)
            has_calls = has_calls or "tool_calls" in turn
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
            if self.content_parts:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
            form.append(turn)
        if not has_calls:
            return form
        for as_text, empty in product((False, True), ("", None)):
            tried = [_call_form(turn, empty, as_text) for turn in form]
            with suppress(RowError):
                if self._writes_calls(tried, self._render(tried, False, tools), tools):
                    return tried
        return form

    def _writes_calls(self, form: list[Any], text: str, tools: list[Any] | None) -> bool:
        if not any("tool_calls" in turn for turn in form):
            return True
        without = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in form]
        return self._differs(without, text, tools)

    def _differs(self, form: list[Any], text: str, tools: list[Any] | None) -> bool:
        """Whether the template writes another text for ``form``, from which something was left out."""
        try:
            return self._render(form, False, tools) != text
        except RowError:
            return True

    def _render(self, form: list[Any], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        try:
            return _compile_jinja_template(self.text).render(
                self.variables,
                messages=form,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.now.strftime,
                **self._special_tokens,
            )
        except Exception as error:  # a template's own errors, or of an expression in it
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            reason = shown(" ".join(str(error).split()).rstrip("."), 300)
            raise RowError(f"the chat template refuses the row: {line}{reason}") from None


def _call_form(turn: dict[str, Any], empty: str | None, as_text: bool) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = [dict(call) for call in turn["tool_calls"]]
    for call in calls if as_text else []:
        call["function"] = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
    return {**turn, "content": turn["content"] or empty, "tool_calls": calls}


def _written(message: Message, text: str, position: int = 0) -> str | None:
    """The turn's content as it occurs in a text from ``position`` on: trimmed, or without its reasoning; or None."""
    whole = message["content"].strip()
    if text.find(whole, position) >= 0:
        return whole
    forms = [_THINKING.sub("", whole).strip(), whole.split("</think>")[-1].strip()]
    if message["role"] == "tool":  # templates reformat its JSON
        forms = [max(re.findall(r"\w+", whole), key=len, default=whole)]
    for form in forms:
        if text.find(form, position) >= 0:
            return form
    return None


def _parts(message: Message) -> tuple[list[str], list[str]]:
    """The texts of an answer's reasoning, and the others."""
    texts = _TAG.split(message["content"])
    reasoning, rest = [message.get("reasoning_content", "").strip()], [texts[-1].strip()]
    for text, tag in zip(texts[:-1:2], texts[1::2]):
        (reasoning if tag == "</think>" else rest).append(text.strip())
    return reasoning, rest


def _after_empty_thinking(text: str, position: int) -> int:
    """The position behind an empty block of reasoning."""
    match = _EMPTY_THINKING.match(text, position)
    assert match is not None
    return match.end()


def common_length(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
