"""Malformed weights, indices and configurations of a base, and what is said of each (``tests/malformed`` explains a case)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.malformed import Case, Fixtures

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODULE = "model.layers.0.self_attn.q_proj"
FETCH = "Fetch the model again."
WRITE = "Download or write it again."
COPY = "Copy the file again from where the model came from."
CONVERT = "Only safetensors are read; convert the weights with transformers' save_pretrained first."
TRUST = "Use a copy of the model from a place that you trust."
MAPS = "weight_map maps each tensor to a safetensors file of this folder."
OUTSIDE = "only the weights in the folder are read, and no code of a model is run."
Change = Callable[[Path], None]


def make_adapter(folder: Path, *, shape: tuple[int, int] = (64, 64), value: float = 0.01, **config: Any) -> Path:
    """A PEFT adapter of rank 2 on one module; a key that is None is left out of its configuration."""
    folder.mkdir()
    tensors = {"A": torch.full((2, shape[1]), value), "B": torch.full((shape[0], 2), value)}
    names = {f"base_model.model.{MODULE}.lora_{side}.weight": tensor for side, tensor in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps({**told, **config}))
    return folder


MERGE = ["merge", "--no-check", "--out", "out", "--adapter", "a", "--base", "base"]


def base(change: Change, words: list[str] | None = None) -> Callable[[Path, Fixtures], list[str]]:
    """The shared base with something changed, which a good adapter is to be merged into."""

    def make(tmp: Path, fixtures: Fixtures) -> list[str]:
        shutil.copytree(fixtures.base, tmp / "base")
        make_adapter(tmp / "a")
        change(tmp / "base")
        return list(MERGE) if words is None else words

    return make


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Rewrite the header of the base's weights; the data stay."""

    def change(folder: Path) -> None:
        raw = (folder / SINGLE).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        edited = edit(json.loads(raw[8 : 8 + length]))
        text = (edited if isinstance(edited, str) else json.dumps(edited)).encode()
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return change


def entry(**keys: Any) -> Change:
    """Change the first tensor's entry in the header."""

    def edit(told: dict[str, Any]) -> dict[str, Any]:
        first = min((k for k in told if k != "__metadata__"), key=lambda k: told[k]["data_offsets"])
        return {**told, first: {**told[first], **keys}}

    return header(edit)


def data(raw: bytes, name: str = SINGLE) -> Change:
    return lambda folder: (folder / name).write_bytes(raw) and None


def index(told: Any) -> Change:
    """An index in place of the one file, which is called a.safetensors then."""

    def change(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(told if isinstance(told, str) else json.dumps(told))

    return change


def shard(name: str, more: Change = lambda folder: None) -> Change:
    def change(folder: Path) -> None:
        index({"weight_map": {"lm_head.weight": name}})(folder)
        more(folder)

    return change


def link(to: str, name: str = SINGLE) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


def pickled(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def config(**keys: Any) -> Change:
    return changed("config.json", **keys)


def changed(name: str, **keys: Any) -> Change:
    """Change keys of a JSON file of the base."""

    def change(folder: Path) -> None:
        told = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**told, **keys}))

    return change


def beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "else/where"}')


FIRST = "lm_head.weight"
DEEP = "[" * 100_000 + "]" * 100_000

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"
WEIGHTS = [
    (
        "a clone without git-lfs",
        data(POINTER),
        "base/model.safetensors: is a git-lfs pointer, not the weights.",
        "Fetch the file itself: `git lfs pull`, or `hf download`.",
    ),
    (
        "a file that is cut short",
        lambda folder: data((folder / SINGLE).read_bytes()[:-100])(folder),
        "base/model.safetensors: not a complete safetensors file: Error while deserializing "
        "header: incomplete metadata, file not fully covered.",
        WRITE,
    ),
    (
        "a pickle called safetensors",
        data(b"PK\x03\x04" + b"\x00" * 100),
        "base/model.safetensors: not a complete safetensors file: it is a pickle, and pickles are never opened.",
        WRITE,
    ),
    (
        "a dtype that torch does not have",
        entry(dtype="F8_E8M0", shape=[448, 256]),
        "base/model.safetensors: not a complete safetensors file: tensor lm_head.weight has the "
        "unsupported dtype F8_E8M0.",
        WRITE,
    ),
    (
        "a base of pickles only",
        pickled,
        "base: neither model.safetensors nor model.safetensors.index.json there (found pytorch_model.bin).",
        CONVERT,
    ),
    (
        "an index without a weight_map",
        index({"metadata": {}}),
        f"base/model.safetensors.index.json: has no weight_map; {MAPS}",
        TRUST,
    ),
    (
        "a shard up the folders",
        shard("../../etc/passwd"),
        f"base/model.safetensors.index.json: names '../../etc/passwd'; {MAPS}",
        TRUST,
    ),
    (
        "a shard that is a pickle",
        shard("pytorch_model.bin"),
        f"base/model.safetensors.index.json: names 'pytorch_model.bin'; {MAPS}",
        TRUST,
    ),
    (
        "a shard that is missing",
        shard("b.safetensors"),
        "base/b.safetensors: is not a file.",
        FETCH,
    ),
    (
        "a shard that is a link out",
        shard("b.safetensors", link("/etc/passwd", "b.safetensors")),
        "base/b.safetensors: is a link out of its folder, to /etc/passwd.",
        "Put the file itself into the folder.",
    ),
    (
        "a licence that is a link to a key",
        link("/etc/hostname", "LICENSE"),
        "base/LICENSE: is a link out of its folder, to /etc/hostname.",
        "Put the file itself into the folder.",
    ),
    (
        "a configuration that is nested deeply",
        data(DEEP.encode(), "config.json"),
        "base/config.json: not valid JSON (its brackets are nested too deeply).",
        COPY,
    ),
    (
        "attention from the hub",
        config(attn_implementation="someone/kernel"),
        f"base/config.json: attn_implementation is someone/kernel; {OUTSIDE}",
        "Remove attn_implementation from the file.",
    ),
    (
        "an adapter inside the base",
        beside,
        "base: holds adapter_config.json beside config.json; transformers would load that adapter too.",
        "Move adapter_config.json and its weights into a folder of their own, and name that one under adapters.",
    ),
]
CASES = [Case(name, base(change), message, hint) for name, change, message, hint in WEIGHTS]
