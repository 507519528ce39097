"""Adapter files: what PEFT writes is read, what is written PEFT loads, and a composed chain is the chain."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from zephyr_lite.errors import UserError
from zephyr_lite.model.compose import compose
from zephyr_lite.model.peft_io import (
    LoraWeights,
    adapter_sha256,
    fetch_adapter,
    read_adapter,
    write_adapter,
)

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) % 100 + 3


def base_model() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return MistralForCausalLM(config).eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Give every LoRA matrix a value: PEFT starts B at zero, and a test on zeros passes whatever the code does."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def make_adapter(folder: Path, seed: int, **config: Any) -> Path:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(base_model(), peft.LoraConfig(**settings))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def live(*folders: Path) -> torch.Tensor:
    """Logits of the bare base with all of these adapters on at once, by PEFT."""
    model = peft.PeftModel.from_pretrained(base_model(), folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    model.base_model.set_adapter([f"a{i}" for i in range(len(folders))])
    return logits(model.eval())


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "r": 6},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.0.mlp.up_proj": 5}},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": [*ALL, "lm_head"]},
    ],
    ids=["plain", "rslora", "patterns", "rslora-patterns", "one-layer", "lm_head"],
)
def test_what_peft_wrote_is_read_and_written_back(tmp_path: Path, config: dict[str, Any]) -> None:
    source = make_adapter(tmp_path / "source", 1, **config)
    adapter = read_adapter(source)
    write_adapter(tmp_path / "copy", adapter.modules, base_model_name="tiny")
    assert isinstance(json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["target_modules"], list)
    want = live(source)
    assert distance(want, logits(base_model())) > 1e-2
    assert distance(live(tmp_path / "copy"), want) < 1e-6

    merged = base_model()
    for module, weights in adapter.modules.items():
        merged.get_submodule(module).weight.data += weights.scale * weights.b @ weights.a
    assert distance(logits(merged), want) < 1e-5


def test_composed_chain_is_the_live_stack(tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "first", 1, r=4, lora_alpha=8)
    second = make_adapter(
        tmp_path / "second", 2, r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj", "lm_head"]
    )
    composed = compose([read_adapter(first), read_adapter(second)])
    weights = composed["model.layers.0.self_attn.q_proj"]
    assert weights.a.dtype == weights.b.dtype == torch.float32
    assert (weights.rank, composed["model.layers.0.self_attn.k_proj"].rank, composed["lm_head"].rank) == (12, 4, 8)
    write_adapter(tmp_path / "chain", composed, base_model_name="tiny")
    want = live(first, second)
    assert distance(live(first), want) > 1e-2
    assert distance(live(tmp_path / "chain"), want) < 1e-5


def test_hash_follows_the_content(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", 1)
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
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa"),
        ({"r": 5}, "of rank 5"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = make_adapter(tmp_path / "a", 1)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        read_adapter(folder)


def break_weights(folder: Path, how: str) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    a = next(name for name in tensors if "lora_A" in name)
    if how == "half":
        del tensors[a]
    elif how == "rank 0":
        for name in tensors:
            tensors[name] = tensors[name][:0] if "lora_A" in name else tensors[name][:, :0]
    elif how == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 8)
    elif how == "flat":
        tensors[a] = tensors[a].flatten()
    elif how == "empty":
        tensors = {}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("half", r"has lora_A \[\]"),
        ("rank 0", r"has lora_A \[0, "),
        ("embedding", "no LoRA matrix of a linear layer"),
        ("flat", r"has lora_A \[384\]"),
        ("empty", "no LoRA weights"),
    ],
)
def test_weights_that_are_refused(tmp_path: Path, how: str, said: str) -> None:
    folder = make_adapter(tmp_path / "a", 1)
    break_weights(folder, how)
    with pytest.raises(UserError, match=said) as caught:
        read_adapter(folder)
    assert str(folder) in caught.value.message
    assert caught.value.hint


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    class Fails(dict[str, LoraWeights]):
        reads = 0

        def __getitem__(self, key: str) -> LoraWeights:
            self.reads += 1
            if self.reads > 5:
                raise KeyboardInterrupt
            return super().__getitem__(key)

    modules = Fails(
        {f"model.layers.{i}.q_proj": LoraWeights(torch.ones(2, 4), torch.ones(4, 2), 1.0) for i in range(4)}
    )
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "out", modules, base_model_name="tiny")
    assert list(tmp_path.iterdir()) == []


def test_fetch_finds_folders_and_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_adapter(tmp_path / "a", 1)
    assert fetch_adapter(str(folder)) == folder
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        fetch_adapter(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="nobody/nothing"):
        fetch_adapter("nobody/nothing-to-find")
