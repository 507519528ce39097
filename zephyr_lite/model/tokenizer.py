"""The tokenizer of a base or of a stage: built without code of its own, tried once, and compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..strict_json import read_object, shown
from .shards import again

# small ones: tokenizer.json itself is parsed by the library, several times over
_SMALL = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_SAMPLE = "Hello, 2 words.\n é"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer.

    Raises:
        UserError: there is none that transformers can build, it needs code of its own (which is never run), it cannot
            tokenize a plain line, or it has no offsets.
    """
    told: dict[str, dict[str, Any]] = {}
    for name in _SMALL:
        path = folder / name
        if path.is_symlink() or path.exists():
            told[name] = read_object(path, strict=False, hint=again(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MemoryError:
        raise
    except BaseException as error:  # the libraries beneath raise whatever they like, of Rust a panic
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        code = told.get("tokenizer_config.json", {}).get("auto_map")
        if code is not None and "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}/tokenizer_config.json: needs code of its own (auto_map: {shown(code)}), which is never run.",
                "Use a model whose tokenizer has a tokenizer.json.",
            ) from error
        if (whole := folder / "tokenizer.json").is_file():
            read_object(whole, strict=False, hint=again(whole))  # which of the files is broken, if that one is
        raise UserError(
            f"{folder}: no tokenizer can be built from it: {_reason(error)}", again(folder / "tokenizer.json")
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer is a slow one, which knows no offsets.", "Add its tokenizer.json.")
    try:
        ids = tokenizer(_SAMPLE, return_offsets_mapping=True)["input_ids"]
        tokenizer.decode(ids)
    except MemoryError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise UserError(
            f"{folder}: its tokenizer fails on a plain line of text: {_reason(error)}", again(folder / "tokenizer.json")
        ) from error
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Refuse a tokenizer that gives ids for which the model has no embedding.

    Args:
        vocab_size: rows of the model's embedding.
        folder: where the tokenizer or the model came from, for the message.

    Raises:
        UserError: names the tokens above, or that the tokenizer is of another model.
    """
    above = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    if not above:
        return
    added = tokenizer.added_tokens_decoder
    hint = "Use the tokenizer that belongs to this model."
    if all(index in added for index, _ in above):
        names = ", ".join(f"{shown(token)} (id {index:,})" for index, token in above[:3])
        names += f" and {len(above) - 3:,} more" if len(above) > 3 else ""
        raise UserError(
            f"{folder}: the tokenizer adds {names}, and the model has embeddings for {vocab_size:,} tokens only.", hint
        )
    raise UserError(f"{folder}: the tokenizer knows {len(tokenizer):,} tokens, the model {vocab_size:,}.", hint)


def _is_panic(error: BaseException) -> bool:
    """A Rust library's assertion that failed; pyo3 gives it no place to import it from."""
    return type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shown(lines[0] if lines else type(error).__name__, 300)
