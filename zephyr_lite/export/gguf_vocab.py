"""A fast tokenizer as GGUF metadata, and where llama.cpp differs from it.

llama.cpp splits a text by rules that it knows by name (``tokenizer.ggml.pre``), not by the expressions of a
tokenizer.json. Similar rules give other ids without a warning, so a tokenizer with unknown rules is refused.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), and what llama.cpp's vocabulary reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import shown
from ..model.tokenizer import check_vocabulary, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"

# How Llama 3, Qwen2, Mistral's Tekken and Phi-4-mini split a text before the merges, as their tokenizer.json files have it.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit by itself
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST}"
_GPT4O = rf"{_LOWER}{_ENDING}|{_UPPER}{_ENDING}|\p{{N}}{{1,3}}|{_REST}"
_GPT2 = ("bytes",)  # the tokenizers library's ByteLevel brings GPT-2's expression with it
# (steps before the merges, ignore_merges) → llama.cpp's name
_RULES: dict[tuple[tuple[str, ...], bool], str] = {
    (_GPT2, False): "gpt-2",
    (("digits", *_GPT2), False): "smollm",
    ((f"split {_LLAMA3}", "spelling"), True): "llama-bpe",
    ((f"split {_LLAMA3}", "spelling"), False): "dbrx",
    ((f"split {_GPT4O}", "spelling"), False): "gpt-4o",
    ((f"split {_TEKKEN}", "spelling"), True): "tekken",
    ((f"split {_QWEN2}", "spelling"), False): "qwen2",
}
_WHOLE = (("Isolated", False), ("Removed", True))  # expressions that match all of a text split it alike in both ways
_COMPOSES = "qwen2"  # its tokenizers bring a text into NFC before all that


def add_vocabulary(writer: Any, folder: Path, vocab_size: int, ends: list[int]) -> list[str]:
    """Add the tokenizer and the chat template of a model's folder to a ``GGUFWriter``.

    Args:
        vocab_size: rows of the model's embedding; rows without a token become unused tokens.
        ends: the ids at which generation stops, the chat template's end token first.

    Returns:
        where llama.cpp differs from the tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model, notes = told["model"], list[str]()
    if model.get("type") != "BPE":
        raise _unknown(folder, f"a {shown(model.get('type'))} model in place of BPE")
    by_bytes = bool(model.get("byte_fallback")) and any(_BYTE.fullmatch(token) for token in model["vocab"])
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, BYTE if by_bytes and _BYTE.fullmatch(token) else NORMAL
    wide = []
    for added in told["added_tokens"]:
        index = added["id"]
        tokens[index], types[index] = added["content"], CONTROL if added["special"] else USER_DEFINED
        # BOS is first anyway, so its flags have no effect
        if (added["lstrip"] or added["rstrip"] or added["single_word"]) and index != tokenizer.bos_token_id:
            wide.append(added["content"])
    if wide:
        names = ", ".join(wide[:5]) + (f" and {len(wide) - 5} others" if len(wide) > 5 else "")
        notes.append(f"the white space around {names} belongs to the token; in llama.cpp it does not")
    if by_bytes and tokenizer.unk_token_id is not None:
        types[tokenizer.unk_token_id] = UNKNOWN

    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if by_bytes:
        _check_sentencepiece(told, folder)
        prefix, note = _space_prefix(tokenizer)
    else:
        name, note = _rules(told, folder)
    notes += note
    writer.add_tokenizer_model("llama" if by_bytes else "gpt2")
    writer.add_tokenizer_pre("default" if by_bytes else name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if by_bytes:
        writer.add_token_scores(_scores(merges, tokens, types))
        writer.add_add_space_prefix(prefix)
    else:
        writer.add_token_merges(merges)

    for add, special in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        # the template's end token is llama.cpp's "end of turn" if it is not the tokenizer's eos
        (writer.add_eot_token_id, ends[0] if ends and ends[0] != tokenizer.eos_token_id else None),
    ):
        if special is not None:
            add(special)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    # a template writes BOS itself, or training saw none
    writer.add_add_bos_token(not template and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(False)
    if template:
        writer.add_chat_template(template)
    return notes


def _unknown(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder}: its tokenizer has {what}. No known rule of llama.cpp does the same, so the file would give other ids "
        "than training saw.",
        f"Known: {', '.join(_RULES.values())} and SentencePiece; llama.cpp's own converter knows more.",
    )


def _steps(told: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if told is None:
        return []
    return list(told[key]) if told["type"] == "Sequence" else [told]


def _rules(told: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    """llama.cpp's name for how a byte-level tokenizer splits a text, and notes."""
    rules = []
    for step in _steps(told["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            rules.append("bytes" if step["use_regex"] else "spelling")
        elif step["type"] == "Digits" and step["individual_digits"]:
            rules.append("digits")
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in _WHOLE:
            rules.append(f"split {step['pattern'].get('Regex')}")
        else:
            rules.append(json.dumps(step))  # llama.cpp has no such step
    name = _RULES.get((tuple(rules), bool(told["model"].get("ignore_merges"))))
    normalized = [step["type"] for step in _steps(told["normalizer"], "normalizers")]
    if name is None or normalized not in ([], ["NFC"] if name == _COMPOSES else []):
        raise _unknown(folder, f"before its merges the steps {shown(', '.join([*normalized, *rules]) or 'none', 300)}")
    note = "the tokenizer normalizes a text to NFC, llama.cpp does not: ids differ if accents are separate characters"
    return name, [note] if normalized else []


def _check_sentencepiece(told: dict[str, Any], folder: Path) -> None:
    for step in _steps(told["normalizer"], "normalizers"):
        plain = step["type"] == "Prepend" and step["prepend"] == _SPACE
        if not plain and not (step["type"] == "Replace" and step["content"] == _SPACE):
            raise _unknown(folder, f"the normalizer {shown(step['type'])}")


def _space_prefix(tokenizer: Any) -> tuple[bool, list[str]]:
    """Whether llama.cpp is to put a space before a text and after each special token, and notes. The tokenizer is asked:
    tokenizer.json has three ways to say it."""
    begins = []
    for special in ("", tokenizer.eos_token or tokenizer.bos_token or ""):
        ids = tokenizer(f"{special}ab", add_special_tokens=False)["input_ids"]
        begins.append(tokenizer.convert_ids_to_tokens(ids)[1 if special else 0].startswith(_SPACE))
    if begins[0] == begins[1]:
        return begins[0], []
    # a template that writes BOS first never had a space added
    prefix = not (tokenizer.chat_template and tokenizer.bos_token)
    which = "both" if prefix else "neither, as in a conversation, which begins with BOS"
    return prefix, [
        "the tokenizer puts a space before a text and none after special tokens, llama.cpp both or neither: " + which
    ]


def _scores(merges: list[str], tokens: list[str], types: list[int]) -> list[float]:
    """Scores in the order of the merges: SentencePiece only compares them."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault(merge.replace(" ", ""), len(order))
    last = len(order)
    return [
        0.0 if kind in (CONTROL, UNKNOWN, BYTE) else -float(order.get(token, last))
        for token, kind in zip(tokens, types)
    ]
