"""Model folders and adapters beyond the table of malformed ones (``tests/malformed_model``): refused, or still loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_model
from tests.contract.test_safety import edit, loaded
from tests.malformed_weights import MODULE, make_adapter
from zephyr_lite.errors import UserError
from zephyr_lite.merge import merge
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.base_folder import read_model_config
from zephyr_lite.model.files import SINGLE, fetch_base, named_folder
from zephyr_lite.model.peft_io import fetch_adapter, read_adapter
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


@pytest.mark.parametrize(
    "name", ["~nobody-at-all/x", "x" * 5000, "a\0b/c", "a b/c", "/no/such", "a/b/c", "\n", "nobody/nothing-to-find"]
)
def test_names_that_are_none(name):
    for find in (fetch_base, fetch_adapter):
        with pytest.raises(UserError) as caught:
            find(name)
        assert caught.value.message.isprintable() and len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"experts_implementation": {"": "o/n"}}, "no code of a model is run"),
        ({"model_type": 7}, "has no model_type"),
        ({"model_type": "a\nb"}, "not a configuration that transformers reads"),
        ({"layer_types": 3}, r"config\.json: "),
    ],
)
def test_configurations_that_are_refused(base, keys, said):
    edit(base / "config.json", **keys)
    with pytest.raises(UserError, match=said) as caught:
        read_model_config(base)
    assert str(base) in caught.value.message and caught.value.message.isprintable()


def test_the_older_name_of_longrope_is_explained(base):
    edit(base / "config.json", model_type="phi3", rope_parameters=None, rope_scaling={"type": "su", "short_factor": []})
    with pytest.raises(UserError) as caught:
        read_model_config(base)
    assert caught.value.hint.startswith('Write "longrope" instead of "su"')


def test_a_hub_id_may_end_as_a_file_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_folder("model", "owner/model.gguf") is None
    Path("owner").mkdir()
    Path("owner/model.gguf").touch()
    with pytest.raises(UserError, match="there is no such folder"):
        named_folder("model", "owner/model.gguf")


def test_an_adapter_of_another_base_is_not_attached(tmp_path):
    folder = make_adapter(tmp_path / "a", shape=(64, 32))
    with pytest.raises(
        UserError, match=rf"{MODULE} is for a weight \[64, 32\] of its base; in this base the weight there is"
    ):
        AdapterStack(make_model()).add_frozen("a", read_adapter(folder))


@pytest.mark.parametrize("target", [".*q_proj", "q_proj\n", "lm_head", "layers.7.mlp.up_proj"])
def test_targets_are_names_of_projections_that_the_base_has(target):
    with pytest.raises(UserError, match="lora_target_modules"):
        AdapterStack(make_model()).add_trainable("a", r=2, alpha=2, targets=["q_proj", target], seed=0)


def test_a_tokenizer_that_is_cut_short_is_refused(base):
    (base / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=f"{base}: no tokenizer can be built from it"):
        load_tokenizer(base)


def test_a_vocabulary_that_does_not_fit_is_refused(base):
    tokenizer = load_tokenizer(base)
    check_vocabulary(tokenizer, 420, base)
    with pytest.raises(UserError, match="embeddings for 400 tokens"):
        check_vocabulary(tokenizer, 400, base)
    tokenizer.add_tokens([f"<extra{n}>" for n in range(40)])
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"<extra28> \(id 448\), .* and 9 more, and the model has embeddings for 448"):
        loaded(base)
