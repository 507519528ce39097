"""Adapters' files of other tools: how one was written -> what it computes, or the message."""

import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.contract.test_folders import base_folder
from zephyr_lite.errors import UserError
from zephyr_lite.merge import merge
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model.loaded import open_live
from zephyr_lite.model.peft_io import read_adapter

IDS = torch.arange(24).view(2, 12) + 5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base") / "b")


def make_adapter(base, folder, **config):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


def rename(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def add(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **{f"base_model.model.{name}": t for name, t in tensors.items()}}, path)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def by_peft(base, folder):
    return logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval())


REGEX = r".*layers\.\d+\.(?:self_attn\.(q|k)_proj|mlp\.up_proj)$"


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": REGEX},
        {"target_modules": REGEX, "rank_pattern": {r"layers\.0\..*_proj": 2, r"layers\.1\..*k_proj": 8}},
        {"alpha_pattern": {r"model\.layers\.(0|7)\.mlp\..*": 3, "q_proj|k_proj": 5}, "use_rslora": True},
        {"exclude_modules": r".*layers\.0\..*"},
    ],
    ids=["targets", "ranks", "alphas", "excluded"],
)
def test_regular_expressions_are_what_peft_makes_of_them(base, tmp_path, config):
    folder = make_adapter(base, tmp_path / "a", **config)
    wanted = by_peft(base, folder)
    merge(base, [read_adapter(folder)], tmp_path / "m")
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda name: "_orig_mod." + name,
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.", 1),
        lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda name: "base_model.model." + name,
        lambda name: "module." + name,
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.removeprefix("base_model.model."),
    ],
    ids=["compiled", "compiled-inside", "checkpointed", "fsdp", "twice", "ddp", "default", "no-prefix"],
)
def test_names_that_launchers_leave_are_read(base, tmp_path, change):
    wanted = read_adapter(make_adapter(base, tmp_path / "plain"))
    rename(make_adapter(base, tmp_path / "a"), change)
    found = read_adapter(tmp_path / "a")
    assert set(found.modules) == set(wanted.modules)
    for name, weights in wanted.modules.items():
        assert torch.equal(found.modules[name].a, weights.a) and torch.equal(found.modules[name].b, weights.b)
        assert found.modules[name].scale == weights.scale


def test_two_adapters_in_a_file_are_refused(base, tmp_path):
    folder = make_adapter(base, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, **{n.replace(".weight", ".reference.weight"): t.clone() for n, t in tensors.items()}}, path)
    with pytest.raises(UserError, match="holds two adapters"):
        read_adapter(folder)


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({EMBED: lambda t: t, HEAD: lambda t: t}, None),
        ({EMBED: lambda t: t.bfloat16()}, None),
        ({EMBED: lambda t: t + 1e-3}, r"a whole model\.embed_tokens\.weight \[448, 64\]"),
        ({HEAD: lambda t: torch.cat([t, t[:2]])}, r"a whole lm_head\.weight \[450, 64\]"),
        ({"model.score.weight": lambda t: torch.ones(2, 64)}, "the base has none"),
    ],
    ids=["equal", "rounded", "trained", "resized", "unknown"],
)
def test_whole_parameters_beside_the_lora(base, tmp_path, saved, message):
    folder = make_adapter(base, tmp_path / "a")
    wanted = by_peft(base, folder)
    own = load_file(base / "model.safetensors")
    add(folder, **{name: change(own.get(name)) for name, change in saved.items()})
    given = {"adapters": [str(folder)], "base": str(base)}
    ways = [
        lambda: open_live(**given),
        lambda: run_merge(tmp_path / "m", **given, check=False),
        lambda: run_merge(tmp_path / "n", **given, as_adapter=True),
    ]
    for way in ways:
        if message is None:
            way()
        else:
            with pytest.raises(UserError, match=message) as caught:
                way()
            assert "Merge it with PEFT" in caught.value.hint
    assert (tmp_path / "m").exists() == (tmp_path / "n").exists() == (message is None)
    if message is None:
        assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")) - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "lora_only"}],
    ids=["dora", "whole", "bias"],
)
def test_what_cannot_be_stacked_is_refused_with_a_cure_that_works(base, tmp_path, monkeypatch, config):
    folder = make_adapter(base, tmp_path / "a", **config)
    with pytest.raises(UserError, match=r"cannot be stacked here|carries biases") as caught:
        read_adapter(folder)
    code = caught.value.hint.partition('python -c "')[2].removesuffix('"')
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    wanted = by_peft(base, folder)
    live = open_live(tmp_path / "MERGED")
    assert (logits(live.base.model) - wanted).norm() / wanted.norm() < 1e-5
