"""The hand-written layer against autograd over the Hugging Face layer (invariant 3).

Whatever is compared runs the whole decoder: the oracle is the PEFT model's own forward, with the counter-hash dropout
put where PEFT has its own, and norms that compute in the input's precision.
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from tests.conftest import make_model
from tests.numeric import TOLERANCE, apart, assert_same, conversation, live_stack, loss_and_gradients, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.ops import attention, dispatch, dropout_products, nf4, rms_norm, rope, swiglu
from zephyr_lite.ops import dropout as dropout_file
from zephyr_lite.ops import token_logps as token_logps_file
from zephyr_lite.ops.dropout import DropoutKey, dropout_scale

KEEPS = ("input", "attention", "all")


class HashDropout(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key = key

    def forward(self, x):
        return x * dropout_scale(self.key, x.shape[-1], x.dtype).view_as(x)


SITES = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
SITES |= {"qkv_proj": 0, "gate_up_proj": 2}  # Phi-3's


def oracle(decoder, example, batch, dropout=None):
    """Log-probabilities of a conversation's targets by the Hugging Face layers under autograd."""
    stack = decoder.stack
    if dropout is not None:
        key = DropoutKey(dropout.p, dropout.seed, dropout.step, batch.streams, batch.positions)
        for name, layer in stack.lora_layers():
            parts = name.split(".")
            place = int(parts[parts.index("layers") + 1])
            layer.lora_dropout["dpo"] = HashDropout(key.at(place, SITES[parts[-1]]))
    for module in stack.base.modules():
        if type(module).__name__.endswith("RMSNorm"):
            offset = type(module).__name__.startswith("Gemma")
            weight, eps = module.weight + offset, module.eps if offset else module.variance_epsilon
            module.forward = lambda x, w=weight, eps=eps: F.rms_norm(x, x.shape[-1:], w, eps)
    stack.model.base_model.set_adapter(["sft", "dpo"])
    for _, layer in stack.lora_layers():
        for name in ("sft", "dpo"):
            layer.lora_A[name].requires_grad_(name == "dpo")
            layer.lora_B[name].requires_grad_(name == "dpo")
    logits = stack.model(torch.from_numpy(example.ids[None].astype(np.int64))).logits[0]
    targets = np.flatnonzero(example.mask[1:]) + 1
    return logits.log_softmax(-1)[torch.tensor(targets) - 1, torch.from_numpy(example.ids[targets].astype(np.int64))]


def gradients(stack):
    return {n: p.grad.clone() for n, p in stack.parameters().items()}


def compare(decoder, keep, dropout, tolerance):
    example = conversation(0, 33)
    batch = collate_conversations([example])
    weights = torch.randn(len(batch.target_ids), generator=torch.Generator().manual_seed(0), dtype=decoder.dtype)
    logps, grads = loss_and_gradients(decoder, batch, weights, keep=keep, dropout=dropout)
    for p in decoder.stack.parameters().values():
        p.grad = None
    want = oracle(decoder, example, batch, dropout)
    (want * weights).sum().backward()
    assert apart(logps, want.detach()) < tolerance
    assert_same(grads, gradients(decoder.stack), tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_equals_autograd_over_the_hugging_face_layer(kind, keep, p):
    changes = {"sliding_window": 9} if kind == "mistral" else {"attention_bias": True, "mlp_bias": True, "head_dim": 24}
    decoder = Decoder(live_stack(make_model(kind, **changes)), torch.float32)
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-5)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
def test_equals_it_in_float64_but_for_the_rotary_angles(keep, p):
    decoder = Decoder(live_stack(make_model(), torch.float64), torch.float64)
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-11)


@pytest.mark.parametrize("tile", [1, 10, 32, 33])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
def test_equals_it_with_the_mlp_in_tiles(tiny_base, keep, p, tile):
    """Of 33 tokens, the last tile shorter than the others or not there; dropout knows which tokens it sees."""
    decoder = Decoder(live_stack(make_model(sliding_window=9), torch.float64), torch.float64)
    decoder.tile = tile
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-11)
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    decoder = Decoder(live_stack(base.model), base.dtype, scratch="small")
    decoder.tile = tile
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-5)


@pytest.mark.parametrize("scratch", ["layer", "small"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
def test_equals_it_through_nf4(tiny_base, keep, p, scratch):
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    decoder = Decoder(live_stack(base.model), base.dtype, scratch=scratch)
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-5)


@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck(keep):
    """Numerical derivatives of the log-probabilities by every number of every trained adapter, dropout on."""
    model = make_model(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=24,
        sliding_window=4,
    )
    decoder = Decoder(live_stack(model, torch.float64, r=1), torch.float64)
    examples = [conversation(i, n) for i, n in enumerate([5, 3])]
    for example in examples:
        example.ids[:] %= 24
        example.mask[-1] = True
    batch = collate_conversations(examples)
    parameters = list(decoder.stack.parameters().values())

    def logps(*_):
        return decoder.token_logps(batch, keep=keep, dropout=Dropout(0.3, 2, 5))

    assert gradcheck(logps, parameters, fast_mode=keep != "all")  # along random directions; number by number once


@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck_of_a_pair_with_a_shared_prompt(keep):
    model = make_model(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=24,
    )
    decoder = Decoder(live_stack(model, torch.float64, r=1), torch.float64)
    found = pair(0, 4, 2, 3)
    for ids in (found.prompt_ids, found.chosen_ids, found.rejected_ids):
        ids[:] %= 24
    batch = collate_pairs([found])
    parameters = list(decoder.stack.parameters().values())
    assert gradcheck(lambda *_: decoder.token_logps(batch, keep=keep), parameters, fast_mode=keep != "all")


@pytest.mark.parametrize("keep", ["input", "all"])
def test_trajectories_of_50_steps_stay_together(keep):
    """AdamW in float64 on this engine and on autograd over the Hugging Face model: the same adapter after 50 steps."""
    paths = {}
    for engine in ("ours", "plain"):
        decoder = Decoder(live_stack(make_model(), torch.float64, trained=False), torch.float64)
        optimizer = torch.optim.AdamW(decoder.stack.parameters().values(), lr=1e-2)
        for step in range(50):
            example = conversation(step % 5, 24)
            batch = collate_conversations([example])
            dropout = Dropout(0.1, seed=1, step=step)
            optimizer.zero_grad()
            if engine == "ours":
                logps = decoder.token_logps(batch, keep=keep, dropout=dropout)
            else:
                logps = oracle(decoder, example, batch, dropout)
            loss = -logps.mean()
            loss.backward()
            optimizer.step()
        paths[engine] = ({n: p.detach() for n, p in decoder.stack.parameters().items()}, loss.item())
    assert paths["ours"][1] < 5.5  # it learned: ln 448 = 6.1
    assert abs(paths["ours"][1] - paths["plain"][1]) < 1e-8
    assert_same(paths["ours"][0], paths["plain"][0], 1e-8)


def test_the_reference_in_the_policys_pass_is_the_reference_in_its_own():
    """Bit for bit, and the policy's gradients are those of a pass of its own."""
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 8, 8)])
    for dropout in (None, Dropout(0.3, 1, 1)):
        policy, reference = decoder.policy_and_reference(batch, keep="input", dropout=dropout)
        assert torch.equal(reference, decoder.token_logps(batch, reference=True, dropout=dropout))
        assert not reference.requires_grad
        for p in decoder.stack.parameters().values():
            p.grad = None
        policy.sum().backward()
        together = gradients(decoder.stack)
        alone, grads = loss_and_gradients(decoder, batch, keep="input", dropout=dropout)
        assert torch.equal(policy.detach(), alone)
        assert all(torch.equal(together[n], grads[n]) for n in grads)


def test_saved_tensors_are_not_overwritten():
    """A graph that is kept can be gone through twice."""
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_conversations([conversation(0, 20)])
    for keep in KEEPS:
        parameters = list(decoder.stack.parameters().values())
        total = decoder.token_logps(batch, keep=keep).sum()
        first = torch.autograd.grad(total, parameters, retain_graph=True)
        second = torch.autograd.grad(total, parameters)
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("window", [None, 4])
def test_the_plain_attention_is_the_processors(window, monkeypatch):
    """What runs where PyTorch has no kernel is the same function."""
    decoder = Decoder(live_stack(make_model(sliding_window=window), torch.float64), torch.float64)
    batch = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 8, 8)])
    want, wanted = loss_and_gradients(decoder, batch)
    monkeypatch.setattr(attention, "backend", lambda q: "plain")
    got, grads = loss_and_gradients(decoder, batch)
    assert 0 < apart(got, want) < 1e-12
    assert_same(grads, wanted, 1e-12)


# --- precision ---


def sixteen_bits(model, dtype, **options):
    stack = live_stack(model, **options)
    for name, parameter in stack.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    return Decoder(stack, dtype)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_to_float64_as_the_hugging_face_model_in_16_bits(dtype, keep):
    """Log-probabilities and gradients; the adapters' gradients are float32, like the adapters."""
    example = conversation(0, 33)
    batch = collate_conversations([example])
    exact = Decoder(live_stack(make_model(), torch.float64), torch.float64)
    want, wanted = loss_and_gradients(exact, batch, keep=keep)
    decoder = sixteen_bits(make_model(), dtype)
    logps, grads = loss_and_gradients(decoder, batch, keep=keep)
    assert all(g.dtype == torch.float32 for g in grads.values())
    plain = sixteen_bits(make_model(), dtype)
    hugging_face = oracle(plain, example, batch)
    hugging_face.float().sum().backward()
    theirs = gradients(plain.stack)
    assert apart(logps.double(), want) <= 1.1 * apart(hugging_face.detach().double(), want) + 1e-3
    ours = [apart(grads[n].double(), wanted[n]) for n in wanted]
    assert max(ours) < 1.5 * max(apart(theirs[n].double(), wanted[n]) for n in wanted) + 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "what", ["large logits", "one token", "a segment of one token", "rank 1", "rank 256", "576 wide", "no target"]
)
def test_extreme_but_valid_inputs_are_finite(what, dtype):
    wide = {"hidden_size": 576, "intermediate_size": 96, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = make_model(**(wide if what == "576 wide" else {}))
    if what == "large logits":
        model.lm_head.weight.data.mul_(2.5e4 / model.lm_head.weight.data.norm(dim=1).mean() / 8)
    options = {"rank 1": {"r": 1}, "rank 256": {"r": 256}}.get(what, {})
    decoder = sixteen_bits(model, dtype, **options)
    lengths = {"one token": [1, 5], "a segment of one token": [9, 1, 1, 4]}.get(what, [12, 7])
    examples = [conversation(i, n) for i, n in enumerate(lengths)]
    for example in examples:
        example.mask[:] = what != "no target"
    batch = collate_conversations(examples)
    for keep in KEEPS:
        logps, grads = loss_and_gradients(decoder, batch, keep=keep, dropout=Dropout(0.1, 1, 1))
        assert len(logps) == (0 if what == "no target" else sum(lengths) - len(lengths))
        assert bool(logps.isfinite().all())
        assert what != "large logits" or logps.min() < -1e4
        assert all(bool(g.isfinite().all()) for g in grads.values())
        assert what == "no target" or all(bool(g.any()) for g in grads.values())


def test_a_pair_of_single_tokens():
    decoder = Decoder(live_stack(make_model(sliding_window=1)), torch.float32)
    policy, reference = decoder.policy_and_reference(collate_pairs([pair(0, 1, 1, 1)]))
    (policy - reference).sum().backward()
    assert bool(policy.isfinite().all()) and all(p.grad.isfinite().all() for p in decoder.stack.parameters().values())


@pytest.mark.parametrize(("keep", "dtype"), [("input", "float32"), ("all", "float32"), ("all", "float16")])
def test_the_layer_on_the_triton_kernels(tiny_base, keep, dtype, monkeypatch):
    """Every kernel in its place, in triton's interpreter: the decoder with kernels is the decoder with their twins."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the card here; test_gpu.py runs them")
    base = load_base(RunConfig(model_name_or_path=str(tiny_base), dtype=dtype))
    decoder = Decoder(live_stack(base.model), base.dtype)
    batch = collate_pairs([pair(0, 6, 3, 4)])
    dropout = Dropout(0.3, 1, 1)
    want, wanted = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    decoder.scratch.free()
    asked = set()
    plain = dispatch.runs_triton
    for file in (nf4, rms_norm, rope, swiglu, dropout_file, dropout_products, token_logps_file):
        monkeypatch.setattr(file, "runs_triton", lambda op, *a: asked.add((op, plain(op, *a))) or plain(op, *a))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    got, grads = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    ops = {"nf4", "rms_norm", "rope", "swiglu", "dropout", "dropout_products", "token_logps"}
    if dtype == "float16":
        ops -= {"dropout"}  # the products drop what they read
    assert asked == {(op, True) for op in ops}
    assert apart(got, want) < (1e-5 if dtype == "float32" else 1e-3)
    assert_same(grads, wanted, 1e-5 if dtype == "float32" else 1e-2)


def test_an_oracle_that_is_wrong_is_seen():
    """The comparison has teeth: one adapter's scale off by a thousandth is outside of its tolerance."""
    decoder = Decoder(live_stack(make_model()), torch.float32)
    other = Decoder(copy.deepcopy(decoder.stack), torch.float32)
    next(iter(other.stack.lora_layers()))[1].scaling["dpo"] *= 1.001
    batch = collate_conversations([conversation(0, 33)])
    _, grads = loss_and_gradients(decoder, batch)
    _, others = loss_and_gradients(other, batch)
    assert max(apart(others[n], grads[n]) for n in grads) > 10 * TOLERANCE[torch.float32]
