"""``fuse`` refuses what it would compute wrongly."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_model
from tests.contract.test_fuse import IDS, LORA, fuse, peft_model, quantized
from zephyr_lite.errors import UserError


def test_another_family_and_fusing_twice_are_refused():
    with pytest.raises(UserError, match="gpt2"):
        fuse(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32)))
    with pytest.raises(UserError, match="already"):
        fuse(fuse(peft_model()))


@pytest.mark.parametrize(
    "what",
    ["dora", "bias", "full", "mask", "dropouts", "holes", "int8", "ia3", "hook", "names", "merged", "short"],
)
def test_what_it_would_compute_wrongly_is_refused(what):
    inputs = {"input_ids": IDS, "use_cache": False}
    if what == "dora":
        model = get_peft_model(make_model(), LoraConfig(**LORA, use_dora=True))
    elif what == "bias":
        model = get_peft_model(
            make_model("llama", attention_bias=True, mlp_bias=True), LoraConfig(**LORA, lora_bias=True)
        )
    else:
        model = peft_model(dropout=0.1 if what == "dropouts" else 0.0)
    if what == "full":
        model.get_base_model().model.layers[1].mlp.up_proj.get_base_layer().weight.requires_grad_(True)
    if what == "holes":
        model = peft_model(sliding_window=4)
        inputs["attention_mask"] = torch.tensor([[1] * 4 + [0, 0] + [1] * 6] * 3)
    if what == "int8":
        projection = model.get_base_model().model.layers[0].mlp.up_proj
        projection.base_layer = type("Linear8bitLt", (torch.nn.Linear,), {})(64, 128, bias=False).requires_grad_(False)
    if what == "ia3":
        targets = {"target_modules": ["k_proj"], "feedforward_modules": []}
        model = get_peft_model(make_model(), IA3Config(task_type="CAUSAL_LM", **targets))
    if what == "hook":
        model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *a: None)
    if what == "names":
        inputs["adapter_names"] = ["default", "__base__", "default"]
        model.eval()
    if what == "merged":
        model.merge_adapter()
        model.base_model.disable_adapter_layers()
    if what == "short":
        inputs["attention_mask"] = torch.ones(3, 11)
    if what == "mask":
        inputs["attention_mask"] = torch.ones(3, 1, 12, 12, dtype=torch.bool)
    if what == "dropouts":
        model.train()
        next(m for m in model.modules() if isinstance(m, LoraLayer)).lora_dropout["default"].p = 0.2
    match = {
        "dora": "variant",
        "bias": "variant",
        "full": "layer 1",
        "mask": r"\[3, 1, 12, 12\] for tokens",
        "dropouts": "0.1, 0.2",
        "holes": "holes",
        "int8": "Linear8bitLt",
        "ia3": "ia3",
        "hook": "layers.1.mlp",
        "names": "adapter_names",
        "merged": "merged",
        "short": r"\[3, 11\] for tokens of \[3, 12\]",
    }[what]
    with pytest.raises(UserError, match=match):
        fuse(model)(**inputs)


@pytest.mark.parametrize("change", [{"keep": "al"}, {"scratch": "big"}])
def test_arguments_are_checked(change):
    with pytest.raises(UserError, match="is None or one of input, attention, all; scratch is one of layer, small"):
        fuse(peft_model(), **change)


@pytest.mark.parametrize("what", ["word", "headless"])
def test_what_is_no_language_model_is_refused(what):
    with pytest.raises(UserError, match="causal language model"):
        fuse("model" if what == "word" else make_model().model)


def test_weights_that_bitsandbytes_repacked_are_refused(tiny_base):
    model = quantized(tiny_base)
    model.model.layers[
        0
    ].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True  # as its inference path leaves it
    with pytest.raises(UserError, match="repacked"):
        fuse(model)
