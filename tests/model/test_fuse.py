"""``fuse`` refuses what it would compute wrongly."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import make_model
from tests.contract.test_fuse import IDS, LORA, fuse, peft_model
from zephyr_lite.errors import UserError


def test_another_family_is_refused():
    with pytest.raises(UserError, match="gpt2"):
        fuse(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32)))


def _layers(model):
    return model.get_base_model().model.layers


def _int8(model):
    linear = type("Linear8bitLt", (torch.nn.Linear,), {})(64, 128, bias=False)
    _layers(model)[0].mlp.up_proj.base_layer = linear.requires_grad_(False)


def _dropouts(model):
    model.train()
    next(m for m in model.modules() if isinstance(m, LoraLayer)).lora_dropout["default"].p = 0.2


def _merged(model):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


HOLES = torch.tensor([[1] * 4 + [0, 0] + [1] * 6] * 3)
IA3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[])


@pytest.mark.parametrize(
    ("make", "change", "inputs", "match"),
    [
        (lambda: get_peft_model(make_model(), LoraConfig(**LORA, use_dora=True)), None, {}, "variant"),
        (lambda: get_peft_model(make_model(), IA3), None, {}, "ia3"),
        (peft_model, lambda m: _layers(m)[1].mlp.up_proj.get_base_layer().requires_grad_(True), {}, "layer 1"),
        (lambda: peft_model(dropout=0.1), _dropouts, {}, "0.1, 0.2"),
        (peft_model, _int8, {}, "Linear8bitLt"),
        (peft_model, lambda m: _layers(m)[1].mlp.register_forward_hook(lambda *a: None), {}, "layers.1.mlp"),
        (peft_model, _merged, {}, "merged"),
        (peft_model, lambda m: m.eval(), {"adapter_names": ["default", "__base__", "default"]}, "adapter_names"),
        (lambda: peft_model(sliding_window=4), None, {"attention_mask": HOLES}, "holes"),
        (peft_model, None, {"attention_mask": torch.ones(3, 1, 12, 12)}, r"\[3, 1, 12, 12\] for tokens of \[3, 12\]"),
        (peft_model, None, {"attention_mask": torch.ones(3, 11)}, r"\[3, 11\] for tokens of \[3, 12\]"),
    ],
    ids=["dora", "ia3", "full", "dropouts", "int8", "hook", "merged", "names", "holes", "mask", "short"],
)
def test_what_it_would_compute_wrongly_is_refused(make, change, inputs, match):
    model = make()
    if change is not None:
        change(model)
    with pytest.raises(UserError, match=match):
        fuse(model)(input_ids=IDS, use_cache=False, **inputs)
