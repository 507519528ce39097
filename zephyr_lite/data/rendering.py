"""Conversation → text and the spans of its answers, by a chat template.

A conversation is rendered as a whole, and each answer as at inference: the generation prompt of the turns before it, and
the template's text for it as the last turn. An answer is supervised if the whole text has the same answer at the same
place.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import _compile_jinja_template

from ..io.text import shown
from .formats import Message, RowError

# a conversation that every template must render
PROBE: list[Message] = [
    {"role": "user", "content": "question one"},
    {"role": "assistant", "content": "answer one"},
    {"role": "user", "content": "question two"},
    {"role": "assistant", "content": "answer two"},
]

_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_TAG = re.compile(r"(</?think>)")
# its beginning may be in the generation prompt
_EMPTY_THINKING = re.compile(r"\s*(<think>\s*)?</think>\n*")


class Span(NamedTuple):
    """Characters ``start:end`` of a text: an answer with its end token, after the generation prompt."""

    start: int
    end: int


@dataclass
class Rendered:
    """The text of a conversation.

    Attributes:
        text: of the chat template.
        spans: turn → its answer, for each answer that can be supervised; in order.
        notes: what the template leaves out, or writes differently at inference.
    """

    text: str
    spans: dict[int, Span] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Renderer:
    """A chat template with its tokenizer's special tokens.

    Attributes:
        tokenizer: a fast tokenizer; its ``chat_template`` is ``text``.
        text: the Jinja template.
        now: the time for templates that write it; the same for all rows of a run.
        content_parts: the template reads contents as lists of parts.
    """

    def __init__(self, tokenizer: Any, text: str, now: datetime.datetime | None = None) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.now = now or datetime.datetime.now().replace(microsecond=0)
        self.content_parts = False
        self._tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        tokenizer.chat_template = text

    @property
    def reads_clock(self) -> bool:
        """Whether the text depends on ``now``."""
        return "strftime_now" in self.text

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Texts that the tokenizer reads as control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        scaffold = self.text_of(PROBE)
        words = set(self.tokenizer.all_special_tokens)
        words |= {token.content for token in added if token.special or token.content in scaffold}
        words -= {"<think>", "</think>"}  # rows write them themselves
        return re.compile("|".join(re.escape(word) for word in sorted(words, key=lambda w: (-len(w), w)) if word))

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

        Args:
            messages: turns with ``role``, ``content`` and, if they have them, ``tool_calls``, ``reasoning_content``.
            tools: JSON schemas of the functions that may be called.

        Raises:
            RowError: the template refuses the turns, leaves one out, gives the last answer another prompt than at
                inference, or writes no end token after it.
        """
        form = self._form(messages, tools)
        rendered = Rendered(self._render(form, False, tools))
        self._check_written(messages, form, tools, rendered)
        roles = [message["role"] for message in messages]
        first = next((roles.index(role) for role in ("user", "system") if role in roles), len(roles))
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
                raise RowError(
                    "the chat template rewrites earlier turns when an answer is added: "
                    f"{_excerpt(before, start)} becomes {_excerpt(upto, start)}"
                )
            # equal characters may belong to the answer or to its first control token
            begins = [
                match.start() for match in self._control.finditer(upto, history) if match.start() < start < match.end()
            ]
            # search behind control tokens: "A" is also a part of <|Assistant|>
            tags = [match.end() for match in self._control.finditer(upto, history) if match.end() <= start]
            if content and (place := upto.find(content, max([history, *tags]))) >= 0:
                begins.append(place)
            start = min([start, *begins])
            rendered.notes.append(
                f"the generation prompt ends in {before[start:]!r}, which the template does not write before an answer"
            )
        # an empty block of reasoning is the template's, unless the row has one that the template always writes
        skipped, found = (start + _empty_thinking(part[start:]) for part in (upto, text))
        own = _empty_thinking(content)
        if own and found > start and upto[start:].lstrip().startswith(content):
            skipped = found = start
        elif own and not upto.startswith(content, skipped):
            content = content[own:].strip()
        answer = upto[skipped:]
        which = "the last" if last else "an earlier"
        for what, parts in zip(("the reasoning", "all of the text"), _parts(messages[turn])):
            if any(part not in upto[start:] for part in parts):
                rendered.notes.append(f"the chat template does not write {what} of {which} answer")
        same = common_length(answer, text[found:]) if text.startswith(upto[:start]) else 0
        ends = [match.end() for match in self._control.finditer(answer) if match.end() <= same]
        if ends and content in answer[: ends[-1]] and not self._control.sub("", answer[ends[-1] :]).strip():
            rendered.spans[turn] = Span(found, found + ends[-1])
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
        elif messages[0]["role"] == "system" and _moved(messages[0]["content"].strip(), upto, text):
            rendered.notes.append(
                "the chat template writes the system turn with the last user turn only: earlier answers are not supervised"
            )
        else:
            rendered.notes.append(
                "the chat template writes earlier answers otherwise than the last one: they are not supervised"
            )

    def _next_tag(self, form: list[Any], tools: list[Any] | None, last: bool, text: str, end: int) -> str:
        """The control token of the next turn right after an answer, or ""."""
        following = text
        if last:
            role = "tool" if form[-1].get("tool_calls") else "user"
            following = self._render([*form, {"role": role, "content": "?"}], False, tools)
        match = self._control.match(following, end) if following.startswith(text) else None
        if match is None and last:  # a following turn removes the answer's reasoning: search after its last line
            line = text[text.rfind("\n") + 1 :]
            tags = [m for m in self._control.finditer(following) if following[: m.start()].endswith(line)]
            match = tags[-1] if line and tags else None
        return match.group() if match else ""

    def _check_written(
        self, messages: Sequence[Message], form: list[Any], tools: list[Any] | None, rendered: Rendered
    ) -> None:
        """Search every turn in the text: templates omit roles, tools and calls that they do not know."""
        text, position = rendered.text, 0
        if tools and self._same_without(form, text, tools=None):
            raise RowError("the chat template does not write the tools")
        if not self._writes_calls(form, text, tools):
            raise RowError("the chat template does not write the tool calls")
        for message in messages:
            role = message["role"]
            said = _written(message, text, 0 if role == "system" else position)
            if said is None:
                raise RowError(f"the chat template does not write the {role} turn")
            if role != "system":
                position = text.index(said, position) + len(said)

    def _form(self, messages: Sequence[Message], tools: list[Any] | None) -> list[Any]:
        """The messages in the form that this template reads.

        Templates with tool calls read an empty content or null, and arguments as an object or as JSON text.
        """
        form: list[Any] = []
        for message in messages:
            turn: dict[str, Any] = {key: value for key, value in message.items() if key != "train"}
            if "reasoning_content" in turn:
                turn["thinking"] = turn["reasoning_content"]
            if self.content_parts:
                turn["content"] = [{"type": "text", "text": turn["content"]}]
            form.append(turn)
        if not any(message.get("tool_calls") for message in messages):
            return form
        for none, as_text in ((False, False), (True, False), (False, True), (True, True)):
            tried = [_call_form(turn, none, as_text) for turn in form]
            try:
                text = self._render(tried, False, tools)
            except RowError:
                continue
            if self._writes_calls(tried, text, tools):
                return tried
        return form

    def _writes_calls(self, form: list[Any], text: str, tools: list[Any] | None) -> bool:
        calls = [call for turn in form for call in turn.get("tool_calls", ())]
        if not all(call["function"]["name"] in text for call in calls):
            return False
        without = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in form]
        return not (calls and self._same_without(without, text, tools))

    def _same_without(self, form: list[Any], text: str, tools: list[Any] | None) -> bool:
        """Whether the template writes the same text for ``form``, from which something was left out."""
        try:
            return self._render(form, False, tools) == text
        except RowError:
            return False

    def _render(self, form: list[Any], add_generation_prompt: bool, tools: list[Any] | None) -> str:
        try:
            return _compile_jinja_template(self.text).render(
                messages=form,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self.now.strftime,
                **self._tokens,
            )
        except (MemoryError, TemplateSyntaxError):
            raise
        except Exception as error:  # a template's own errors, or of an expression in it
            message = error.message if isinstance(error, TemplateError) else None
            reason = message or f"{type(error).__name__}: {error}"
            raise RowError(f"the chat template refuses the row: {shown(reason.rstrip('.'), 300)}") from None

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for message in messages:
            texts = [message["content"], message.get("reasoning_content", "")]
            texts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", ())]
            for text in texts:
                if match := self._control.search(text):
                    raise RowError(f"a turn's text contains the control token {match.group()}")


def _call_form(turn: dict[str, Any], none: bool, as_text: bool) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = turn["tool_calls"]
    if as_text:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in calls
        ]
    content = None if none and not turn["content"] else turn["content"]
    return {**turn, "content": content, "tool_calls": calls}


def _written(message: Message, text: str, position: int = 0) -> str | None:
    """The turn's content as it occurs in a text from ``position`` on: trimmed, or without its reasoning; or None."""
    whole = message["content"].strip()
    forms = [whole]
    if message["role"] == "assistant":
        forms += [_THINKING.sub("", whole).strip(), whole.split("</think>")[-1].strip()]
    if message["role"] == "tool" and (words := re.findall(r"\w+", whole)):  # templates reformat its JSON
        forms.append(max(words, key=len))
    return next((form for form in forms if text.find(form, position) >= 0), None)


def _parts(message: Message) -> tuple[list[str], list[str]]:
    """The texts of an answer's reasoning, and the others."""
    texts = _TAG.split(message["content"])
    reasoning, rest = [message.get("reasoning_content", "")], [texts[-1]]
    for text, tag in zip(texts[:-1:2], texts[1::2]):
        (reasoning if tag == "</think>" else rest).append(text)
    return [text.strip() for text in reasoning], [text.strip() for text in rest]


def _empty_thinking(text: str) -> int:
    """The length of an empty block of reasoning at the beginning of a text."""
    match = _EMPTY_THINKING.match(text)
    return match.end() if match else 0


def _moved(part: str, before: str, after: str) -> bool:
    return before.find(part) != after.find(part)


def common_length(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 40])
