"""The random Mistral of the benches is what transformers quantizes and saves."""

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from bench import mistral

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def random_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistral") / "base"
    assert mistral.ensure_base(folder, mistral.TINY, CPU, torch.float32)
    assert not mistral.ensure_base(folder, mistral.TINY, CPU, torch.float32)
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
