"""The hand-written layer against autograd over the Hugging Face layer (invariant 3), and what it counts.

Whatever is compared runs the whole decoder: the oracle is the PEFT model's own forward, with the counter-hash dropout
put where PEFT has its own, and norms that compute in the input's precision.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_model
from tests.test_decoder import TOLERANCE, apart, assert_same, conversation, live_stack, loss_and_gradients, pair
from zephyr_lite.config import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.model import memory
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.layer import kept_elements
from zephyr_lite.model.load import load_base
from zephyr_lite.model.plan import kept_bytes
from zephyr_lite.ops import attention, dispatch, nf4, rms_norm, rope, swiglu
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
            module.forward = lambda x, m=module: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
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
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=24, sliding_window=4,
    )  # fmt: skip
    decoder = Decoder(live_stack(model, torch.float64, r=1), torch.float64)
    examples = [conversation(i, n) for i, n in enumerate([5, 3])]
    for example in examples:
        example.ids[:] %= 24
        example.mask[-1] = True
    batch = collate_conversations(examples)
    parameters = list(decoder.stack.parameters().values())

    def logps(*_):
        return decoder.token_logps(batch, keep=keep, dropout=Dropout(0.3, 2, 5))

    assert gradcheck(logps, parameters)


@pytest.mark.parametrize("keep", KEEPS)
def test_gradcheck_of_a_pair_with_a_shared_prompt(keep):
    model = make_model(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=24,
    )  # fmt: skip
    decoder = Decoder(live_stack(model, torch.float64, r=1), torch.float64)
    found = pair(0, 4, 2, 3)
    for ids in (found.prompt_ids, found.chosen_ids, found.rejected_ids):
        ids[:] %= 24
    batch = collate_pairs([found])
    assert gradcheck(lambda *_: decoder.token_logps(batch, keep=keep), list(decoder.stack.parameters().values()))


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


@pytest.mark.parametrize("keep", ["input", "all"])
def test_the_layer_on_the_triton_kernels(tiny_base, keep, monkeypatch):
    """Every kernel in its place, in triton's interpreter: the decoder with kernels is the decoder with their twins."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the card here; test_gpu.py runs them")
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    decoder = Decoder(live_stack(base.model), base.dtype)
    batch = collate_pairs([pair(0, 6, 3, 4)])
    dropout = Dropout(0.3, 1, 1)
    want, wanted = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    decoder.scratch.free()
    asked = set()
    plain = dispatch.runs_triton
    for file in (nf4, rms_norm, rope, swiglu, dropout_file, token_logps_file):
        monkeypatch.setattr(file, "runs_triton", lambda op, *a: asked.add((op, plain(op, *a))) or plain(op, *a))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    got, grads = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
    assert asked == {(op, True) for op in ("nf4", "rms_norm", "rope", "swiglu", "dropout", "token_logps")}
    assert apart(got, want) < 1e-5
    assert_same(grads, wanted)


# --- what it counts ---


@contextmanager
def kept():
    """Bytes that autograd keeps, each storage once, parameters aside."""
    seen, result = {}, SimpleNamespace(bytes=0)

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield result
    result.bytes = sum(size for size, _ in seen.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_the_backward_pass(dtype, keep, p):
    """Exactly what the policy says, a token and layer, and what the head keeps a target; the planner's figure is this."""
    model = make_model().to(dtype)
    decoder = Decoder(live_stack(model), dtype)
    batch = collate_conversations([conversation(0, 40), conversation(1, 24)])
    with kept() as found:
        decoder.token_logps(batch, keep=keep, dropout=Dropout(p, 1, 1) if p else None)
    hidden, queries, keys, inner, heads, ranks = 64, 64, 32, 128, 4, 7 * (2 + 4)
    size = dtype.itemsize
    a_layer = {
        "input": size * hidden,
        "attention": size * (2 * hidden + queries) + 4 * heads,
        "all": size * (2 * hidden + 2 * queries + 2 * keys + 2 * inner + ranks) + 4 * heads,
    }[keep]
    targets = len(batch.target_ids)
    # of the last hidden states: what the gather and the final norm keep, and the head's slope
    head = targets * (hidden * size + 4 + hidden * size + 8)
    assert found.bytes == 2 * len(batch) * a_layer + head
    assert kept_bytes(model.config, dtype, keep, ranks=ranks) == 2 * a_layer


def test_bytes_kept_a_token_of_mistral():
    """8 KB, 24 KB and 92 KB a token and layer in 16 bits, as the design says."""
    config = SimpleNamespace(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=1,
    )  # fmt: skip
    found = [kept_bytes(config, torch.bfloat16, keep) for keep in KEEPS]
    assert found == [8 * 1024, 24 * 1024 + 128, 92 * 1024 + 128]


def test_kept_elements_of_a_layer_are_the_plans():
    decoder = Decoder(live_stack(make_model()), torch.float32)
    layer = decoder._layer(decoder.stack.base.model.layers[0], 0, None, None)
    for keep in KEEPS:
        narrow, wide = kept_elements(layer, keep)
        assert kept_bytes(decoder.stack.base.config, torch.float32, keep, ranks=42) == 2 * 4 * (narrow + wide)


@pytest.fixture
def dequantized(monkeypatch):
    """Which weights were dequantized, in order."""
    found = []
    plain = memory.dequantize

    def counting(weight, dtype, out=None):
        found.append(weight)
        return plain(weight, dtype, out=out)

    monkeypatch.setattr(memory, "dequantize", counting)
    return found


@pytest.mark.parametrize("keep", KEEPS)
def test_dequantizations_of_a_step(tiny_base, dequantized, keep):
    """Seven weights a layer and pass; less those that a backward pass finds where the forward pass left them."""
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    decoder = Decoder(live_stack(base.model), base.dtype)
    layers = 2
    # the first layer's q, k, v are read again only to recompute: nothing wants the gradient of the embeddings
    first = 7 * (2 * layers - 1) - (3 if keep == "all" else 0)
    batch = collate_conversations([conversation(0, 20)])
    loss_and_gradients(decoder, batch, keep=keep)
    assert len(dequantized) == first
    loss_and_gradients(decoder, batch, keep=keep)  # begins with the layer that the first one ended with
    assert len(dequantized) == first + 7 * (2 * layers - 2)
    dequantized.clear()
    decoder.scratch.free()
    pairs = collate_pairs([pair(0, 9, 6, 4)])
    policy, _ = decoder.policy_and_reference(pairs, keep=keep)
    policy.sum().backward()
    assert len(dequantized) == first  # the reference costs none
    dequantized.clear()
    decoder.scratch.free()
    reference = decoder.token_logps(pairs, reference=True)
    policy = decoder.token_logps(pairs, keep=keep)
    (policy - reference).sum().backward()
    assert len(dequantized) == first + 7 * layers


def test_dequantizations_of_a_step_in_the_small_scratch(tiny_base, dequantized):
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    decoder = Decoder(live_stack(base.model), base.dtype, scratch="small")
    loss_and_gradients(decoder, collate_conversations([conversation(0, 20)]), keep="input")
    # forward: 7 a layer; backward: gate and up twice, and in the last layer the attention's are still there
    assert len(dequantized) == 7 * 2 + 9 * 2 - 4


@pytest.mark.parametrize("mode", ["layer", "small"])
def test_the_scratch_is_as_large_as_the_design_says(mode):
    """For Mistral-7B in 16 bits: 416 MiB; small: no more than 224 MiB."""
    sites = [
        SimpleNamespace(outs=(4096, 1024, 1024), weights=[torch.empty(1, 4096)]),
        SimpleNamespace(outs=(4096,), weights=[torch.empty(1, 4096)]),
        SimpleNamespace(outs=(14336, 14336), weights=[torch.empty(1, 4096)]),
        SimpleNamespace(outs=(4096,), weights=[torch.empty(1, 14336)]),
    ]
    sizes = [2 * n / 2**20 for n in memory.scratch_elements(sites, mode)]
    assert sizes == {"layer": [416.0], "small": [80.0, 112.0]}[mode]


def test_the_head_multiplies_target_rows_only(monkeypatch):
    decoder = Decoder(live_stack(make_model()), torch.float32)
    rows = []
    plain = token_logps_file.token_logps

    def counting(hidden, head, targets, **options):
        rows.append(hidden.shape[0])
        return plain(hidden, head, targets, **options)

    monkeypatch.setattr("zephyr_lite.model.decoder.token_logps", counting)
    batch = collate_pairs([pair(0, 9, 6, 4)])
    decoder.policy_and_reference(batch)
    assert rows == [10, 10]  # 19 tokens, 10 of them in a response


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _product(*shapes):
    (m, k), (_, n) = shapes
    return 2 * m * k * n


def flops(run):
    """Of every matrix product, and of attention as full rectangles: 4 q k d a head forward, 10 backward."""

    def forward(q, k, *args, **kwargs):
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    def backward(grad, q, k, *args, **kwargs):
        return 10 * q[0] * q[1] * q[2] * q[3] * k[2]

    formulas = {
        _ATTENTION: forward,
        _ATTENTION_BACKWARD: backward,
        torch.ops.aten.addmm_: lambda y, a, b, **kwargs: _product(a, b),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


def expected_flops(batch, keep, *, policy=True, reference=False, drop=False, layers=2):
    """The formula, written down without looking at the code: T tokens, N targets, S sums of queries times keys."""
    t, n = len(batch), len(batch.target_ids)
    s = sum(x.queries * x.keys for x in batch.segments)
    d, queries, keys, inner, heads, size, vocabulary = 64, 64, 32, 128, 4, 16, 448
    weights = {"qkv": d * (queries + 2 * keys), "o": queries * d, "gate_up": 2 * d * inner, "down": inner * d}
    ins, count = {"qkv": d, "o": queries, "gate_up": d, "down": inner}, {"qkv": 3, "o": 1, "gate_up": 2, "down": 1}
    outs = {"qkv": queries + 2 * keys, "o": d, "gate_up": 2 * inner, "down": d}
    frozen, trained = 2, 4  # ranks
    narrow = {site: 2 * t * (frozen + trained) * count[site] * ins[site] for site in weights}  # x A
    widen = {site: 2 * t * (frozen + trained) * outs[site] for site in weights}  # z B
    if reference and drop:  # the trained adapter has a product of its own, and the reference leaves it out
        narrow_off = {site: 2 * t * frozen * count[site] * ins[site] for site in weights}
        widen_off = {site: 2 * t * frozen * outs[site] for site in weights}
    else:
        narrow_off, widen_off = narrow, widen
    attend = 4 * s * heads * size
    total = 0
    if policy:
        forward = sum(2 * t * w for w in weights.values()) + sum(narrow.values()) + sum(widen.values()) + attend
        again = {
            "input": sum(2 * t * weights[x] + narrow[x] + widen[x] for x in ("qkv", "o", "gate_up"))
            + attend
            + narrow["down"],
            "attention": sum(2 * t * weights[x] + widen[x] for x in ("qkv", "gate_up")) + sum(narrow.values()),
            "all": 0,
        }[keep]
        backward = (
            sum(2 * t * w for w in weights.values())
            + sum(narrow.values())
            + sum(widen.values())
            + 10 * s * heads * size
        )
        for x in weights:  # dA and dB
            backward += 2 * t * trained * (count[x] * ins[x] + outs[x])
        total += layers * (forward + again + backward)
        total -= 2 * t * weights["qkv"] + narrow["qkv"]  # nothing wants the gradient of the embeddings
        if drop:  # nor, where frozen adapters have a product of their own, that product's
            total -= 2 * t * frozen * outs["qkv"]
        total += 2 * (2 * n * d * vocabulary)  # the head: logits, and the expected embedding
    if reference:
        off = sum(2 * t * w for w in weights.values()) + sum(narrow_off.values()) + sum(widen_off.values()) + attend
        total += layers * off + 2 * n * d * vocabulary
    return total


def angles(decoder, batch):
    """some versions of transformers multiply positions and frequencies as matrices; that is no work of the layers."""
    model = decoder.stack.base.model
    return flops(lambda: model.rotary_emb(torch.empty(1), batch.positions[None]))


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_flops_of_an_sft_step(keep, drop):
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_conversations([conversation(0, 40), conversation(1, 24)])
    dropout = Dropout(0.3, 1, 1) if drop else None
    found = flops(lambda: loss_and_gradients(decoder, batch, keep=keep, dropout=dropout))
    assert found - angles(decoder, batch) == expected_flops(batch, keep, drop=drop)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("keep", KEEPS)
def test_flops_of_a_dpo_step(keep, drop):
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_pairs([pair(0, 12, 7, 5), pair(1, 20, 9, 11)])
    dropout = Dropout(0.3, 1, 1) if drop else None

    def step():
        policy, reference = decoder.policy_and_reference(batch, keep=keep, dropout=dropout)
        (policy - reference).sum().backward()

    assert flops(step) - angles(decoder, batch) == expected_flops(batch, keep, reference=True, drop=drop)


def test_an_oracle_that_is_wrong_is_seen():
    """The comparison has teeth: one adapter's scale off by a thousandth is outside of its tolerance."""
    decoder = Decoder(live_stack(make_model()), torch.float32)
    other = Decoder(copy.deepcopy(decoder.stack), torch.float32)
    next(iter(other.stack.lora_layers()))[1].scaling["dpo"] *= 1.001
    batch = collate_conversations([conversation(0, 33)])
    _, grads = loss_and_gradients(decoder, batch)
    _, others = loss_and_gradients(other, batch)
    assert max(apart(others[n], grads[n]) for n in grads) > 10 * TOLERANCE[torch.float32]
