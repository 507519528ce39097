"""The performance claims that need no GPU, as exact integers: bytes kept, dequantizations, head rows and FLOPs of a step."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_model
from tests.contract.test_layer import KEEPS
from tests.numeric import conversation, live_stack, loss_and_gradients, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.memory.activations import kept_bytes
from zephyr_lite.memory.estimate import int8_bytes, scratch_bytes
from zephyr_lite.model import dequant_buffer as memory
from zephyr_lite.model import int8 as int8_file
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.execution import layer_of
from zephyr_lite.model.families import Shape
from zephyr_lite.model.int8 import calibrate
from zephyr_lite.ops import token_logps as token_logps_file
from zephyr_lite.ops.dropout import DropoutKey
from zephyr_lite.train.optim import make_buffers, make_optimizer

MISTRAL = SimpleNamespace(
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=1,
)


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


class Calls(TorchDispatchMode):
    """Counts the calls of operations with one of these names."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.count = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.names)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("optim", "ratio", "updates", "waits"),
    [
        ("adamw_torch", None, 1, 0),
        ("adamw_8bit", None, 1, 1),
        ("paged_adamw_8bit", None, 1, 2),
        ("adamw_8bit", 4.0, 2, 2),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_calls_of_an_update(optim, ratio, updates, waits, monkeypatch):
    """One for all matrices of an adapter, two with LoRA+. bitsandbytes waits for the card after each, and at the end of a paged
    one."""
    config = RunConfig(optim=optim, loraplus_lr_ratio=ratio)
    parameters = live_stack(make_model(), r=128).parameters()
    assert min(p.numel() for p in parameters.values()) >= 4096 and len(parameters) == 28
    optimizer, waited = make_optimizer(config, make_buffers(config, parameters)[0]), []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waited.append)
    with Calls("fused_adamw", "optimizer_update") as found:
        optimizer.step()
    assert (found.count, len(waited)) == (updates, waits)


@pytest.mark.parametrize(
    ("dtype", "off", "copies"), [(torch.bfloat16, None, 4), (torch.bfloat16, "dpo", 2), (torch.float32, None, 1)]
)
def test_copies_of_a_layers_adapters(dtype, off, copies):
    """A pass casts all A of an adapter at once, and all s B; in float32 it scales the B whose s is not 1. With dropout the adapter
    that is off has products of its own, which are not computed."""
    decoder = Decoder(live_stack(make_model(), r=6), dtype)
    places = torch.arange(3)
    pairs, key = partial(decoder._pairs, off=off), DropoutKey(0.5, 1, 1, places, places)
    for _, module in decoder.stack.lora_layers():
        module.scaling["dpo"] = 1.0
    layer = layer_of(decoder.stack.base.model.layers[1], pairs, key, index=1)
    with Calls("_to_copy", "mul") as found:
        cast = layer.cast(dtype)
    assert found.count == copies
    for p in (p for site in cast.sites for p in site.stack if not p.off):
        a, b = p.cast
        assert torch.equal(a, p.a.to(dtype)) and torch.equal(b, (p.b * p.scale).to(dtype))


def int8_decoder(folder, dtype=torch.float32, scratch="layer"):
    base = load_base(RunConfig(model_name_or_path=str(folder), dtype=str(dtype).removeprefix("torch.")))
    decoder = Decoder(live_stack(base.model), dtype, scratch=scratch)
    calibrate(decoder, collate_conversations([conversation(0, 20)]))
    return decoder


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_bytes_kept_for_the_backward_pass(tiny_base, dtype, int8, keep, p):
    """Exactly what the policy says, a token and layer, and what the head keeps a target; the planner's figure is this."""
    decoder = int8_decoder(tiny_base, dtype) if int8 else Decoder(live_stack(make_model().to(dtype)), dtype)
    model = decoder.stack.base
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
    assert kept_bytes(Shape.of(model.config), size, keep, ranks) == a_layer


def test_bytes_kept_a_token_of_mistral():
    """8 KB, 24 KB and 92 KB a token and layer in 16 bits, as the design says."""
    found = [kept_bytes(Shape.of(MISTRAL), 2, keep) for keep in KEEPS]
    assert found == [8 * 1024, 24 * 1024 + 128, 92 * 1024 + 128]


@pytest.fixture
def dequantized(monkeypatch):
    """Which weights were dequantized, in order."""
    found = []
    plain = memory.dequantize_into

    def counting(buffer, weights):
        found.extend(weight for _, weight in weights)
        plain(buffer, weights)

    monkeypatch.setattr(memory, "dequantize_into", counting)
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


@pytest.mark.parametrize("keep", KEEPS)
def test_requantizations_of_a_step_in_int8(tiny_base, monkeypatch, keep):
    """Seven weights a layer and pass, and those whose products are computed again, but in the layer that was the last."""
    decoder, found, plain = int8_decoder(tiny_base), [], int8_file.requantize

    def counting(places, *args, **options):
        found.extend(places)
        plain(places, *args, **options)

    monkeypatch.setattr(int8_file, "requantize", counting)
    loss_and_gradients(decoder, collate_conversations([conversation(0, 20)]), keep=keep)
    assert len(found) == 7 * 4 - 3 + {"all": 0, "attention": 5, "input": 6}[keep]


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
    assert scratch_bytes(Shape.of(MISTRAL), 2, mode) == sum(sizes) * 2**20  # what the planner counts with


@pytest.mark.parametrize("scratch", ["layer", "small"])
def test_bytes_of_int8_are_as_the_planner_counts_them(tiny_base, scratch):
    """For Mistral-7B: the buffer of 16 bits, and 6.6 MiB of outlier channels."""
    decoder = int8_decoder(tiny_base, scratch=scratch)
    decoder.token_logps(collate_conversations([conversation(0, 20)]))
    shape, buffer = Shape.of(decoder.stack.base.config), decoder.scratch
    assert sum(t.nbytes for t in buffer._buffers + buffer._outliers) == scratch_bytes(shape, 4, scratch, True)
    sites = [site["int8"] for of_layer in decoder.of_sites for site in of_layer]
    scales = sum(t.nbytes for site in sites for pair in site.scales for t in pair)
    assert scales + sum(t.nbytes for site in sites for t in site.outliers) == int8_bytes(shape)
    mistral = Shape.of(MISTRAL)
    more = scratch_bytes(mistral, 2, scratch, True) - scratch_bytes(mistral, 2, scratch)
    assert more == 2 * (38912 * 64 + 4096 * 224)


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


def flops(run, more=None):
    """Of every matrix product, and of attention as full rectangles: 4 q k d a head forward, 10 backward."""

    def forward(q, k, *args, **kwargs):
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    def backward(grad, q, k, *args, **kwargs):
        return 10 * q[0] * q[1] * q[2] * q[3] * k[2]

    formulas = {
        _ATTENTION: forward,
        _ATTENTION_BACKWARD: backward,
        torch.ops.aten.addmm_: lambda y, a, b, **kwargs: _product(a, b),
        **(more or {}),
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("keep", KEEPS)
def test_operations_of_a_step_in_int8(tiny_base, keep):
    """All products with the frozen matrices; beside them those of outlier channels, forward only."""
    decoder = int8_decoder(tiny_base)
    batch = collate_conversations([conversation(0, 40), conversation(1, 24)])
    in_int8 = []

    def count(a, b, **kwargs):
        in_int8.append(_product(a, b))
        return 0

    found = flops(lambda: loss_and_gradients(decoder, batch, keep=keep), {torch.ops.aten._int_mm: count})
    t, outs = 2 * len(batch), {"qkv": 128, "o": 64, "gate_up": 256, "down": 64}  # of sites
    again = {"all": (), "attention": ("qkv", "gate_up"), "input": ("qkv", "o", "gate_up")}[keep]
    weights = {name: out * (128 if name == "down" else 64) for name, out in outs.items()}
    passes = [[*outs, *again], list(outs)]  # of a layer: forward, backward
    assert sum(in_int8) == t * (2 * sum(weights[name] for names in passes for name in names) - weights["qkv"])
    outliers = t * 16 * 2 * sum(outs[name] for name in passes[0])
    assert found - angles(decoder, batch) == expected_flops(batch, keep) - sum(in_int8) + outliers


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
