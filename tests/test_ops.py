"""Every operation's plain twin against autograd over the formula it implements."""

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from zephyr_lite.ops import token_logps as token_logps_file
from zephyr_lite.ops.attention import SegmentTable, attention
from zephyr_lite.ops.dropout import DropoutKey, dropout_scale
from zephyr_lite.ops.lora import LoraPair, lora_linear
from zephyr_lite.ops.nf4 import dequantize, is_quantized
from zephyr_lite.ops.rms_norm import rms_norm
from zephyr_lite.ops.rope import rope
from zephyr_lite.ops.swiglu import swiglu
from zephyr_lite.ops.token_logps import token_logps, token_stats

D = torch.float64


def rand(*shape, grad=False, dtype=D):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_rms_norm_equals_torch_and_its_gradient():
    x, w = rand(5, 12, grad=True), rand(12)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (12,), w, 1e-5))
    assert gradcheck(lambda x: rms_norm(x, w, 1e-5), (x,))


def test_rms_norm_computes_its_statistics_in_float32_for_16_bits():
    x = (torch.randn(4, 576) * 300).to(torch.float16)  # squares overflow float16
    out = rms_norm(x, torch.ones(576, dtype=torch.float16), 1e-5)
    torch.testing.assert_close(out, F.rms_norm(x.float(), (576,), eps=1e-5).half(), rtol=1e-3, atol=1e-3)


def test_rope_equals_the_hugging_face_rotation_and_is_inverted_backward():
    x, angle = rand(5, 3, 8, grad=True), rand(5, 4)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    torch.testing.assert_close(rope(x, cos, sin), x * cos[:, None] + turned * sin[:, None])
    assert gradcheck(lambda x: rope(x, cos, sin), (x,))


def test_swiglu_and_its_gradient():
    gate, up = rand(4, 6, grad=True), rand(4, 6, grad=True)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up)
    assert gradcheck(swiglu, (gate, up))


def test_nf4_reads_bitsandbytes_storage():
    weight = torch.randn(96, 64)
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    from bitsandbytes.nn import Params4bit

    stored = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
    assert is_quantized(stored) and not is_quantized(weight)
    torch.testing.assert_close(dequantize(stored, torch.float32), bnb.dequantize_4bit(data, state), rtol=0, atol=0)
    assert dequantize(weight, torch.float32).data_ptr() == weight.data_ptr()


def stack_of(grad_from=0, off=None, dropout=False):
    """Two adapters on two projections of 6 → 5 and 6 → 7, the second adapter on the first projection only."""
    pairs = []
    for i, (projection, out, r) in enumerate([(0, 5, 2), (1, 7, 2), (0, 5, 3)]):
        a, b = rand(r, 6, grad=i >= grad_from), rand(out, r, grad=i >= grad_from)
        pairs.append(LoraPair(projection, a, b, 0.5 + i, off=i == off, dropout=dropout and i == 2))
    return pairs


def formula(x, weights, biases, pairs, scale=None):
    outs = [x @ w.T + (0 if b is None else b) for w, b in zip(weights, biases)]
    for p in pairs:
        source = x * scale if p.dropout and scale is not None else x
        if not p.off:
            outs[p.projection] = outs[p.projection] + p.scale * (source @ p.a.T) @ p.b.T
    return outs


@pytest.mark.parametrize("dropout", [False, True])
def test_lora_linear_equals_the_formula_with_every_gradient(dropout):
    x, weights, biases = rand(9, 6, grad=True), [rand(5, 6), rand(7, 6)], [None, rand(7)]
    pairs = stack_of(dropout=dropout)
    key = DropoutKey(0.3, 1, 2, torch.arange(9) // 4, torch.arange(9) % 4) if dropout else None
    scale = dropout_scale(key, 6, D) if dropout else None
    leaves = [x, *(t for p in pairs for t in (p.a, p.b))]
    got, want = lora_linear(x, weights, biases, pairs, key), formula(x, weights, biases, pairs, scale)
    upstream = [torch.randn_like(w) for w in want]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream)):
        torch.testing.assert_close(a, b)


def test_frozen_adapters_get_no_gradient_and_x_need_not():
    x, weights = rand(4, 6), [rand(5, 6), rand(7, 6)]
    pairs = stack_of(grad_from=2)
    out = lora_linear(x, weights, [None, None], pairs)
    (out[0].sum() + out[1].sum()).backward()
    assert pairs[0].a.grad is None and pairs[1].b.grad is None and pairs[2].a.grad is not None


def test_an_adapter_that_is_off_equals_one_whose_b_is_zero_bit_for_bit():
    x, weights = rand(40, 6, dtype=torch.float32), [rand(5, 6, dtype=torch.float32), rand(7, 6, dtype=torch.float32)]
    pairs = [LoraPair(p.projection, p.a.detach().float(), p.b.detach().float(), p.scale) for p in stack_of()]
    zero = [*pairs[:2], LoraPair(0, pairs[2].a, torch.zeros_like(pairs[2].b), pairs[2].scale)]
    off = [*pairs[:2], LoraPair(0, pairs[2].a, pairs[2].b, pairs[2].scale, off=True)]
    on = lora_linear(x, weights, [None, None], pairs)
    for a, b in zip(lora_linear(x, weights, [None, None], zero), lora_linear(x, weights, [None, None], off)):
        assert torch.equal(a, b)
    assert not torch.equal(on[0], lora_linear(x, weights, [None, None], off)[0])


def test_dropout_depends_on_the_token_and_not_on_its_place_in_the_row():
    streams, positions = torch.tensor([0, 0, 0, 8, 8]), torch.tensor([0, 1, 2, 0, 1])
    key = DropoutKey(0.4, 7, 3, streams, positions, layer=1, site=2)
    scale = dropout_scale(key, 50, torch.float32)
    order = torch.tensor([3, 4, 0, 1, 2])
    moved = DropoutKey(0.4, 7, 3, streams[order], positions[order], layer=1, site=2)
    assert torch.equal(dropout_scale(moved, 50, torch.float32), scale[order])
    for other in (key.at(1, 3), key.at(2, 2), DropoutKey(0.4, 7, 4, streams, positions, 1, 2)):
        assert not torch.equal(dropout_scale(other, 50, torch.float32), scale)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_rate_and_independence(p):
    n, c = 1000, 400
    streams, positions = torch.arange(n) // 100 * 2, torch.arange(n) % 100
    scales = [dropout_scale(DropoutKey(p, 42, s, streams, positions), c, torch.float32) for s in (0, 1)]
    dropped = [(s == 0).double() for s in scales]
    sigma = (p * (1 - p)) ** 0.5
    assert abs(dropped[0].mean().item() - p) < 5 * sigma / (n * c) ** 0.5
    assert (dropped[0].mean(0) - p).abs().max() < 6 * sigma / n**0.5
    assert (dropped[0].mean(1) - p).abs().max() < 6 * sigma / c**0.5
    # neighbours along tokens, along channels, and over steps are uncorrelated
    centred = [d - p for d in dropped]
    pairs = [(centred[0][1:], centred[0][:-1]), (centred[0][:, 1:], centred[0][:, :-1]), (centred[0], centred[1])]
    for a, b in pairs:
        assert abs((a * b).mean().item()) / sigma**2 < 5 / (a.numel() ** 0.5)


class Seg:
    def __init__(self, start, end, prefix=None):
        self.start, self.end, self.prefix = start, end, prefix
        self.queries = end - start
        self.keys = self.queries + (prefix[1] - prefix[0] if prefix else 0)

    def key_runs(self):
        return [*([self.prefix] if self.prefix else []), (self.start, self.end)]


def dense_attention(q, k, v, segments, window, scale):
    """Every segment against an explicit [T, T] mask."""
    total = q.shape[0]
    mask = torch.zeros(total, total, dtype=torch.bool)
    for s in segments:
        keys = [i for a, b in s.key_runs() for i in range(a, b)]
        for n, row in enumerate(range(s.start, s.end)):
            last = s.keys - s.queries + n
            first = 0 if window is None else max(0, last - window + 1)
            mask[row, keys[first : last + 1]] = True
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 3, 6, 100])
@pytest.mark.parametrize("kind", ["packed", "pairs", "one token"])
def test_attention_over_the_segment_table(window, kind):
    segments = {
        "packed": [Seg(0, 4), Seg(4, 5), Seg(5, 14)],
        "pairs": [Seg(0, 7), Seg(7, 11, (0, 5)), Seg(11, 18), Seg(18, 20, (11, 12))],
        "one token": [Seg(0, 1)],
    }[kind]
    total = segments[-1].end
    q, k, v = rand(total, 4, 8, grad=True), rand(total, 2, 8, grad=True), rand(total, 2, 8, grad=True)
    table = SegmentTable.build(segments, window, q.device)
    got, want = attention(q, k, v, table, 0.3), dense_attention(q, k, v, segments, window, 0.3)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_token_logps_equals_log_softmax(chunk_rows, monkeypatch):
    monkeypatch.setattr(token_logps_file, "CHUNK_BYTES", chunk_rows * 11 * 8)
    hidden, head, targets = rand(7, 5, grad=True), rand(11, 5), torch.randint(11, (7,))
    want = (hidden @ head.T).log_softmax(-1)[torch.arange(7), targets]
    torch.testing.assert_close(token_logps(hidden, head, targets), want)
    assert gradcheck(lambda h: token_logps(h, head, targets), (hidden,))
    logps, stats = token_stats(hidden, head, targets)
    torch.testing.assert_close(logps, want.detach())
    full = (hidden @ head.T).log_softmax(-1).detach()
    torch.testing.assert_close(stats.entropy, -(full.exp() * full).sum(-1))
    assert torch.equal(stats.correct, full.argmax(-1) == targets)


def test_token_logps_is_finite_for_extreme_logits():
    head = torch.tensor([[1e4], [-1e4], [0.0]])
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logps = token_logps(hidden, head, torch.tensor([1, 0]))
    logps.sum().backward()
    assert logps.tolist() == [-2e4, -2e4] and bool(torch.isfinite(hidden.grad).all())
