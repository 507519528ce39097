"""Model folders and adapters beyond those of tests/data/test_messages.py: refused, or still loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.contract.test_safety import loaded
from tests.malformed import make_adapter
from zephyr_lite.errors import UserError
from zephyr_lite.merge import merge
from zephyr_lite.model.base_folder import read_model_config
from zephyr_lite.model.files import SINGLE
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.model.tokenizer import check_vocabulary, load_tokenizer


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def in_cache(tiny_base: Path, root: Path) -> Path:
    """The base as the hub's cache keeps it: a snapshot of links to blobs."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / "1", root / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for place, path in enumerate(sorted(tiny_base.iterdir())):
        shutil.copyfile(path, blobs / str(place))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(place)))
    return snapshot


def test_weights_of_another_shape_are_found_before_transformers_loads_them(base, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: pytest.fail("they were loaded"))
    weights = load_file(base / SINGLE) | {"model.norm.weight": torch.zeros(63)}
    save_file(weights, base / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight, which is \[63\]; by config\.json it is \[64\]"):
        loaded(base)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_weight_that_no_file_holds_is_not_drawn_at_random(base, four_bit):
    weights = load_file(base / SINGLE)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, base / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight and 1 more in its files"):
        loaded(base, load_in_4bit=four_bit)


def test_links_of_the_hubs_cache_are_read_and_a_broken_one_is_named_with_its_blob(tiny_base, tmp_path):
    snapshot = in_cache(tiny_base, tmp_path)
    loaded(snapshot)
    merge(snapshot, [read_adapter(make_adapter(tmp_path / "a"))], tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").eos_token == "</s>"
    blob = (snapshot / "config.json").resolve()
    blob.write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        read_model_config(snapshot)
    assert str(snapshot / "config.json") in caught.value.hint and str(blob) in caught.value.hint


def test_a_vocabulary_that_does_not_fit_is_refused(base):
    tokenizer = load_tokenizer(base)
    check_vocabulary(tokenizer, 420, base)
    with pytest.raises(UserError, match="embeddings for 400 tokens"):
        check_vocabulary(tokenizer, 400, base)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"<extra28> \(id 448\), .* and 9 more, and the model has embeddings for 448"):
        loaded(base)
