"""Adapter files: what PEFT writes is read, what is written PEFT loads, and a composed chain is the chain."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.contract.test_merged import ALL, distance, live, load, logits, make_adapter, make_base
from zephyr_lite.errors import UserError
from zephyr_lite.model.peft_io import LoraWeights, adapter_sha256, read_adapter, write_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 5}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": [*ALL, "lm_head"]},
    ],
    ids=["rslora-patterns", "one-layer", "lm_head"],
)
def test_what_peft_wrote_is_read_and_written_back(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    source = make_adapter(base, tmp_path / "source", 1, **config)
    write_adapter(tmp_path / "copy", read_adapter(source).modules, base_model_name="tiny")
    assert isinstance(json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["target_modules"], list)
    want = live(load(base), [source])
    assert distance(want, logits(load(base))) > 1e-2
    assert distance(live(load(base), [tmp_path / "copy"]), want) < 1e-6


def test_hash_follows_the_content(base: Path, tmp_path: Path) -> None:
    folder = make_adapter(base, tmp_path / "a", 1)
    want = adapter_sha256(folder)
    assert read_adapter(folder).sha256 == want
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    save_file(dict(reversed(tensors.items())), weights, metadata={"format": "pt", "note": "another header"})
    config.write_text(json.dumps({**settings, "base_model_name_or_path": "elsewhere", "lora_dropout": 0.3}))
    assert adapter_sha256(folder) == want
    config.write_text(json.dumps({**settings, "lora_alpha": 9}))
    assert adapter_sha256(folder) != want
    config.write_text(json.dumps(settings))
    name = sorted(tensors)[0]
    tensors[name][0, 0] += 1
    save_file(tensors, weights)
    assert adapter_sha256(folder) != want


@pytest.mark.parametrize(
    ("key", "value"), [("peft_type", "IA3"), ("init_lora_weights", "pissa_niter_16"), ("rank_pattern", 3)]
)
def test_configurations_that_are_refused(base: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = make_adapter(base, tmp_path / "a", 1)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(UserError, match=f"{key} is") as caught:
        read_adapter(folder)
    assert str(folder) in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors, a: tensors.pop(a), r"has lora_A \[0\]"),
        (lambda tensors, a: tensors.update({a: tensors[a].flatten()}), r"has lora_A \[512\]"),
        (
            lambda tensors, a: tensors.update({"embed_tokens.lora_embedding_A": torch.zeros(4, 8)}),
            "no LoRA matrix of a linear",
        ),
        (lambda tensors, a: tensors.clear(), "no LoRA weights"),
    ],
    ids=["half", "flat", "embedding", "empty"],
)
def test_weights_that_are_refused(base: Path, tmp_path: Path, change: Any, said: str) -> None:
    weights = make_adapter(base, tmp_path / "a", 1) / "adapter_model.safetensors"
    tensors = load_file(weights)
    change(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, weights)
    with pytest.raises(UserError, match=said) as caught:
        read_adapter(weights.parent)
    assert str(weights) in caught.value.message and caught.value.hint


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    class Fails(dict[str, LoraWeights]):
        reads = 0

        def __getitem__(self, key: str) -> LoraWeights:
            self.reads += 1
            if self.reads > 5:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    weights = LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    modules = Fails({f"model.layers.{i}.q_proj": weights for i in range(4)})
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "out", modules, base_model_name="tiny")
    assert list(tmp_path.iterdir()) == []
