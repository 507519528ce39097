"""The benches run, and count what they should. What they measure here means nothing."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from bench import mistral, rows
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.model.base import load_tokenizer
from zephyr_lite.train.steps import rows_of_step

CPU = torch.device("cpu")


# -- the random Mistral, and rows of real lengths ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_base(tmp_path_factory) -> Path:
    folder, built = mistral.ensure_base(tmp_path_factory.mktemp("mistral") / "base", mistral.TINY, CPU, torch.float32)
    assert built
    return folder


def test_the_random_mistral_is_what_transformers_quantizes_and_saves(random_base, tmp_path):
    plain = MistralForCausalLM(MistralConfig(**mistral.TINY))
    weights = {n: mistral.random_weight(n, s, CPU, torch.float32) for n, s in mistral.matrices(mistral.TINY)}
    plain.load_state_dict(weights)
    plain.save_pretrained(tmp_path / "plain")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=nf4, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "saved")
    wanted, found = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (tmp_path / "saved", random_base)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    quantized = 0
    for name, weight in AutoModelForCausalLM.from_pretrained(random_base).named_parameters():
        if hasattr(weight, "quant_state"):
            packed, state = bnb.quantize_4bit(weights[name], quant_type="nf4", compress_statistics=True)
            assert torch.equal(
                bnb.dequantize_4bit(weight.data, weight.quant_state), bnb.dequantize_4bit(packed, state)
            ), name
            quantized += 1
        else:
            assert torch.equal(weight, weights[name]), name
    assert quantized == 2 * 7


def test_rows_have_the_lengths_of_the_real_ones(random_base, tmp_path):
    template = resolve_template("auto", load_tokenizer(random_base))
    count = rows.write_conversations(tmp_path / "sft.jsonl", template, 8000)
    rows.write_pairs(tmp_path / "dpo.jsonl", template, 20)
    whole = RunConfig(max_length=10**6, max_prompt_length=10**6)
    chats = prepare([DatasetSpec(path=str(tmp_path / "sft.jsonl"))], "sft", whole, template)
    shortest = 39 + 1  # the template's own and one letter, where a real tokenizer needs fewer
    real = rows.lengths("sft_conversations")[:count]
    plain = [i for i, runs in enumerate(real) if runs[0] >= shortest and all(n >= 27 for n in runs[2::2])]
    assert len(plain) > count / 2
    for i in plain:
        assert chats.lengths[i] == sum(real[i]) + 1  # and the template's last newline
        assert chats.examples[i].mask.sum() == sum(real[i][1::2])
    pairs = prepare([DatasetSpec(path=str(tmp_path / "dpo.jsonl"))], "dpo", whole, template)
    for example, (prompt, chosen, rejected) in zip(pairs.examples, rows.lengths("dpo_pairs"), strict=False):
        assert len(example.prompt_ids) == max(prompt, shortest - 1 + 1)
        assert (len(example.chosen_ids), len(example.rejected_ids)) == (max(3, chosen), max(3, rejected))

    recipe = RunConfig(max_length=1024, max_prompt_length=512)
    pairs = prepare([DatasetSpec(path=str(tmp_path / "dpo.jsonl"))], "dpo", recipe, template)
    sizes = [len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in pairs.examples]
    expected = rows.pair_sizes(20, 1024, 512)
    assert all(abs(a - b) <= 3 for a, b in zip(sizes, expected, strict=True))
    seed = rows.seed_with_longest_first(expected, 4)
    first = rows_of_step(RunConfig(batch_size=4, seed=seed), 20, 0)
    assert max(sizes) in [sizes[i] for i in first]


# -- bench.gpu -------------------------------------------------------------------------------------------------------

SMALL = ["--tiny", "--rounds", "1", "--per-device", "1", "2", "--sft-rows", "2", "--dpo-pairs", "2"]
