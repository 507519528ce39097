"""Malformed adapters, tokenizers and chat templates, and what is said of each (``tests/malformed`` explains a case)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.malformed import Case, Fixtures, show
from tests.malformed_weights import CASES as WEIGHTS
from tests.malformed_weights import MERGE, Change, changed, config, make_adapter

ADAPTER = "Copy the adapter again, or write it again with PEFT's save_pretrained."
TEMPLATE = "Choose zephyr, chatml or llama3, or change the template."


def adapter(change: Change = lambda folder: None, **keys: Any) -> Callable[[Path, Fixtures], list[str]]:
    """An adapter with something changed, which is to be merged into the shared base."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        change(make_adapter(tmp / "a", **keys))
        return [*MERGE[:-1], str(fixtures.base)]

    return make


def pickled_adapter(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def text(content: str | bytes, name: str) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def template(content: str | bytes) -> Callable[[Path, Fixtures], list[str]]:
    """A chat template in a file, and the first row as it would be trained on."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        text(content, "t.jinja")(tmp)
        return show(fixtures, chat_template="t.jinja")

    return make


def tokenizer(change: Change) -> Callable[[Path, Fixtures], list[str]]:
    """The shared base with another tokenizer, and the first row as it would be trained on."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        shutil.copytree(fixtures.base, tmp / "base")
        change(tmp / "base")
        return show(fixtures, model_name_or_path="base", chat_template="zephyr")

    return make


ADAPTERS = [
    (
        "an adapter of a pickle",
        adapter(pickled_adapter),
        "a: holds no adapter_model.safetensors (found adapter_model.bin).",
        "Load it with PEFT and save it again: model.save_pretrained(folder, safe_serialization=True).",
    ),
    (
        "an adapter of rank 0",
        adapter(r=0),
        "a/adapter_config.json: r is 0: expected a number greater than 0.",
        ADAPTER,
    ),
    (
        "an adapter whose alpha is text",
        adapter(lora_alpha="16"),
        "a/adapter_config.json: lora_alpha is '16': expected a number.",
        ADAPTER,
    ),
    (
        "an adapter that holds NaN",
        adapter(value=float("nan")),
        "a/adapter_model.safetensors: the LoRA of model.layers.0.self_attn.q_proj holds NaN or infinite values.",
        "Its training had gone wrong; take an earlier checkpoint of it.",
    ),
    (
        "an adapter with a rank of its own",
        adapter(r=4),
        "a/adapter_model.safetensors: model.layers.0.self_attn.q_proj has lora_A [2, 64] and lora_B [64, 2]; by "
        "adapter_config.json they are float matrices [r, in] and [out, r] of rank 4.",
        "The adapter is incomplete, or its files belong to different adapters; save it again, or copy both files.",
    ),
]
CASES = [*WEIGHTS, *(Case(*case) for case in ADAPTERS)]
TEMPLATES = [
    (
        "a template that reaches for attributes",
        template("{{ ''.__class__.__mro__ }}"),
        "chat template t.jinja: cannot be trained on: the chat template refuses the row: access to attribute '__class__' of "
        "'str' object is unsafe.",
        TEMPLATE,
    ),
    (
        "a template with a fault of its own",
        template("{{ messages + 1 }}"),
        "chat template t.jinja: cannot be trained on: the chat template refuses the row: can only concatenate list "
        '(not "int") to list.',
        TEMPLATE,
    ),
    (
        "a template in Latin 1",
        template("é".encode("latin-1")),
        "chat_template t.jinja line 1: not UTF-8 (byte 0xe9).",
        "Save the file as UTF-8.",
    ),
]
CASES += [Case(*case) for case in TEMPLATES]
TOKENIZERS = [
    (
        "a tokenizer without an end",
        changed("tokenizer_config.json", eos_token=None),
        "chat template zephyr: the tokenizer (TokenizersBackend) gives no character offsets, or has no eos token.",
        "Use a model folder with a tokenizer.json, whose tokenizer_config.json names an eos_token.",
    ),
    (
        "a model with code of its own",
        config(model_type="own", auto_map={"AutoConfig": "c.C"}),
        "base/config.json: needs code of its own (auto_map: {'AutoConfig': 'c.C'}), which is never run.",
        "Use a model of a family that transformers knows by itself.",
    ),
]
CASES += [Case(name, tokenizer(change), message, hint) for name, change, message, hint in TOKENIZERS]
