"""The tokenizer of a base or of a stage: loaded without code of its own, compared with the model, saved for two majors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..io.atomic import copy_file, write_json, write_text
from ..io.text import read_object, shown
from .files import again, checked_place

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# the class that reads tokenizer.json as it is, in transformers 4 and 5; and classes that only 5 has
ANY_CLASS = "PreTrainedTokenizerFast"
_ONLY_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer; code of its own is never run."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of the libraries below, Rust's included
        raise UserError(
            f"{folder}: no tokenizer can be built from it: {shown(error, 300)}", again(folder / "tokenizer.json")
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer is a slow one, which has no offsets.", "Add its tokenizer.json.")
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Refuse a tokenizer with ids for which the model has no embedding.

    Unused special tokens without an embedding (a [PAD] that other tools add) are removed from the tokenizer instead, so that
    the same letters in a text are tokenized as text.

    Args:
        vocab_size: rows of the model's embedding.
        folder: the tokenizer's, for the message.
    """
    above = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    added = tokenizer.added_tokens_decoder
    written = f"{tokenizer.chat_template or ''} {tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.unk_token}"
    for index, token in above:
        if index not in added or token in written or not (added[index].special or token == tokenizer.pad_token):
            names = ", ".join(f"{shown(token)} (id {index:,})" for index, token in above[:3])
            names += f" and {len(above) - 3:,} more" if len(above) > 3 else ""
            raise UserError(
                f"{folder}: the tokenizer adds {names}, and the model has embeddings for {vocab_size:,} tokens only.",
                "Use the tokenizer that belongs to this model.",
            )
    if above:
        _remove(tokenizer, {token for _, token in above})


def _remove(tokenizer: Any, tokens: set[str]) -> None:
    """Remove added tokens from a fast tokenizer, in place; transformers has no method for it."""
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in tokens]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))
    for name, token in dict(tokenizer.special_tokens_map).items():
        if token in tokens:
            setattr(tokenizer, name, None)
    tokenizer._extra_special_tokens = [t for t in tokenizer._extra_special_tokens if str(t) not in tokens]
    lists = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
    for name, value in list(tokenizer.init_kwargs.items()):  # written by save_pretrained
        if str(value) in tokens or name in lists:
            del tokenizer.init_kwargs[name]


def save_tokenizer(tokenizer: Any, out: Path) -> None:
    """Write a tokenizer and its chat templates so that transformers 4 and 5 load the same.

    A tokenizer that did not change since it was read keeps the files of its folder.
    """
    source = Path(tokenizer.name_or_path)
    same = (
        (source / "tokenizer.json").is_file()
        and (source / "tokenizer_config.json").is_file()
        and Tokenizer.from_file(str(source / "tokenizer.json")).to_str() == tokenizer.backend_tokenizer.to_str()
        and load_tokenizer(source).special_tokens_map == tokenizer.special_tokens_map
    )
    if same:
        copy_files(source, out, TOKENIZER_FILES)
        more = source / "additional_chat_templates"
        if more.is_dir():
            (out / more.name).mkdir(parents=True, exist_ok=True)
            copy_files(more, out / more.name, ("*.jinja",))
    else:
        tokenizer.save_pretrained(out)
    config = read_object(out / "tokenizer_config.json")
    if not same or config.get("tokenizer_class") in _ONLY_5:
        config["tokenizer_class"] = ANY_CLASS
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    if isinstance(tokenizer.chat_template, str):
        config.pop("chat_template", None)
        write_text(out / "chat_template.jinja", tokenizer.chat_template)
    write_json(out / "tokenizer_config.json", config)


def copy_files(source: Path, out: Path, patterns: Iterable[str]) -> None:
    """Copy files by pattern. A link out of the folder is refused: a merged model is published, and the link may lead to a
    private key."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if not path.is_dir():
                copy_file(checked_place(path), out / path.name)
