"""The tokenizer of a base or of a stage: loaded without code of its own, compared with the model, saved for two majors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import UserError
from ..io.atomic import copy_file, write_json, write_text
from ..io.text import read_object, shown
from .shards import again, checked_place

# a tokenizer's files except its configuration and chat template
OWN_FILES = (
    "tokenizer.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# the class that reads tokenizer.json as it is, in transformers 4 and 5; and classes that only 5 has
ANY_CLASS = "PreTrainedTokenizerFast"
_ONLY_5 = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend", "MistralCommonBackend")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's fast tokenizer; code of its own is never run.

    Raises:
        UserError: there is none that transformers can build, or it has no offsets.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of the libraries below, Rust's included
        for name in ("tokenizer_config.json", "tokenizer.json"):
            if (folder / name).is_file():
                read_object(folder / name, strict=False, hint=again(folder / name))  # names the file that is no JSON
        raise UserError(
            f"{folder}: no tokenizer can be built from it: {shown(error, 300)}", again(folder / "tokenizer.json")
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: its tokenizer is a slow one, which has no offsets.", "Add its tokenizer.json.")
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> list[str]:
    """Refuse a tokenizer with ids for which the model has no embedding.

    Unused special tokens without an embedding (a [PAD] that other tools add) are removed from the tokenizer instead, so that
    the same letters in a text are tokenized as text.

    Args:
        vocab_size: rows of the model's embedding.
        folder: the tokenizer's, for the message.

    Returns:
        the tokens that were removed.

    Raises:
        UserError: names the tokens without an embedding, or both sizes.
    """
    above = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    if not above:
        return []
    added = tokenizer.added_tokens_decoder
    written = f"{tokenizer.chat_template or ''} {tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.unk_token}"
    if all(
        index in added and (added[index].special or token == tokenizer.pad_token) and token not in written
        for index, token in above
    ):
        _remove(tokenizer, {token for _, token in above})
        return [token for _, token in above]
    hint = "Use the tokenizer that belongs to this model."
    if all(index in added for index, _ in above):
        names = ", ".join(f"{shown(token)} (id {index:,})" for index, token in above[:3])
        names += f" and {len(above) - 3:,} more" if len(above) > 3 else ""
        raise UserError(
            f"{folder}: the tokenizer adds {names}, and the model has embeddings for {vocab_size:,} tokens only.", hint
        )
    raise UserError(f"{folder}: the tokenizer knows {len(tokenizer):,} tokens, the model {vocab_size:,}.", hint)


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
    """Write a tokenizer and its chat template so that transformers 4 and 5 load the same.

    A tokenizer that did not change since it was read keeps the files of its folder.
    """
    source = Path(tokenizer.name_or_path)
    file, config = source / "tokenizer.json", source / "tokenizer_config.json"
    if (
        file.is_file()
        and config.is_file()
        and Tokenizer.from_file(str(file)).to_str() == tokenizer.backend_tokenizer.to_str()
        and load_tokenizer(source).special_tokens_map == tokenizer.special_tokens_map
    ):
        for pattern in OWN_FILES:
            for path in sorted(source.glob(pattern)):
                copy_file(checked_place(path), out / path.name)
        told = read_object(config, strict=False)
        told.pop("chat_template", None)
        write_json(out / "tokenizer_config.json", told)
        if tokenizer.chat_template:
            write_text(out / "chat_template.jinja", tokenizer.chat_template)
    else:
        tokenizer.save_pretrained(out)
        told = read_object(out / "tokenizer_config.json", strict=False)
        write_json(out / "tokenizer_config.json", {**told, "tokenizer_class": ANY_CLASS})
    make_portable(out)


def make_portable(folder: Path) -> None:
    """Rewrite a saved tokenizer_config.json for transformers 4: the classes and the list that only 5 has."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    told = read_object(path, strict=False)
    new = dict(told)
    if new.get("tokenizer_class") in _ONLY_5:
        new["tokenizer_class"] = ANY_CLASS
    if isinstance(new.get("extra_special_tokens"), list):
        new["additional_special_tokens"] = new.pop("extra_special_tokens")
    if new != told:
        write_json(path, new)
