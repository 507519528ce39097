"""A fast tokenizer as GGUF metadata, and where llama.cpp differs from it.

llama.cpp splits a text by rules that it knows by name (``tokenizer.ggml.pre``), not by the expressions of a
tokenizer.json. Similar rules give other ids without a warning, so a tokenizer with unknown rules is refused.

Source: the GGUF specification (ggml-org/ggml, docs/gguf.md), and what llama.cpp's vocabulary reads.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io.text import shown
from ..model.tokenizer import check_vocabulary, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"

# How Llama 3, Qwen2 and Mistral's Tekken split a text before the merges, as their tokenizer.json files have it.
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit by itself
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = ("bytes",)  # the tokenizers library's ByteLevel brings GPT-2's expression with it
# (steps before the merges, ignore_merges) → llama.cpp's name
_RULES: dict[tuple[tuple[str, ...], bool], str] = {
    (_GPT2, False): "gpt-2",
    (("digits", *_GPT2), False): "smollm",
    ((f"split {_LLAMA3}", "spelling"), True): "llama-bpe",
    ((f"split {_TEKKEN}", "spelling"), True): "tekken",
    ((f"split {_QWEN2}", "spelling"), False): "qwen2",
}
_COMPOSES = "qwen2"  # its tokenizers bring a text into NFC before all that


@dataclass
class Vocabulary:
    """A tokenizer for a GGUF file."""

    model: str  # "gpt2" (byte-level BPE) or "llama" (SentencePiece's BPE)
    pre: str  # llama.cpp's name for how a text is split; "default" for SentencePiece
    tokens: list[str]  # one per row of the embedding
    types: list[int]
    merges: list[str] = field(default_factory=list)  # of byte-level BPE, in order
    scores: list[float] = field(default_factory=list)  # of SentencePiece
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, unknown, padding → id
    add_bos: bool = False  # whether a server adds BOS itself
    add_space_prefix: bool = False  # SentencePiece: whether a space is added before a text and after each special token
    template: str | None = None  # the chat template
    notes: list[str] = field(default_factory=list)  # where llama.cpp differs


def read_vocabulary(folder: Path, vocab_size: int, ends: list[int]) -> Vocabulary:
    """Read the tokenizer of a model's folder.

    Args:
        vocab_size: rows of the model's embedding; rows without a token become unused tokens.
        ends: the ids at which generation stops, the chat template's end token first.

    Raises:
        UserError: no tokenizer; one that llama.cpp does not reproduce; ids beyond the embedding.
    """
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, vocab_size, folder)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    model = told["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{folder}: its tokenizer is a {shown(model.get('type'))} one; GGUF files of this family hold BPE.",
            "Only tokenizers of the Llama, Mistral and Qwen2 kind can be exported.",
        )
    vocabulary = _sentencepiece(tokenizer, told, folder) if _is_sentencepiece(model) else _byte_level(told, folder)
    found = {index: token for token, index in model["vocab"].items()}
    kinds = {
        index: BYTE if vocabulary.model == "llama" and _BYTE.fullmatch(t) else NORMAL for index, t in found.items()
    }
    for added in told["added_tokens"]:
        index = added["id"]
        found[index], kinds[index] = added["content"], CONTROL if added["special"] else USER_DEFINED
        # BOS is first anyway, so its flags have no effect
        if (added["lstrip"] or added["rstrip"] or added["single_word"]) and index != tokenizer.bos_token_id:
            vocabulary.notes.append(f"{added['content']} takes the white space beside it; in llama.cpp it does not")
    if vocabulary.model == "llama" and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    vocabulary.tokens = [found.get(index, f"[PAD{index}]") for index in range(vocab_size)]
    vocabulary.types = [kinds.get(index, UNUSED) for index in range(vocab_size)]
    if vocabulary.model == "llama":
        vocabulary.scores = _scores(model, vocabulary)
    _special(vocabulary, tokenizer, ends)
    return vocabulary


def _is_sentencepiece(model: dict[str, Any]) -> bool:
    return bool(model.get("byte_fallback")) and any(_BYTE.fullmatch(token) for token in model["vocab"])


def _byte_level(told: dict[str, Any], folder: Path) -> Vocabulary:
    model = told["model"]
    rules = tuple(_rule(step) for step in _steps(told["pre_tokenizer"], "pretokenizers"))
    name = _RULES.get((rules, bool(model.get("ignore_merges"))))
    normalized = [step["type"] for step in _steps(told["normalizer"], "normalizers")]
    if name is None or normalized not in ([], ["NFC"] if name == _COMPOSES else []):
        steps = ", ".join([*normalized, *rules]) or "nothing"
        raise UserError(
            f"{folder}: before its merges the tokenizer does: {shown(steps, 300)}. No known rule of llama.cpp does the "
            "same, so the file would give other ids than training saw.",
            f"Known: {', '.join(_RULES.values())} and SentencePiece; llama.cpp's own converter knows more.",
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    vocabulary = Vocabulary("gpt2", name, [], [], merges=merges)
    if normalized:
        vocabulary.notes.append(
            "the tokenizer normalizes a text to NFC and llama.cpp does not: ids differ if accents are separate characters"
        )
    return vocabulary


def _steps(told: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if told is None:
        return []
    return list(told[key]) if told["type"] == "Sequence" else [told]


def _rule(step: dict[str, Any]) -> str:
    """A short name of a pre-tokenizer's step; its JSON if llama.cpp has no such step."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes" if step["use_regex"] else "spelling"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return f"split {step['pattern'].get('Regex')}"
    return json.dumps(step)


def _sentencepiece(tokenizer: Any, told: dict[str, Any], folder: Path) -> Vocabulary:
    for step in _steps(told["normalizer"], "normalizers"):
        plain = step["type"] == "Prepend" and step["prepend"] == _SPACE
        if not plain and not (step["type"] == "Replace" and step["content"] == _SPACE):
            raise UserError(
                f"{folder}: its tokenizer normalizes a text ({shown(step['type'])}), which llama.cpp does not do.",
                "Only tokenizers of the Llama, Mistral and Qwen2 kind can be exported.",
            )
    # asked of the tokenizer: tokenizer.json has three ways to say it
    first = _begins_with_space(tokenizer, "")
    special = tokenizer.eos_token or tokenizer.bos_token or ""
    later = _begins_with_space(tokenizer, special)
    vocabulary = Vocabulary("llama", "default", [], [], add_space_prefix=first)
    if first != later:
        # a template that writes BOS first never had a space added
        vocabulary.add_space_prefix = not (tokenizer.chat_template and tokenizer.bos_token)
        vocabulary.notes.append(
            "the tokenizer puts a space before a text and none after special tokens, llama.cpp both or neither: "
            + ("both" if vocabulary.add_space_prefix else "neither, as in a conversation, which begins with BOS")
        )
    return vocabulary


def _begins_with_space(tokenizer: Any, special: str) -> bool:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(f"{special}ab", add_special_tokens=False)["input_ids"])
    return tokens[1 if special else 0].startswith(_SPACE)


def _scores(model: dict[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Scores in the order of the merges: SentencePiece only compares them."""
    order: dict[str, int] = {}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.setdefault(left + right, len(order))
    last = len(order)
    return [
        0.0 if kind in (CONTROL, UNKNOWN, BYTE) else -float(order.get(token, last))
        for token, kind in zip(vocabulary.tokens, vocabulary.types)
    ]


def _special(vocabulary: Vocabulary, tokenizer: Any, ends: list[int]) -> None:
    """Set the special ids, the chat template, and whether a server adds BOS."""
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
    ids = {name: getattr(tokenizer, attribute) for name, attribute in names.items()}
    vocabulary.special = {name: int(index) for name, index in ids.items() if index is not None}
    template = tokenizer.chat_template
    vocabulary.template = template.get("default") if isinstance(template, dict) else template
    # the template's end token is llama.cpp's "end of turn" if it is not the tokenizer's eos
    if ends and ends[0] != tokenizer.eos_token_id:
        vocabulary.special["eot"] = ends[0]
    if vocabulary.template:
        vocabulary.add_bos = False  # it writes BOS itself, or training saw none
    else:
        plain = tokenizer("a")["input_ids"]
        vocabulary.add_bos = bool(plain) and plain[0] == tokenizer.bos_token_id
