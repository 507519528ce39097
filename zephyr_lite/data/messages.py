"""Turns of other tools (OpenAI, ShareGPT, Hermes, LLaMA-Factory, Capybara) as messages of one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# role and content; if the row has them, tool_calls, reasoning_content, name, tool_call_id; and train: False
Message = dict[str, Any]

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
    "tool": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    # turns that are a call, as JSON
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_REASONING = ("reasoning_content", "thinking", "reasoning")
# keys for whether a turn is supervised, of OpenAI, Axolotl, ms-swift and torchtune
_TRAINED = {"weight", "train", "trained", "training", "trainable", "trainonturn", "supervise", "supervised", "loss"}
_TRAINED |= {"lossweight", "lossscale", "lossmask"}
_MASKED = ("masked", "mask", "ignore", "ignored")
_TRUE, _FALSE = ("true", "yes", "on", "1", "1.0"), ("false", "no", "off", "0", "0.0")


class RowError(Exception):
    """A row that cannot be trained on; ``str(error)`` is the reason that it is counted under."""


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def as_messages(value: Any, column: str, unread: set[str] | None = None) -> list[Message]:
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
    if isinstance(value, Mapping):
        value = [value]
    if value is None or (isinstance(value, list) and not value):
        raise RowError(f"{column} is empty")
    if not isinstance(value, list):
        raise RowError(f"{column} is {_kind(value)}, not a list of turns")
    messages: list[Message] = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise RowError(f"a turn of {column} is {_kind(turn)}, not {{role, content}}")
        keys = {key for key, item in turn.items() if item is not None and item != [] and item != ""}
        if not {"role", "from"} & set(turn) and {"input", "output"} <= set(turn):  # Capybara's
            keys -= {"input", "output"}
            answer = message("assistant", as_text(turn["output"], f"the output of a turn of {column}"))
            if _is_masked(turn, "assistant", keys):
                answer["train"] = False
            messages += [message("user", as_text(turn["input"], f"the input of a turn of {column}")), answer]
        else:
            messages.append(_turn(turn, column, keys))
        if unread is not None:
            unread |= keys
    return messages


def _turn(turn: Mapping[str, Any], column: str, keys: set[str]) -> Message:
    """One message; the keys that are read are removed from ``keys``."""
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if name is None:
        raise RowError(f"a turn of {column} has no role")
    said = str(name).strip().lower()
    role = ROLES.get(said)
    if role is None:
        raise RowError(f"unknown role {str(name)[:40]!r}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    keys -= {"role", "from", "content" if turn.get("content") is not None else "value"}
    calls: Any = turn.get("tool_calls") or turn.get("function_call")
    keys -= {"tool_calls" if turn.get("tool_calls") else "function_call"}
    if said in _CALLS and not calls:
        calls, content = content, None
    elif role == "tool" and (isinstance(content, Mapping) or (isinstance(content, list) and not _are_texts(content))):
        # a result as JSON
        content = json.dumps(content, ensure_ascii=False)
    result = message(role, as_text(content, f"the content of a turn of {column}"))
    if calls := listed(calls, "tool calls"):
        if role != "assistant":
            raise RowError(f"a {role} turn with tool calls")
        result["tool_calls"] = [_call(call) for call in calls]
    if not keys:
        return result
    reasoning = next((key for key in _REASONING if key in keys), None)
    if reasoning is not None and role == "assistant":
        result["reasoning_content"] = as_text(turn[reasoning], reasoning)
        keys -= {key for key in _REASONING if turn.get(key) == turn[reasoning]}
    for key in ("name", "tool_call_id"):
        if key in keys:
            result[key] = as_text(turn[key], key)
            keys.discard(key)
    if _is_masked(turn, role, keys):
        result["train"] = False
    return result


def _is_masked(turn: Mapping[str, Any], role: str, keys: set[str]) -> bool:
    """Whether a key of the turn excludes it from the loss."""
    masked = False
    for key in sorted(keys):
        plain = _plain(key)
        if plain not in (*_TRAINED, *_MASKED):
            continue
        marked = truth(turn[key])
        if marked is None:
            raise RowError(
                f"the {key} of a turn is {str(turn[key])[:40]!r}: a turn is trained (1, true) or not (0, false)"
            )
        trained = marked if plain in _TRAINED else not marked
        masked = masked or not trained
        if role == "assistant" or not trained:  # other roles are never trained
            keys.discard(key)
    return masked and role == "assistant"


def with_reason(key: str) -> str:
    """A message key that was not read, with the reason if it would train a turn of another role."""
    plain = _plain(key)
    return f"{key} (of turns that are not the assistant's)" if plain in (*_TRAINED, *_MASKED) else key


def _plain(key: str) -> str:
    return key.lower().removeprefix("is_").replace("_", "").replace("-", "")


def truth(value: Any) -> bool | None:
    """A truth value in any spelling; None for other values."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    text = value.strip().lower() if isinstance(value, str) else ""
    return True if text in _TRUE else False if text in _FALSE else None


def _call(call: Any) -> dict[str, Any]:
    """{type, function: {name, arguments}}, and the id if there is one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    function = call if function is None else function
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("a tool call has no name")
    arguments: Any = next((function[key] for key in _ARGUMENTS if function.get(key) is not None), {})
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", "the arguments of a tool call are")
    if not isinstance(arguments, Mapping):
        raise RowError(f"the arguments of a tool call are {_kind(arguments)}, not an object")
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
    for tool in listed(value, "tools") if value else []:
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
        RowError: it is something else, or not valid Unicode.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError("text that is not valid Unicode") from None
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and _are_texts(value):
        return "".join(as_text(part.get("text"), what) for part in value)
    raise RowError(f"{what} is {_kind(value)}, not text")


def _are_texts(parts: list[Any]) -> bool:
    return all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts)


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
