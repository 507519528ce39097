"""A multimodal checkpoint is trained, merged and read as its text model alone."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

from tests.conftest import SIZES, make_tokenizer
from tests.contract.test_gguf import off
from tests.numeric import apart
from tests.train.test_train import LN2, dpo_words, metrics, words
from zephyr_lite.chat import load_chat
from zephyr_lite.config.load import load_config
from zephyr_lite.io.safetensors import SafetensorsFile
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.base_folder import check_weights, fingerprint, read_model_config
from zephyr_lite.model.files import open_shards
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

TEXT = {**SIZES, "head_dim": 32}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def mistral3():
    """A text model with a head of its own."""
    vision = PixtralVisionConfig(**VISION, head_dim=16)
    config = Mistral3Config(text_config=Ministral3Config(**TEXT), vision_config=vision, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def gemma3():
    """A tied one."""
    text, vision = Gemma3TextConfig(**TEXT, sliding_window=9), SiglipVisionConfig(**VISION)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


MODELS = {"mistral3": mistral3, "gemma3": gemma3}


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """In several files, of which some hold no tensor of the text model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.08)
    model.save_pretrained(folder, max_shard_size="100KB")
    make_tokenizer(folder)
    return folder


def test_its_files_are_those_of_the_text_model(base):
    config = read_model_config(base)
    check_weights(base, config)
    shards = open_shards(base)
    names = {name for file in shards.values() for name in file.entries}
    assert "model.layers.1.self_attn.q_proj.weight" in names and not any("vision" in name for name in names)
    assert all(
        file.tensor(name).shape == entry.shape for file in shards.values() for name, entry in file.entries.items()
    )
    assert ("lm_head.weight" in names) != config.tie_word_embeddings
    assert len(fingerprint(base)) == 64


def test_it_trains_merges_and_gives_the_live_logits(base, chat_rows, pair_rows, tmp_path):
    small = {"load_in_4bit": "false", "max_steps": 2, "learning_rate": 0.02}
    run_sft(load_config("sft", None, words(base, tmp_path / "a", chat_rows, **small)))
    run_dpo(load_config("dpo", None, dpo_words(base, tmp_path / "a", pair_rows, **small)))
    assert abs(metrics(tmp_path / "a" / "dpo")[0] - LN2) < 1e-6
    chain = chain_of_run(tmp_path / "a")
    out = tmp_path / "merged"
    merge(base, chain.adapters, out, tokenizer_from=chain.tokenizer_from)
    told = json.loads((out / "config.json").read_text())
    assert told["architectures"][0].endswith("ForCausalLM") and "vision_config" not in told
    held = {name for path in out.glob("*.safetensors") for name in SafetensorsFile(path).entries}
    assert {name.split(".")[0] for name in held} <= {"model", "lm_head"}
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    chat = load_chat(tmp_path / "a")
    with torch.no_grad(), chat.stack.only(["sft", "dpo"]):
        assert off(plain, chat.stack.model) < 1e-5
    # a second run on the merged folder, whose modules have the same names
    run_sft(load_config("sft", None, words(out, tmp_path / "b", chat_rows, **small)))


def test_an_adapter_that_was_trained_on_the_whole_model(base, tmp_path):
    whole = AutoModelForImageTextToText.from_pretrained(base)
    targets = r".*language_model.*\.(q_proj|down_proj)"
    model = get_peft_model(whole, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    merge(base, [read_adapter(tmp_path / "adapter")], tmp_path / "merged")
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), torch.arange(3, 40)[None]
    with torch.no_grad():
        assert apart(plain(ids).logits, model(input_ids=ids).logits) < 1e-5


def test_it_trains_in_4_bits(base, chat_rows, tmp_path):
    run_sft(load_config("sft", None, words(base, tmp_path / "a", chat_rows, max_steps=2)))
    assert len(metrics(tmp_path / "a" / "sft")) == 2
