"""Operations against autograd over their formulas; the kernels and their twins are in tests/contract/test_kernels.py."""

import subprocess
import sys
from itertools import pairwise

import bitsandbytes.functional as bnb
import pytest
import torch

from zephyr_lite.ops import attention as attention_file
from zephyr_lite.ops.attention import attention_backward, attention_forward
from zephyr_lite.ops.dropout import DropoutKey, dropout_mask, dropout_scale
from zephyr_lite.ops.nf4 import dequantize, is_quantized
from zephyr_lite.ops.segments import SegmentTable, segment_starts

D = torch.float64


def rand(*shape, grad=False, dtype=D):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# the pattern of seed 42, step 3, layer 1, site 2: what a run's dropout is must not change between versions
PATTERN = [".x.x..xxxxx....x...x.xx...x..xx.", ".xxx.xxx..xxxx..xx..xx...x.x.x.x"]


def test_the_dropout_pattern_is_what_it_was():
    key = DropoutKey(0.5, 42, 3, torch.tensor([0, 8]), torch.tensor([0, 5]), layer=1, site=2)
    rows = ["".join("x" if stays else "." for stays in row) for row in dropout_mask(key, 32).bool().tolist()]
    assert rows == PATTERN


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


class UnderAutograd(torch.autograd.Function):
    """Attention's forward and backward as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, table, scale):
        out, lse = attention_forward(q, k, v, table, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = (table, scale)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        heads = [q.shape[1], k.shape[1], k.shape[1]]
        into = q.new_empty(q.shape[0], sum(heads), q.shape[2])
        attention_backward(grad.contiguous(), q, k, v, out, lse, *ctx.options, into)
        return (*into.split(heads, 1), None, None)


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


@pytest.mark.parametrize("at_once", [2**24, 20])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("kind", ["packed", "pairs", "one token"])
def test_attention_over_the_segment_table(window, kind, at_once, monkeypatch):
    """A segment whole, and in blocks of queries."""
    monkeypatch.setattr(attention_file, "_AT_ONCE", at_once)
    segments = {
        "packed": [Seg(0, 4), Seg(4, 5), Seg(5, 14)],
        "pairs": [Seg(0, 7), Seg(7, 11, (0, 5)), Seg(11, 18), Seg(18, 20, (11, 12))],
        "one token": [Seg(0, 1)],
    }[kind]
    total = segments[-1].end
    q, k, v = rand(total, 4, 8, grad=True), rand(total, 2, 8, grad=True), rand(total, 2, 8, grad=True)
    table = SegmentTable.build(segments, window, segment_starts(segments))
    got, want = UnderAutograd.apply(q, k, v, table, 0.3), dense_attention(q, k, v, segments, window, 0.3)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream)):
        torch.testing.assert_close(a, b)


def test_segments_of_like_length_run_together():
    """The memory-efficient kernel gets every segment once, in order, in runs that waste no more than half of their room."""
    lengths = [20, 2000, 30, 31, 29, 1, 1, 900, 1000, 5]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    segments = [Seg(a, b, (0, 7) if i == 3 else None) for i, (a, b) in enumerate(pairwise(starts))]
    runs = attention_file._like_lengths(SegmentTable.build(segments, None, segment_starts(segments)))
    assert [n for run in runs for n in run.query_lengths] == lengths and 1 < len(runs) < len(lengths)
    assert all(len(n) * max(n) <= 2 * sum(n) for n in (run.query_lengths for run in runs))


class MemoryEfficientKernel:
    """PyTorch's memory-efficient kernel by the masks in its sources (2.11 to 2.14): kernel_forward.h shifts the window by
    ``causal_diagonal_offset``, and kernel_backward.h ("Apply mask") does not."""

    def __init__(self):
        self.calls = 0

    def segments(self, q, k, cu_queries, cu_keys, scale, window, shifts_window):
        self.calls += 1
        for number, ((a, b), (c, d)) in enumerate(zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()))):
            i, j, shift = torch.arange(b - a)[:, None], torch.arange(d - c), (d - c) - (b - a)
            hidden = j > i + shift
            if window is not None:
                hidden |= j <= i + shift * shifts_window - window
            scores = torch.einsum("qhd,khd->hqk", q[0, a:b], k[0, c:d]) * scale
            yield number, slice(a, b), slice(c, d), scores.masked_fill(hidden, -torch.inf)

    def forward(
        self, q, k, v, bias, cu_queries, cu_keys, most_q, most_k, dropout, mask, with_lse, *, scale, window_size
    ):
        assert (bias, dropout, mask, with_lse) == (None, 0.0, 2, True)
        out, lse = torch.empty_like(q), q.new_full((len(cu_queries) - 1, q.shape[2], -(-most_q // 32) * 32), torch.inf)
        for n, a, c, scores in self.segments(q, k, cu_queries, cu_keys, scale, window_size, True):
            out[0, a] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[0, c])
            lse[n, :, : a.stop - a.start] = scores.logsumexp(-1)
        return out, lse, None, None, most_q, most_k

    def backward(
        self,
        grad,
        q,
        k,
        v,
        bias,
        out,
        cu_queries,
        cu_keys,
        most_q,
        most_k,
        lse,
        dropout,
        seed,
        offset,
        mask,
        with_bias,
        *,
        scale,
        window_size,
    ):
        assert (bias, dropout, mask, with_bias) == (None, 0.0, 2, False)
        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for n, a, c, scores in self.segments(q, k, cu_queries, cu_keys, scale, window_size, False):
            p = (scores - lse[n, :, : a.stop - a.start, None]).exp()
            inner = (grad[0, a] * out[0, a]).sum(-1).T[..., None]
            ds = p * (torch.einsum("qhd,khd->hqk", grad[0, a], v[0, c]) - inner) * scale
            d_q[0, a] = torch.einsum("hqk,khd->qhd", ds, k[0, c])
            d_k[0, c] = torch.einsum("hqk,qhd->khd", ds, q[0, a])
            d_v[0, c] = torch.einsum("hqk,qhd->khd", p, grad[0, a])
        return d_q, d_k, d_v, None


@pytest.mark.parametrize("at_once", [2**24, 100])
@pytest.mark.parametrize("window", [None, 1, 4, 12])
def test_the_memory_efficient_kernels_gradients_under_a_window(window, at_once, monkeypatch):
    """Packed segments, shared prompts, and both in one table; windows shorter and longer than the keys."""
    kernel = MemoryEfficientKernel()
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", kernel.forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", kernel.backward)
    monkeypatch.setattr(attention_file, "backend", lambda q: "efficient")
    monkeypatch.setattr(attention_file, "_AT_ONCE", at_once)
    segments = [Seg(0, 9), Seg(9, 14, (0, 6)), Seg(14, 15), Seg(15, 31), Seg(31, 34, (15, 24)), Seg(34, 36, (31, 33))]
    q, k, v = rand(36, 4, 8, grad=True), rand(36, 2, 8, grad=True), rand(36, 2, 8, grad=True)
    table = SegmentTable.build(segments, window, segment_starts(segments))
    got, want = UnderAutograd.apply(q, k, v, table, 0.3), dense_attention(q, k, v, segments, window, 0.3)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), upstream), torch.autograd.grad(want, (q, k, v), upstream)):
        torch.testing.assert_close(a, b)
    assert kernel.calls  # what it computes rightly is left to it


WITHOUT_TRITON = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
import torch
from zephyr_lite.ops import attention, dispatch, dropout, lora, nf4, rms_norm, rope, swiglu, token_logps
assert not dispatch.HAVE_TRITON and not any(name.split(".")[0] == "triton" for name in sys.modules)
ones = torch.ones(2, 8)
assert not dispatch.runs_triton("swiglu", ones)
assert dispatch.check_kernels(torch.device("cpu"), torch.float32) == []
print(swiglu.swiglu_forward(ones, ones)[0, 0].item())
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item())


def test_nf4_reads_bitsandbytes_storage():
    weight = torch.randn(96, 64)
    data, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    from bitsandbytes.nn import Params4bit

    stored = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
    assert is_quantized(stored) and not is_quantized(weight)
    torch.testing.assert_close(dequantize(stored, torch.float32), bnb.dequantize_4bit(data, state), rtol=0, atol=0)
    assert dequantize(weight, torch.float32).data_ptr() == weight.data_ptr()
    exact = dequantize(stored, torch.float32)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):  # whatever its own state says, and without changing it
        assert torch.equal(dequantize(stored, dtype), exact.to(dtype)) and state.dtype == torch.float32
    for source, kind in ((stored, torch.float16), (weight, torch.float64), (weight, torch.float32)):
        scratch = torch.zeros(98, 64, dtype=kind)
        assert dequantize(source, kind, scratch[1:-1]).data_ptr() == scratch[1:].data_ptr()
        assert torch.equal(scratch[1:-1], dequantize(source, kind)) and not scratch[[0, -1]].any()
