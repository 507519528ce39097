"""The families whose layer has steps that Mistral's, Llama's and Qwen2's has not: each against the Hugging Face layer.

A family is a line of ``FAMILIES``: its model_type and a small configuration that has everything its layer may have.
"""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import SIZES, make_tokenizer, randomized
from tests.contract import test_trl_parity as trl_parity
from tests.contract.test_fuse import RIGHT, assert_same, both, peft_model
from tests.contract.test_layer import KEEPS, compare, gradients, oracle, sixteen_bits
from tests.contract.test_streaming import assert_bits, decoder_over, dpo_steps, plan_of, sft_steps
from tests.numeric import apart, conversation, hugging_face_logps, live_stack, loss_and_gradients, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.errors import UserError
from zephyr_lite.model.adapters import check_targets
from zephyr_lite.model.base import load_base
from zephyr_lite.model.base_folder import check_family, check_length, fingerprint
from zephyr_lite.model.decoder import Decoder, Dropout

SETTINGS = {
    **SIZES,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    # a window in the second layer, biases of the attention
    "qwen3": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "attention_bias": True},
    # positions from the pretraining's length on scale q; its frequencies scale cos and sin
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "llama_4_scaling_beta": 0.1,
        },
    },
    # 12 of 16 channels of a head are rotated
    "phi3": {
        "head_dim": 16,
        "sliding_window": 9,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0] * 6,
        },
    },
    # a layer that does not rotate and has a window
    "smollm3": {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 9, "mlp_bias": True},
    # a rotary table for each type of layer, a scale that is not the head's, a tied head
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    },
}


def tiny(name, seed=0, **changes):
    """Random weights and biases, as large as in the other tests."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**SETTINGS, **FAMILIES[name], **changes})
    return randomized(AutoModelForCausalLM.from_config(config), bias=0.3)


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_layer_equals_autograd_over_the_hugging_face_layer(name, keep, p):
    """In float64, and the log-probabilities of the Hugging Face model with it; a tile shorter than the batch with dropout."""
    decoder = Decoder(live_stack(tiny(name), torch.float64), torch.float64)
    decoder.tile = 10 if p else None
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-11)


def test_the_decoder_equals_the_hugging_face_model(name):
    """As transformers computes it, norms in float32."""
    decoder = Decoder(live_stack(tiny(name)), torch.float32)
    example = conversation(0, 40)
    targets = example.mask[1:].nonzero()[0] + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_16_bits_are_as_near_to_float64_as_the_hugging_face_model_in_16_bits(name):
    """In bfloat16: what a layer rounds, and where."""
    example = conversation(0, 33)
    batch = collate_conversations([example])
    want, wanted = loss_and_gradients(Decoder(live_stack(tiny(name), torch.float64), torch.float64), batch)
    logps, grads = loss_and_gradients(sixteen_bits(tiny(name), torch.bfloat16), batch)
    plain = sixteen_bits(tiny(name), torch.bfloat16)
    theirs = oracle(plain, example, batch)
    theirs.float().sum().backward()
    assert apart(logps.double(), want) <= 1.1 * apart(theirs.detach().double(), want) + 1e-3
    ours, others = (max(apart(g[n].double(), wanted[n]) for n in wanted) for g in (grads, gradients(plain.stack)))
    assert ours < 1.5 * others + 1e-2


def test_the_layer_through_nf4_and_streamed(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)

    def fresh():
        return load_base(RunConfig(model_name_or_path=str(tmp_path))).model

    for keep, scratch in (("input", "small"), ("attention", "layer"), ("all", "small")):
        decoder = Decoder(live_stack(fresh()), torch.float32, scratch=scratch)
        compare(decoder, keep, Dropout(0.3, seed=1, step=4), 1e-5)
    keeps = ("attention", "all")
    want = decoder_over(fresh(), plan=plan_of(keep=keeps, tile=10))
    got = decoder_over(fresh(), plan=plan_of(keep=keeps, offload=1, tile=10, stream=True))
    for steps in (sft_steps, dpo_steps):
        assert_bits(steps(got, keeps, None), steps(want, keeps, None))


def test_a_pair_with_its_shared_prompt_equals_two_sequences(name):
    decoder = Decoder(live_stack(tiny(name)), torch.float32)
    found = pair(0, 14, 12, 7)
    with torch.no_grad(), decoder.stack.only(["sft", "dpo"]):
        rows = []
        for ids in (found.chosen_ids, found.rejected_ids):
            whole = torch.from_numpy(np.concatenate([found.prompt_ids, ids])).long()
            table = decoder.stack.model(whole[None]).logits[0].log_softmax(-1)
            rows.append(table[13:-1].gather(1, whole[14:, None])[:, 0])
    with torch.no_grad():
        assert apart(decoder.token_logps(collate_pairs([found])), torch.cat(rows)) < 1e-5


@pytest.mark.parametrize("keep", ["input", "all"])
def test_the_layer_on_the_triton_kernels(keep, monkeypatch):
    """In triton's interpreter, of the family that uses every variant of them."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the card here; test_gpu.py runs them")
    decoder = Decoder(live_stack(tiny("gemma3_text")), torch.float32)
    batch, dropout = collate_pairs([pair(0, 6, 3, 4)]), Dropout(0.3, 1, 1)
    want, wanted = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    got, grads = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    assert 0 < apart(got, want) < 1e-5
    for key in wanted:
        assert apart(grads[key], wanted[key]) < 1e-5, key


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which the fused engine"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_act 'gelu'; the fused engine knows gelu_pytorch_tanh"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop is 0.1, which the fused engine does not compute"),
        ("qwen3", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_pytorch_tanh'; the fused engine knows silu"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}},
            "rotary embeddings of type dynamic",
        ),
    ],
)
def test_variants_that_the_layer_does_not_compute_are_refused(name, changes, match):
    with pytest.raises(UserError, match=match) as error:
        check_family(AutoConfig.for_model(name, **{**SETTINGS, **FAMILIES[name], **changes}), "config.json")
    assert "engine=trl" in error.value.hint


def test_a_scale_of_queries_without_its_length_is_refused():
    rope = {k: v for k, v in FAMILIES["ministral3"]["rope_parameters"].items() if not k.startswith("original")}
    config = tiny("ministral3").config
    config.rope_parameters = rope
    with pytest.raises(UserError, match="rope_parameters has no original_max_position_embeddings"):
        check_family(config, "config.json")


def test_what_phi3s_frequencies_and_matrices_refuse():
    """Beyond its first length longrope has other frequencies for all of a micro-batch; q, k and v are one matrix."""
    config = tiny("phi3").config
    check_length(config, 512, "config.json")
    with pytest.raises(UserError, match="more than 512 tokens; max_length is 513"):
        check_length(config, 513, "config.json")
    assert check_targets("all-linear", config) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    with pytest.raises(UserError, match="'q_proj' is none of qkv_proj, o_proj, gate_up_proj, down_proj"):
        check_targets(["q_proj"], config)


@pytest.mark.parametrize(
    ("name", "changes"), [("smollm3", {"no_rope_layers": [1, 1]}), ("gemma3_text", {"query_pre_attn_scalar": 32})]
)
def test_what_only_a_familys_own_keys_say_changes_the_fingerprint(name, changes, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    before = fingerprint(tmp_path)
    for key, value in changes.items():
        setattr(model.config, key, value)
    model.config.save_pretrained(tmp_path)
    assert fingerprint(tmp_path) != before


def test_inside_another_trainer(name):
    ids = torch.randint(3, 440, RIGHT.shape, generator=torch.Generator().manual_seed(0))
    assert_same(both(peft_model(tiny(name)), input_ids=ids, attention_mask=RIGHT))


def test_losses_and_gradients_are_trls(name, tmp_path, monkeypatch):
    """SFT and sigmoid DPO on padded batches, the reference with an adapter of its own."""
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.pad_token = "<unk>"
    monkeypatch.setattr(trl_parity, "make_model", lambda: tiny(name))
    trl_parity.test_sft(tokenizer, tmp_path)
    trl_parity.test_dpo(tokenizer, tmp_path, "sigmoid", label_smoothing=0.0)
