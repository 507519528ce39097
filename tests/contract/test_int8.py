"""memory.compute=int8: the products are what they say, and what holds in 16 bits holds: step 0 of DPO, packing, every plan."""

from dataclasses import replace

import pytest
import torch

from tests.numeric import apart, conversation, live_stack, loss_and_gradients, pair
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.execution import DOWN, GATE_UP, OUT, QKV, ExecutionConfig, layer_of
from zephyr_lite.model.int8 import Int8Buffer, calibrate
from zephyr_lite.model.weight_streaming import WeightStreamer
from zephyr_lite.ops.dropout import DropoutKey, drop
from zephyr_lite.ops.int8 import largest_channels
from zephyr_lite.ops.lora import grad_input, grad_low_rank, low_rank, project
from zephyr_lite.ops.nf4 import dequantize

ROWS = [conversation(0, 40), conversation(1, 24)]


def decoder_of(folder, dtype="float32", *, int8=True, stream=False, **stack):
    base = load_base(RunConfig(model_name_or_path=str(folder), dtype=dtype))
    streamer = WeightStreamer(base.model, base.device) if stream else None
    decoder = Decoder(live_stack(base.model, **stack), base.dtype, stream=streamer)
    if int8:
        calibrate(decoder, collate_conversations([conversation(7, 50)]))
    return decoder


def rounded(matrix, scale):
    """A matrix as its int8 codes mean it, row by row, in float64."""
    inverse = torch.where(scale > 0, 1 / scale, 0)
    return (matrix.float() * inverse[:, None]).round().double() * scale.double()[:, None]


def scale_of(matrix):
    return matrix.float().abs().amax(1) / 127


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("index", [QKV, OUT, GATE_UP, DOWN])
def test_a_sites_products_are_the_formula(tiny_base, index, p):
    """Against float64: codes of rows, outlier channels and adapters apart, one sum; and the gradient of the input."""
    decoder, places = decoder_of(tiny_base), torch.arange(9)
    key = DropoutKey(p, 1, 1, places, places) if p else None
    module, fields = decoder.stack.base.model.layers[1], decoder.of_sites[1]
    layer = layer_of(module, lambda *a: decoder._pairs(*a, off=None), key, index=1, of_sites=fields).cast(torch.float32)
    site, generator = layer.sites[index], torch.Generator().manual_seed(3)
    channels = site.int8.outliers.channels
    x = torch.randn(9, dequantize(site.weights[0], torch.float32).shape[1], generator=generator)
    x[4] = 0
    grad = torch.randn(9, sum(site.outs), generator=generator)
    before = torch.randn(9, sum(site.outs), generator=generator)
    products, buffer = low_rank(x, site), Int8Buffer()
    y = project(x, buffer.parts(layer.sites, index, x.dtype), site, products, add=True, out=before.clone())
    d_products = grad_low_rank(grad, site)
    d_x = grad_input(grad, buffer.parts(layer.sites, index, x.dtype, backward=True), site, d_products)

    inside = x.index_fill(1, channels, 0)
    x8, wanted, wanted_d = rounded(inside, scale_of(inside)), before.double(), torch.zeros_like(x).double()
    for weight, columns in zip(site.weights, site.slices):
        dense = dequantize(weight, torch.float32)
        kept = dense[:, channels].double()
        w8 = rounded(dense.index_fill(1, channels, 0), scale_of(dense))
        wanted[:, columns] += x8 @ w8.T + x[:, channels].double() @ kept.T
        d_y = grad[:, columns]
        wanted_d += rounded(d_y, scale_of(d_y)) @ rounded(dense.T, scale_of(dense.T)).T
    for pair_ in site.stack:
        a, b, columns = pair_.a.double(), pair_.b.double() * pair_.scale, site.slices[pair_.projection]
        dropped = pair_.dropout and p > 0
        seen = drop(x, site.dropout).double() / (1 - p) if dropped else x.double()
        mask = drop(torch.ones_like(x), site.dropout).double() / (1 - p) if dropped else 1
        wanted[:, columns] += seen @ a.T @ b.T
        wanted_d += (grad[:, columns].double() @ b @ a) * mask
    assert apart(y.double(), wanted) < 2e-6 and apart(d_x.double(), wanted_d) < 2e-6


def test_channels_with_the_largest_values_stay_in_the_compute_dtype(tiny_base):
    """With others in their place, the largest would take the codes of all."""
    decoder, batch = decoder_of(tiny_base, int8=False), collate_conversations(ROWS)
    for layer in decoder.stack.base.model.layers:
        layer.post_attention_layernorm.weight.data[[5, 40]] = 60.0
    exact = decoder.token_logps(batch).detach()
    calibrate(decoder, collate_conversations([conversation(7, 50)]))
    found = decoder.token_logps(batch).detach()
    for of_layer in decoder.of_sites:
        site = of_layer[GATE_UP]["int8"]
        assert {5, 40} <= set(site.outliers.channels.tolist())
        maxima = torch.ones(64).index_fill(0, site.outliers.channels, 0)
        of_layer[GATE_UP]["int8"] = replace(site, outliers=largest_channels(maxima))
    decoder.scratch.free()
    assert apart(found, exact) < apart(decoder.token_logps(batch).detach(), exact) / 2


PLANS = [
    {},
    {"keep": "attention"},
    {"keep": "input"},
    {"scratch": "small"},
    {"tile": 16, "keep": "input"},
    {"tile": 16, "scratch": "small"},
    {"offload": 2},
]


@pytest.mark.parametrize("stream", [False, True])
def test_every_plan_gives_the_same_gradients(tiny_base, stream):
    """To the bit but for tiles, which split sums of the adapters' gradients."""
    batch, dropout = collate_conversations(ROWS), Dropout(0.2, 1, 1)
    wanted, gradients = loss_and_gradients(decoder_of(tiny_base), batch, dropout=dropout)
    decoder = decoder_of(tiny_base, stream=stream)
    for plan in PLANS:
        keep = plan.get("keep", "all")
        decoder.follow(ExecutionConfig(**{"micro_tokens": 64, "stream": stream, **plan, "keep": (keep,) * 2}))
        found, ours = loss_and_gradients(decoder, batch, keep=keep, dropout=dropout)
        assert torch.equal(found, wanted), plan
        for name in gradients:
            assert apart(ours[name], gradients[name]) <= (1e-6 if "tile" in plan else 0), (plan, name)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_untrained_policy_equals_its_reference_to_the_bit(tiny_base, dtype, p):
    """In one pass and in two, whatever the trained adapter is."""
    batch, dropout = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 8, 8)]), Dropout(p, 1, 0) if p else None
    fresh = decoder_of(tiny_base, dtype, trained=False)
    policy, reference = fresh.policy_and_reference(batch, dropout=dropout)
    assert torch.equal(policy, reference)
    assert torch.equal(policy, fresh.token_logps(batch, reference=True, dropout=dropout))
    trained = decoder_of(tiny_base, dtype)  # calibrated with its adapter off
    assert torch.equal(reference, trained.token_logps(batch, reference=True, dropout=dropout))
    assert apart(trained.token_logps(batch, dropout=dropout), policy) > 1e-3


def test_a_packed_row_equals_its_rows_alone(tiny_base):
    """Each row has its own scale; rounding may change a code by one."""
    decoder = decoder_of(tiny_base)
    packed = decoder.token_logps(collate_conversations(ROWS))
    alone = torch.cat([decoder.token_logps(collate_conversations([row])) for row in ROWS])
    exact = decoder_of(tiny_base, int8=False).token_logps(collate_conversations(ROWS))
    assert apart(packed, alone) < 0.1 * apart(packed, exact)
