"""Turns, tools and texts of a row, as messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# role and content; if the row has them, tool_calls, reasoning_content, name, tool_call_id; and train: False
Message = dict[str, Any]

_CALLS = ("function_call", "tool_call")  # turns that are a call, as JSON
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", *_CALLS), "assistant"),
    **dict.fromkeys(("tool", "ipython", "observation", "function", "tool_response", "function_response"), "tool"),
}
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_REASONING = ("reasoning_content", "thinking", "reasoning")
# keys for whether a turn is supervised, of OpenAI, Axolotl, ms-swift and torchtune, without "is_", "_" and "-"
_TRAINED = {"weight", "train", "trained", "training", "trainable", "trainonturn", "supervise", "supervised", "loss"}
_TRAINED |= {"lossweight", "lossscale", "lossmask"}
_MASKED = {"masked", "mask", "ignore", "ignored"}
_TRUE, _FALSE = ("true", "yes", "on", "1", "1.0"), ("false", "no", "off", "0", "0.0")


class RowError(Exception):
    """A row that cannot be trained on; ``str(error)`` is the reason that it is counted under."""


def has_value(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def as_messages(value: Any, column: str, unread: list[str] | None = None) -> list[Message]:
    """A list of turns, or one turn, as messages.

    Args:
        value: turns of {role, content}, {from, value} or {input, output}; a list of them may be JSON text.
        column: its name, for messages.
        unread: the keys of turns that have a value and are not read are added to it.

    Raises:
        RowError: it is something else, or a turn cannot be read.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value, f"{column} is")
    if value is None or value == []:
        raise RowError(f"{column} is empty")
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise RowError(f"{column} is {type(value).__name__}, not a list of turns")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise RowError(f"a turn of {column} is {type(turn).__name__}, not {{role, content}}")
        if not {"role", "from"} & set(turn) and {"input", "output"} <= set(turn):  # Capybara's
            rest = {key: value for key, value in turn.items() if key not in ("input", "output")}
            messages.append(message("user", as_text(turn["input"], f"the input of a turn of {column}")))
            turn = {**rest, "role": "assistant", "content": turn["output"]}
        messages.append(_turn(turn, column, unread))
    return messages


def _turn(turn: Mapping[str, Any], column: str, unread: list[str] | None) -> Message:
    """One message; the keys that have a value and are not read are added to ``unread``."""
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if name is None:
        raise RowError(f"a turn of {column} has no role")
    said = str(name).strip().lower()
    role = ROLES.get(said)
    if role is None:
        raise RowError(f"unknown role {str(name)[:40]!r}")
    text_key = "content" if turn.get("content") is not None else "value"
    calls_key = "tool_calls" if turn.get("tool_calls") else "function_call"
    content, calls = turn.get(text_key), turn.get(calls_key)
    if said in _CALLS and not calls:
        content, calls = None, content
    elif role == "tool" and (isinstance(content, Mapping) or (isinstance(content, list) and not _are_texts(content))):
        content = json.dumps(content, ensure_ascii=False)  # a result as JSON
    result = message(role, as_text(content, f"the content of a turn of {column}"))
    if calls := listed(calls, "tool calls"):
        if role != "assistant":
            raise RowError(f"a {role} turn with tool calls")
        result["tool_calls"] = [_call(call) for call in calls]
    reasoning = None
    for key, value in turn.items():
        if key in ("role", "from", text_key, calls_key) or not has_value(value):
            continue
        plain = key.lower().removeprefix("is_").replace("_", "").replace("-", "")
        if key in ("name", "tool_call_id"):
            result[key] = as_text(value, key)
        elif key in _REASONING and role == "assistant" and reasoning in (None, value):
            reasoning = value
            result["reasoning_content"] = as_text(value, key)
        elif plain in _TRAINED | _MASKED:
            marked = truth(value)
            if marked is None:
                raise RowError(
                    f"the {key} of a turn is {str(value)[:40]!r}: a turn is trained (1, true) or not (0, false)"
                )
            is_trained = marked == (plain in _TRAINED)
            if role == "assistant" and not is_trained:
                result["train"] = False
            elif role != "assistant" and is_trained and unread is not None:  # other roles are never trained
                unread.append(key)
        elif unread is not None:
            unread.append(key)
    return result


def truth(value: Any) -> bool | None:
    """A truth value in any spelling; None for other values."""
    text = str(value).strip().lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _call(call: Any) -> dict[str, Any]:
    """{type, function: {name, arguments}}, and the id if there is one."""
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("a tool call has no name")
    arguments: Any = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", "the arguments of a tool call are")
    if not isinstance(arguments, Mapping):
        raise RowError(f"the arguments of a tool call are {type(arguments).__name__}, not an object")
    result: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}
    if call.get("id") is not None:
        result["id"] = as_text(call["id"], "the id of a tool call")
    return result


def as_tools(value: Any) -> list[dict[str, Any]]:
    """A tools or functions column in OpenAI's form; it may hold the functions alone, or be JSON text.

    Raises:
        RowError: it is not a list of functions with names.
    """
    tools = []
    for tool in listed(value, "tools"):
        if isinstance(tool, str):
            tool = _parsed(tool, "a tool is")
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("tools is not a list of functions with names")
        if function is tool:
            tool = {"type": "function", "function": {k: v for k, v in tool.items() if (k, v) != ("type", "function")}}
        tools.append(dict(tool))
    return tools


def listed(value: Any, what: str) -> list[Any]:
    value = _parsed(value, f"{what} are") if isinstance(value, str) else value
    return value if isinstance(value, list) else [] if value is None else [value]


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError(f"{what} a text that is not JSON") from None


def as_text(value: Any, what: str) -> str:
    """A text, or the joined texts of a list of parts; "" for null.

    Raises:
        RowError: it is something else.
    """
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and _are_texts(value):
        return "".join(as_text(part.get("text"), what) for part in value)
    raise RowError(f"{what} is {type(value).__name__}, not text")


def _are_texts(parts: list[Any]) -> bool:
    return all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts)
