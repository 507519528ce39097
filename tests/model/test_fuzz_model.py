"""A model's files with anything wrong in them: what comes out is a result or a UserError, and a result can be used.

A real file is changed at random: bytes flipped, cut out or repeated, a value of its JSON replaced. A few examples run here,
always the same; ``FUZZ_FACTOR=50`` in the environment tries fifty times as many, and others.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.malformed_weights import make_adapter
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.formats import RowError
from zephyr_lite.errors import UserError
from zephyr_lite.io.safetensors import SafetensorsFile
from zephyr_lite.merge import merge
from zephyr_lite.model.base import load_base
from zephyr_lite.model.peft_io import adapter_sha256, read_adapter
from zephyr_lite.model.quantized import kept_bases
from zephyr_lite.model.shards import INDEX, open_shards
from zephyr_lite.model.tokenizer import check_vocabulary, load_tokenizer

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
WEIGHTS = "model.safetensors"


def few(examples: int) -> settings:
    return settings(
        max_examples=examples * FACTOR,
        derandomize=FACTOR == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


numbers = st.sampled_from([0, 1, -1, 2, 3, 64, 448, 10**12, 2**31, 2**63, -(2**63), 10**30, 1.5, 1e308])
odd = st.sampled_from(
    [None, True, False, "", "x", "../x", "/etc/passwd", "a\nb\x1b[0m", "\ud800", float("nan"), float("inf")]
)
values = st.recursive(
    numbers | odd | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def places(told: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value inside a JSON document."""
    inside = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    return [found for key, value in inside for found in [(*path, key), *places(value, (*path, key))]]


@st.composite
def changed_json(draw: st.DrawFn, told: Any) -> Any:
    """The document with one to three values replaced, removed or added."""
    told = json.loads(json.dumps(told))
    for _ in range(draw(st.integers(1, 3))):
        if not (found := places(told)):
            return draw(values)
        *way, key = draw(st.sampled_from(found))
        where = told
        for step in way:
            where = where[step]
        what = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if what == "remove":
            del where[key]
        elif what == "add" and isinstance(where, dict):
            where[draw(st.text(max_size=8) | st.sampled_from(found).map(lambda f: str(f[-1])))] = draw(values)
        else:
            where[key] = draw(values)
    return told


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes, within: int | None = None) -> bytes:
    """The file with one to three changes in its first `within` bytes."""
    for _ in range(draw(st.integers(1, 3))):
        end = min(len(raw), within or len(raw))
        at = draw(st.integers(0, max(0, end - 1)))
        size = draw(st.sampled_from([1, 2, 8, 100, 10**9]))
        new = draw(st.sampled_from([b"", b"\x00", b"\xff" * 8, b'"', b"{", b"[" * 2000, b"\n", raw[at : at + 50] * 2]))
        raw = raw[:at] + new + raw[at + size :]
    return raw


def rewrite(folder: Path, name: str, data: st.DataObject) -> None:
    """Change a file of the folder: as JSON, where it is and the draw wants it, or by bytes."""
    path = folder / name
    raw = path.read_bytes()
    if name.endswith(".safetensors"):
        length = int.from_bytes(raw[:8], "little")
        if data.draw(st.booleans()):
            text = json.dumps(data.draw(changed_json(json.loads(raw[8 : 8 + length])))).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
        else:
            path.write_bytes(data.draw(changed_bytes(raw, 8 + length)))
    elif name.endswith(".json") and data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(changed_json(json.loads(raw)))))
    else:
        path.write_bytes(data.draw(changed_bytes(raw)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return make_adapter(
        tmp_path_factory.mktemp("fuzz") / "a", rank_pattern={"k_proj": 4}, alpha_pattern={"v_proj": 1.5}
    )


@few(60)
@given(data=st.data())
def test_the_bytes_of_a_safetensors_file(adapter, data):
    with TemporaryDirectory() as tmp:
        shutil.copytree(adapter, tmp, dirs_exist_ok=True)
        rewrite(Path(tmp), "adapter_model.safetensors", data)
        try:
            file = SafetensorsFile(Path(tmp) / "adapter_model.safetensors")
        except UserError:
            return
        for name, entry in file.entries.items():
            assert tuple(file.tensor(name).shape) == entry.shape


@few(60)
@given(data=st.data())
def test_an_adapters_files(adapter, data):
    with TemporaryDirectory() as tmp:
        folder = Path(shutil.copytree(adapter, Path(tmp) / "a"))
        rewrite(folder, data.draw(st.sampled_from(["adapter_config.json"] * 3 + ["adapter_model.safetensors"])), data)
        try:
            found = read_adapter(folder)
            assert all(w.a.shape[0] == w.rank and abs(w.scale) < 1e9 for w in found.modules.values())
            assert len(adapter_sha256(folder)) == 64
        except UserError:
            return


@few(40)
@given(data=st.data())
def test_an_index(tiny_base, data):
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        names = list(SafetensorsFile(tiny_base / WEIGHTS).entries)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "1.safetensors")}))
        shutil.copyfile(tiny_base / WEIGHTS, folder / "1.safetensors")
        rewrite(folder, INDEX, data)
        try:
            assert list(open_shards(folder)) == ["1.safetensors"]
        except UserError:
            return


MERGED = ["config.json", "config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", WEIGHTS]


@few(25)
@given(data=st.data())
def test_what_is_merged(tiny_base, adapter, data):
    """A file of the base or of the adapter is changed; what is merged is a model again."""
    with TemporaryDirectory() as tmp:
        base = Path(shutil.copytree(tiny_base, Path(tmp) / "base"))
        part = Path(shutil.copytree(adapter, Path(tmp) / "a"))
        name = data.draw(st.sampled_from([*MERGED, "adapter_config.json", "adapter_model.safetensors"]))
        rewrite(part if name.startswith("adapter") else base, name, data)
        try:
            merge(base, [read_adapter(part)], Path(tmp) / "out", onto=data.draw(st.sampled_from(["base", "nf4"])))
        except UserError:
            assert not (Path(tmp) / "out").exists()
            return
        assert open_shards(Path(tmp) / "out")
        assert load_tokenizer(Path(tmp) / "out")


@few(15)
@given(data=st.data())
def test_a_base(tiny_base, data):
    """What is loaded has finite logits or, where a changed weight is not finite, at least the shapes it says."""
    with TemporaryDirectory() as tmp:
        base = Path(shutil.copytree(tiny_base, Path(tmp) / "base"))
        rewrite(base, data.draw(st.sampled_from(["config.json"] * 3 + ["generation_config.json", WEIGHTS])), data)
        try:
            found = load_base(RunConfig(model_name_or_path=str(base), load_in_4bit=False), say=lambda line: None)
        except UserError:
            return
        with torch.no_grad():
            ids = torch.tensor([[1, 5, 9]])
            assert found.model(ids).logits.shape == (1, 3, found.model.config.vocab_size)


@pytest.fixture(scope="module")
def nf4_base(tiny_base, tmp_path_factory) -> Path:
    """The tiny base as bitsandbytes stores it in NF4, with double quantization."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEPHYR_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        load_base(RunConfig(model_name_or_path=str(tiny_base)), say=lambda line: None)
        (kept,) = kept_bases()
    folder = Path(shutil.copytree(kept, tmp_path_factory.mktemp("nf4") / "base"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, folder / name)
    return folder


@few(20)
@given(data=st.data())
def test_a_base_in_nf4(nf4_base, adapter, data):
    """Its settings, its header, or the bytes of a part of a weight; loaded, or merged onto."""
    with TemporaryDirectory() as tmp:
        base = Path(shutil.copytree(nf4_base, Path(tmp) / "base"))
        if data.draw(st.booleans()):
            rewrite(base, data.draw(st.sampled_from(["config.json", WEIGHTS])), data)
        else:
            parts = [
                e for e in SafetensorsFile(base / WEIGHTS).entries.values() if "quant" in e.name or "absmax" in e.name
            ]
            entry, raw = data.draw(st.sampled_from(parts)), (base / WEIGHTS).read_bytes()
            new = data.draw(st.binary(min_size=1, max_size=40))[: entry.nbytes]
            at = data.draw(st.integers(entry.start, entry.end - len(new)))
            (base / WEIGHTS).write_bytes(raw[:at] + new + raw[at + len(new) :])
        try:
            if data.draw(st.booleans()):
                merge(base, [read_adapter(adapter)], Path(tmp) / "out", onto="nf4")
                assert open_shards(Path(tmp) / "out")
            else:
                found = load_base(RunConfig(model_name_or_path=str(base)), say=lambda line: None)
                with torch.no_grad():
                    assert found.model(torch.tensor([[1, 5, 9]])).logits.shape[1] == 3
        except UserError:
            assert not (Path(tmp) / "out").exists()


@few(30)
@given(data=st.data())
def test_a_tokenizers_files(tiny_base, data):
    with TemporaryDirectory() as tmp:
        folder = Path(tmp)
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copyfile(tiny_base / name, folder / name)
        rewrite(folder, data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"])), data)
        try:
            tokenizer = load_tokenizer(folder)
            check_vocabulary(tokenizer, 448, folder)
            ids, mask = resolve_template("zephyr", tokenizer).encode(
                [{"role": "user", "content": "Hello é 1"}, {"role": "assistant", "content": "there"}]
            )
        except (UserError, RowError):
            return
        assert len(ids) == len(mask) and ids.max() < 448 and mask.any()
