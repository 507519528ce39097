"""Claim 3: the decoder equals the Hugging Face model with the same adapters, for every variant of the families."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.conftest import make_model
from tests.numeric import (
    apart,
    assert_same,
    conversation,
    hugging_face_logps,
    live_stack,
    loss_and_gradients,
    pair,
)
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout


@pytest.fixture(params=["mistral", "llama"])
def model(request):
    return make_model(request.param)


def test_equals_the_hugging_face_model_with_the_stack(model):
    """The PEFT model's own forward with both adapters on gives the same log-probabilities and gradients."""
    decoder = Decoder(live_stack(model), torch.float32)
    example = conversation(0, 33)
    targets = np.flatnonzero(example.mask[1:]) + 1
    logps, grads = loss_and_gradients(decoder, collate_conversations([example]))
    want = hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])
    assert apart(logps, want.detach()) < 1e-5
    for p in decoder.stack.parameters().values():
        p.grad = None
    with torch.enable_grad():
        decoder.stack.model.base_model.set_adapter(["sft", "dpo"])
        hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"]).sum().backward()
    assert_same({n: p.grad for n, p in decoder.stack.parameters().items()}, grads)


@pytest.mark.parametrize("change", ["rope", "bias", "tied", "head_dim"])
def test_variants_of_the_families(change):
    changes = {
        "rope": {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "bias": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "head_dim": {"head_dim": 24},
    }[change]
    decoder = Decoder(live_stack(make_model("llama", **changes)), torch.float32)
    example = conversation(0, 25)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_sliding_window_equals_the_hugging_face_model():
    decoder = Decoder(live_stack(make_model(sliding_window=7)), torch.float32)
    example = conversation(0, 40)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5
        wide = Decoder(live_stack(make_model()), torch.float32).token_logps(collate_conversations([example]))
    assert apart(logps, wide) > 1e-3  # the window mattered


def test_a_llama_has_no_sliding_window():
    """Whatever its configuration says: the Hugging Face model ignores the key."""
    decoder = Decoder(live_stack(make_model("llama")), torch.float32)
    decoder.stack.base.config.sliding_window = 3
    example = conversation(0, 25)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_dropout_changes_the_loss_and_is_repeatable():
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_conversations([conversation(0, 20)])
    with torch.no_grad():
        plain = decoder.token_logps(batch)
        a, b, c = (decoder.token_logps(batch, dropout=Dropout(0.2, 1, step)) for step in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, plain)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keep_input_equals_keep_all(p):
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_pairs([pair(0, 9, 6, 4)])
    everything = loss_and_gradients(decoder, batch, keep="all", dropout=Dropout(p, 1, 1))
    recomputed = loss_and_gradients(decoder, batch, keep="input", dropout=Dropout(p, 1, 1))
    assert torch.equal(everything[0], recomputed[0])
    assert_same(recomputed[1], everything[1], 1e-7)


@pytest.mark.parametrize("names", [[], ["sft"], ["dpo"], ["sft", "dpo"]])
def test_only_these_adapters_are_on(names):
    """Generation with some of the adapters is the decoder with those, and differs from all other choices."""
    stack = live_stack(make_model())
    example = conversation(0, 20)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        for choice in ([], ["sft"], ["dpo"], ["sft", "dpo"]):
            ours = Decoder(stack, torch.float32, choice).token_logps(collate_conversations([example]))
            difference = apart(ours, hugging_face_logps(stack, example.ids, targets, names))
            assert difference < 1e-5 if choice == names else difference > 1e-3
    assert {n.split(".")[-2] for n, p in stack.model.named_parameters() if p.requires_grad} == {"dpo"}


def test_nf4_base_equals_the_bitsandbytes_forward(tiny_base):
    """Through the real 4-bit storage, nested scales included, and again after generation touched the modules."""
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    assert base.load_in_4bit and base.dtype == torch.float32
    stack = live_stack(base.model)
    decoder = Decoder(stack, base.dtype)
    assert sum(isinstance(m, LoraLayer) for m in stack.base.modules()) == 14
    example = conversation(0, 30)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        before = decoder.token_logps(collate_conversations([example]))
        want = hugging_face_logps(stack, example.ids, targets, ["sft", "dpo"])
        after = decoder.token_logps(collate_conversations([example]))
    assert apart(before, want) < 1e-5
    assert torch.equal(before, after)  # nothing was repacked in place
