"""What shapes rows come in, and how each becomes messages.

Every function here works on one row. A fault of one row is a ``RowError`` with a reason; the caller drops the row,
counts it and names its place. A whole data set of the wrong kind is a ``UserError`` (see ``detect``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from ..errors import UserError
from ..strict_json import shown

Message = dict[str, str]
Method = Literal["sft", "dpo"]

COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "chosen",
    "rejected",
    "system",
    "data",
    "text",
)

# the role of a row that is no conversation: its text is trained on as it is
TEXT = "text"
PLAIN = "plain text (no chat template, loss over all tokens)"

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

_TRANSCRIPT = re.compile(r"(?:^|\n\n)[ \t]*(Human|Assistant):")

_NEEDS = {
    "sft": "sft needs conversations: a column messages, conversations (ShareGPT), instruction and output (Alpaca), "
    "prompt and completion, data (raw UltraChat), or plain text: a column text",
    "dpo": "dpo needs preference rows: columns chosen and rejected, with or without prompt",
}


class RowError(Exception):
    """One row cannot be trained on; ``str(error)`` is the reason under which it is counted."""


Normalised = dict[str, list[Message]]
Reader = Callable[[Mapping[str, Any]], tuple[Normalised, str]]


def detect(columns: list[str], method: Method, where: str) -> tuple[str, Reader]:
    """Which format a data set has, by its columns.

    Args:
        columns: the data set's columns, after ``columns:`` has renamed them.
        method: the stage that asks; a preference set may hold ``messages`` too, and serves both.
        where: the data set's name, for the message.

    Returns:
        (the format's name, a reader: row → (normalised row, what was changed or "")).

    Raises:
        UserError: no format of this method fits; says what was found and what is needed.
    """
    have = set(columns)
    pairs = {"chosen", "rejected"} <= have
    if method == "dpo":
        if pairs:
            return "preference pairs" + (" with a prompt column" if "prompt" in have else ""), _read_pair
        found = _sft_format(have)
        what = f"{found[0]} rows" if found else f"columns {shown(', '.join(columns), 500)}"
        raise UserError(f"{where}: found {what}; {_NEEDS['dpo']}.", _columns_hint("{chosen: THEIRS, rejected: THEIRS}"))
    found = _sft_format(have)
    if found:
        return found
    what = "preference rows (chosen and rejected)" if pairs else f"columns {shown(', '.join(columns), 500)}"
    raise UserError(f"{where}: found {what}; {_NEEDS['sft']}.", _columns_hint("{prompt: THEIRS, completion: THEIRS}"))


def _columns_hint(example: str) -> str:
    return f"If the columns have other names, say so: columns: {example}."


def _sft_format(have: set[str]) -> tuple[str, Reader] | None:
    if "messages" in have:
        return "messages", _read_messages("messages")
    if "conversations" in have:
        return "ShareGPT", _read_messages("conversations")
    if {"instruction", "output"} <= have:
        return "Alpaca", _read_alpaca
    if {"prompt", "completion"} <= have:
        return "prompt and completion", _read_completion
    if "data" in have:
        return "raw UltraChat", _read_turns
    if "text" in have:
        return PLAIN, _read_text
    return None


# -- one row of each format ------------------------------------------------------------------------------------------


def _read_messages(column: str) -> Reader:
    def read(row: Mapping[str, Any]) -> tuple[Normalised, str]:
        messages = as_messages(row[column], column)
        return _conversation(_with_system(messages, row.get("system")))

    return read


def _read_alpaca(row: Mapping[str, Any]) -> tuple[Normalised, str]:
    question = _text(row["instruction"], "instruction")
    extra = _text(row.get("input"), "input")
    if extra.strip():
        question = f"{question}\n\n{extra}"
    messages = [_message("user", question), _message("assistant", _text(row["output"], "output"))]
    return _conversation(_with_system(messages, row.get("system")))


def _read_completion(row: Mapping[str, Any]) -> tuple[Normalised, str]:
    messages = _as_prompt(row["prompt"], "prompt") + _as_response(row["completion"], "completion")
    return _conversation(_with_system(messages, row.get("system")))


def _read_turns(row: Mapping[str, Any]) -> tuple[Normalised, str]:
    turns = row["data"]
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise RowError("data is not a list of texts, the user's and the assistant's in turn")
    messages = [_message(("user", "assistant")[place % 2], _text(turn, "data")) for place, turn in enumerate(turns)]
    return _conversation(_with_system(messages, row.get("system")))


def _read_text(row: Mapping[str, Any]) -> tuple[Normalised, str]:
    if isinstance(row["text"], list):  # conversations in a column that dataset_text_field named
        return _conversation(as_messages(row["text"], "text"))
    text = _text(row["text"], "text")
    if not text.strip():
        raise RowError("text is empty")
    return {"messages": [_message(TEXT, text)]}, ""


def _read_pair(row: Mapping[str, Any]) -> tuple[Normalised, str]:
    chosen, rejected = (_as_response(row[column], column) for column in ("chosen", "rejected"))
    # Sets such as ultrafeedback_binarized repeat the whole conversation in both columns; the prompt column is then
    # its first user turn only, and must not be read as the prompt.
    if _is_whole(chosen) != _is_whole(rejected):
        raise RowError("one of chosen and rejected repeats the prompt, the other does not")
    if not _is_whole(chosen):
        source = next((c for c in ("prompt", "conversations", "messages") if row.get(c)), None)
        if source is None:
            raise RowError("no prompt: chosen and rejected hold answers only, and there is no prompt column")
        prompt = _as_prompt(row[source], source)
        chosen, rejected = prompt + chosen, prompt + rejected
    chosen, rejected = (_with_system(turns, row.get("system")) for turns in (chosen, rejected))
    chosen, changed = _check(chosen)
    rejected, changed_too = _check(rejected)
    if chosen == rejected:
        raise RowError("chosen equals rejected")
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    if common < min(len(chosen), len(rejected)) and chosen[common]["role"] != rejected[common]["role"]:
        raise RowError("chosen and rejected differ in the order of their turns")
    if common < min(len(chosen), len(rejected)) and chosen[common]["role"] != "assistant":
        raise RowError("chosen and rejected answer different prompts")
    # one may be the other's beginning: the last answer both still have in front of them starts the responses
    while common > 0 and not (
        common < min(len(chosen), len(rejected)) and chosen[common]["role"] == rejected[common]["role"] == "assistant"
    ):
        common -= 1
    if not any(turn["role"] == "user" for turn in chosen[:common]):
        raise RowError("no prompt: chosen and rejected have no user turn in common")
    pair = {"prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}
    return pair, changed or changed_too


def _is_whole(turns: list[Message]) -> bool:
    """Whether a chosen or rejected column repeats the prompt: its first turn is not an answer."""
    return bool(turns) and turns[0]["role"] != "assistant"


# -- values to messages ----------------------------------------------------------------------------------------------


def as_messages(value: Any, column: str) -> list[Message]:
    """A list of {role, content} or {from, value} as [{role, content}] with the roles system, user and assistant.

    Raises:
        RowError: it is nothing of the kind, or a turn's role is unknown.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):  # a CSV cell
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{column} is a text that is not JSON") from None
    if isinstance(value, Mapping):
        value = [value]
    if value is None or (isinstance(value, list) and not value):
        raise RowError(f"{column} is empty")
    if not isinstance(value, list):
        raise RowError(f"{column} is {_kind(value)}, not a list of turns")
    return [_turn(turn, column) for turn in value]


def _turn(turn: Any, column: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"a turn of {column} is {_kind(turn)}, not {{role, content}}")
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if role is None:
        raise RowError(f"a turn of {column} has no role")
    known = ROLES.get(str(role).strip().lower())
    if known is None:
        raise RowError(f"unknown role {str(role)[:40]!r}")
    return _message(known, _text(content, f"the content of a turn of {column}"))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("text that is not valid Unicode") from None
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):  # a CSV column of numbers
        return str(value)
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text"), what) for part in value)
    raise RowError(f"{what} is {_kind(value)}, not text")


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _is_transcript(text: str) -> bool:
    match = _TRANSCRIPT.search(text)
    return match is not None and not text[: match.start()].strip()


def _transcript(text: str) -> list[Message]:
    """``\\n\\nHuman: … \\n\\nAssistant: …`` as turns; an empty last turn is where the answer goes."""
    parts = _TRANSCRIPT.split(text)[1:]
    turns = [
        _message("user" if who == "Human" else "assistant", said.strip()) for who, said in zip(parts[::2], parts[1::2])
    ]
    return turns[:-1] if not turns[-1]["content"] else turns


def _looks_like_turns(value: Any) -> bool:
    return isinstance(value, (list, Mapping)) or (isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'))


def _as_prompt(value: Any, column: str) -> list[Message]:
    if _looks_like_turns(value) and not isinstance(value, str):
        return as_messages(value, column)
    text = _text(value, column)
    if _is_transcript(text):
        return _transcript(text)
    return [_message("user", text)]


def _as_response(value: Any, column: str) -> list[Message]:
    if _looks_like_turns(value):
        return as_messages(value, column)
    text = _text(value, column)
    if _is_transcript(text):
        return _transcript(text)
    return [_message("assistant", text)]


# -- checks ----------------------------------------------------------------------------------------------------------


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    text = _text(system, "system")
    if text.strip() and not any(m["role"] == "system" for m in messages):
        return [_message("system", text), *messages]
    return messages


def _check(messages: list[Message]) -> tuple[list[Message], str]:
    """The turns up to the last answer; (turns, what was changed or "")."""
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("no assistant turn")
    changed = ""
    while messages[-1]["role"] != "assistant":
        messages = messages[:-1]
        changed = "ended with the user; the last turn was cut"
    if any(not m["content"].strip() for m in messages):
        raise RowError("a turn without content")
    if any(m["role"] == "system" for m in messages[1:]):
        raise RowError("a system turn that is not the first")
    return messages, changed


def _conversation(messages: list[Message]) -> tuple[Normalised, str]:
    messages, changed = _check(messages)
    return {"messages": messages}, changed
