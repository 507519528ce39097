"""Every Triton kernel against its plain twin, in triton's interpreter where there is no GPU (invariant 8 of the design)."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from torch import Tensor

pytest.importorskip("triton")

from tests.numeric import apart
from zephyr_lite.ops import nf4, rms_norm, rope, swiglu, token_logps
from zephyr_lite.ops.dispatch import runs_triton, twins
from zephyr_lite.ops.dropout import DropoutKey, add_dropped_, drop, dropout_mask, dropout_scale
from zephyr_lite.ops.dropout_products import add_input_gradient_, dropped_product, matrix_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("kernels")


def rand(*shape, device=DEVICE, dtype=torch.float32, scale=1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(device, dtype)


def both(op: str, run, x: Tensor):
    """What the kernel gives, and the twin."""
    assert runs_triton(op, x)
    kernel = run()
    with twins():
        assert not runs_triton(op, x)
        return kernel, run()


def hold(what: str, kernel: Tensor, twin: Tensor, exact: Tensor) -> None:
    """Invariant 8. A kernel that returns zeros has an error of ‖exact‖, which no twin comes near."""
    assert kernel.dtype == twin.dtype and kernel.shape == twin.shape == exact.shape, what
    norm = exact.norm().item()
    error, twins_error = ((t.double() - exact).norm().item() for t in (kernel, twin))
    share = 1e-6 if kernel.dtype == torch.float32 else 1e-3
    if kernel.dtype == torch.bfloat16 and kernel.device.type == "cpu":
        share = 2**-6  # the interpreter truncates: a unit in the last place for each of up to two roundings
    assert norm > 0 and twins_error < 0.1 * norm, what
    assert error <= 1.1 * twins_error + share * norm, f"{what}: {error / norm:.2e} beside {twins_error / norm:.2e}"


def same(kernel: Tensor, exact: Tensor) -> None:
    """Equal to the bit; in bfloat16 the interpreter may be one unit in the last place off."""
    if kernel.dtype == torch.bfloat16 and kernel.device.type == "cpu":
        assert (kernel.view(torch.int16).int() - exact.view(torch.int16).int()).abs().max() <= 1
    else:
        assert torch.equal(kernel, exact)


# NF4


def stored(shape, quant_type="nf4", blocksize=64, nested=256, device=DEVICE) -> Params4bit:
    """A weight in 4 bits, its scales in blocks of `nested`, or not nested (0)."""
    # one row a block while quantizing: whatever bitsandbytes' CPU kernels do with rows that are no whole blocks
    flat = torch.randn(shape[0] * shape[1], device=device) * 0.1
    data, state = bnb.quantize_4bit(flat, blocksize=blocksize, quant_type=quant_type)
    state.shape = torch.Size(shape)
    if nested:
        offset = state.absmax.mean()
        codes, state2 = bnb.quantize_blockwise(state.absmax - offset, blocksize=nested)
        state.absmax, state.offset, state.state2, state.nested = codes, offset, state2, True
    return Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)


def by_hand(weight: Params4bit) -> Tensor:
    """[out, in] float32, by the definition."""
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        scales = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.int()] * scales + state.offset
    packed = weight.data.view(-1)
    values = state.code[torch.stack([packed >> 4, packed & 15], 1).view(-1).int()][: state.shape.numel()]
    return (values * absmax.repeat_interleave(state.blocksize)[: values.numel()]).view(state.shape)


def compare_nf4(device, dtype, shape, **options) -> None:
    weight = stored(shape, device=device, **options)
    exact = by_hand(weight)
    assert exact.norm() > 0
    kernel, twin = both("nf4", lambda: nf4.dequantize(weight, dtype), exact.to(dtype))
    assert kernel.shape == shape and torch.equal(twin, exact.to(dtype))
    same(kernel, exact.to(dtype))
    scratch = torch.full((shape[0] + 2, shape[1]), 7.0, dtype=dtype, device=device)
    for _ in both("nf4", lambda: nf4.dequantize(weight, dtype, scratch[1:-1]), scratch):
        same(scratch[1:-1], exact.to(dtype))
        assert (scratch[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 576), {}),
        ((1, 64), {"nested": 0}),
        ((64, 192), {"nested": 64}),  # blocks of scales that are no multiple of what a program takes
        ((5, 100), {}),  # rows that are no whole blocks, and a last block that is not full
        ((4, 112), {"quant_type": "fp4", "nested": 0}),
        ((7, 256), {"quant_type": "fp4", "blocksize": 128}),
        ((2, 1024), {"blocksize": 1024}),  # above, bitsandbytes compiles what it computes on a CPU
        ((3, 21), {"blocksize": 32}),  # an odd number of values: half of the last byte
        ((40, 64), {"blocksize": 32}),
    ],
)
def test_nf4_dequantizes_to_the_bit(dtype, shape, options):
    compare_nf4(DEVICE, dtype, shape, **options)


@pytest.mark.parametrize("nested", [True, False])
def test_nf4_equals_bitsandbytes(nested):
    data, state = bnb.quantize_4bit(rand(70, 576), quant_type="nf4", compress_statistics=nested)
    weight = Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
    assert torch.equal(nf4.dequantize(weight, torch.float32), bnb.dequantize_4bit(data, state))
    # as bnb_4bit_quant_storage has it
    stored_otherwise = Params4bit(data.view(-1).view(torch.bfloat16)[:, None], quant_state=state, bnb_quantized=True)
    assert torch.equal(nf4.dequantize(stored_otherwise, torch.float32), bnb.dequantize_4bit(data, state))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("width", [128, 100])  # whole blocks, and weights that end within one
def test_nf4_weights_beside_each_other_equal_bitsandbytes(nested, width):
    """All weights in one launch; other elements of the buffer do not change."""
    weights, wanted, start = [], torch.full((60_000,), 7.0, device=DEVICE), 16
    for rows in (300, 1, 70, 43):
        data, state = bnb.quantize_4bit(rand(rows * width), quant_type="nf4", compress_statistics=nested)
        exact = bnb.dequantize_4bit(data, state).view(-1)
        state.shape = torch.Size((rows, width))
        weights.append((start, Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)))
        wanted[start : start + len(exact)] = exact
        start = -(-(start + len(exact)) // 16) * 16 + 16
    buffer = torch.full_like(wanted, 7.0)
    assert runs_triton("nf4", buffer)
    nf4.dequantize_into(buffer, weights)
    assert torch.equal(buffer, wanted)
    with twins():
        nf4.dequantize_into(buffer.fill_(7.0), weights)
    assert torch.equal(buffer, wanted)


def test_nf4_refuses_a_buffer_that_does_not_fit():
    weight = stored((4, 64))
    for out in (torch.empty(4, 128)[:, ::2], torch.empty(5, 64), torch.empty(4, 64, dtype=torch.float16)):
        with pytest.raises(ValueError, match="contiguous"):
            nf4.dequantize(weight, torch.float32, out.to(DEVICE))


# RMSNorm


def compare_rms_norm(device, dtype, rows, width) -> None:
    eps = 1e-5 if width > 1 else 1.0  # of one channel only eps leaves a gradient
    x, residual, grad, more = (rand(rows, width, device=device, dtype=dtype) for _ in range(4))
    weight = rand(width, device=device, dtype=dtype)
    for add in (True, False):
        kernel, twin = both("rms_norm", lambda r=residual if add else None: rms_norm.Norm(weight, eps).forward(x, r), x)
        h = (x.double() + residual.double() if add else x.double()).requires_grad_()
        inverse = (h.square().mean(-1) + eps).rsqrt()
        y = weight.double() * h * inverse[:, None]
        (dx,) = torch.autograd.grad(y, h, grad.double())
        hold("y", kernel[0], twin[0], y.detach())
        hold("h", kernel[1], twin[1], h.detach())
        # of the sum as it was rounded: what is kept for the backward pass is what was normalized
        again = rms_norm.Norm(weight, eps).forward(kernel[1])[0]
        assert (kernel[0].double() - again.double()).norm() <= 2e-4 * y.norm()
        assert add or kernel[1] is x
        if not add:
            hold("inverse", kernel[2], twin[2], inverse.detach())
        for extra, exact in ((None, dx), (more, dx + more.double())):

            def back(h=twin[1], inverse=twin[2], extra=extra):
                return rms_norm.Norm(weight, eps).backward(grad, h, inverse, extra)

            hold(f"dx {add}", *both("rms_norm", back, x), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 576), (3, 64), (2, 1000), (1, 8192)])
def test_rms_norm(dtype, rows, width):
    compare_rms_norm(DEVICE, dtype, rows, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm_of_heads_in_a_strided_buffer_and_with_an_offset(dtype, offset):
    """q's heads of a fused [T, (H + 2 H_kv) d] buffer, into a buffer for q and k; the gradient where its own gradient was."""
    tokens, heads, width = 3, 5, 80
    x, grad = (rand(tokens, heads + 4, width, dtype=dtype)[:, :heads] for _ in range(2))
    norm = rms_norm.Norm(rand(width, dtype=dtype), 1e-5, offset)
    h = x.double().requires_grad_()
    inverse = (h.square().mean(-1) + norm.eps).rsqrt()
    y = (norm.weight.double() + offset) * h * inverse[..., None]
    (dx,) = torch.autograd.grad(y, h, grad.double())

    def run():
        out = torch.full((tokens, heads + 2, width), 7.0, dtype=dtype, device=DEVICE)
        found, same_x, scale = norm.forward(x, out=out[:, :heads])
        assert same_x is x and found.data_ptr() == out.data_ptr() and (out[:, heads:] == 7).all()
        whole = torch.cat([grad, grad], 1)
        assert norm.backward(whole[:, :heads], x, scale, out=whole[:, :heads]).data_ptr() == whole.data_ptr()
        assert torch.equal(whole[:, heads:], grad)
        return found, scale, whole[:, :heads]

    for what, kernel, twin, exact in zip(("y", "inverse", "dx"), *both("rms_norm", run, x), (y, inverse, dx)):
        hold(what, kernel, twin, exact.detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_an_offset_rounds_once(dtype):
    """(1 + weight) in float32, as Gemma's layers compute it; with the residual's sum before it."""
    x, residual, grad = (rand(3, 576, dtype=dtype) for _ in range(3))
    norm = rms_norm.Norm(rand(576, dtype=dtype), 1e-6, True)
    total = (x + residual).float()
    y = (total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + norm.weight.float())).to(dtype)
    h = (x.double() + residual.double()).requires_grad_()
    exact = (1 + norm.weight.double()) * h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    (dx,) = torch.autograd.grad(exact, h, grad.double())
    kernel, twin = both("rms_norm", lambda: norm.forward(x, residual), x)
    assert apart(twin[0], y) < (1e-6 if dtype == torch.float32 else 1e-3)
    hold("y", kernel[0], twin[0], exact.detach())
    back = both("rms_norm", lambda: norm.backward(grad, twin[1], twin[2], grad), x)
    hold("dx", *back, dx + grad.double())


def test_rms_norm_of_large_values_and_of_strided_rows():
    x = rand(3, 576, dtype=torch.float16, scale=300)  # squares overflow float16
    y, _, inverse = rms_norm.Norm(torch.ones_like(x[0]), 1e-5).forward(x)
    assert torch.isfinite(y).all() and torch.isfinite(inverse).all() and abs(y.float().std() - 1) < 0.1
    wide = rand(3, 640)
    norm, residual = rms_norm.Norm(rand(576), 1e-5), rand(3, 600)[:, :576]
    got = norm.forward(wide[:, :576], residual)
    for a, b in zip(got, norm.forward(wide[:, :576].clone(), residual.clone())):
        torch.testing.assert_close(a, b)  # a card may add in another order


# Rotary embeddings


def compare_rope(device, dtype, tokens, heads, width) -> None:
    angle = torch.randn(tokens, width // 2).to(device)
    cos, sin = (torch.cat([f(angle), f(angle)], -1).to(dtype) for f in (torch.cos, torch.sin))
    fused = rand(tokens, (heads + 2) * width, device=device, dtype=dtype)
    for inverse in (False, True):

        def run(inverse=inverse):
            buffer = fused.clone()
            x = buffer[:, : heads * width].view(tokens, heads, width)
            assert rope.rope_(x, cos, sin, inverse) is x
            assert torch.equal(buffer[:, heads * width :], fused[:, heads * width :])
            return x

        a, b = fused[:, : heads * width].view(tokens, heads, width).double().chunk(2, -1)
        c, s = cos[:, None, : width // 2].double(), sin[:, None, : width // 2].double() * (-1 if inverse else 1)
        hold(f"inverse={inverse}", *both("rope", run, fused), torch.cat([a * c - b * s, b * c + a * s], -1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (3, 12, 64), (2, 40, 128), (2, 3, 80)])
def test_rope(dtype, tokens, heads, width):
    compare_rope(DEVICE, dtype, tokens, heads, width)


def test_rope_refuses_heads_that_are_not_dense():
    cos = torch.ones(2, 8, device=DEVICE)
    for x in (rand(2, 4, 16)[..., ::2], rand(2, 4, 16)[..., :8], rand(4, 2, 8).transpose(0, 1)):
        with pytest.raises(ValueError, match="dense"):
            rope.rope_(x, cos, cos)


# SwiGLU


def compare_swiglu(device, dtype, rows, width, activation="silu") -> None:
    halves, grad = (
        rand(rows, 2 * width, device=device, dtype=dtype, scale=3),
        rand(rows, width, device=device, dtype=dtype),
    )
    gate, up = halves.chunk(2, -1)
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    product = (F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * u
    exact = (*torch.autograd.grad(product, (g, u), grad.double()), product.detach())
    name = {"activation": activation}
    hold("forward", *both("swiglu", lambda: swiglu.swiglu_forward(gate, up, **name), gate), exact[2])
    out = torch.empty_like(grad)
    assert swiglu.swiglu_forward(gate, up, out, **name) is out
    assert torch.equal(out, swiglu.swiglu_forward(gate, up, **name))

    def in_place():
        buffer, act = halves.clone(), grad.clone()
        d_gate, d_up = buffer.chunk(2, -1)
        result = swiglu.swiglu_backward(act, d_gate, d_up, d_gate, d_up, act, **name)
        assert all(a is b for a, b in zip(result, (d_gate, d_up, act)))
        return result

    for run in (lambda: swiglu.swiglu_backward(grad, gate, up, **name), in_place):
        for what, kernel, twin, right in zip(("d_gate", "d_up", "act"), *both("swiglu", run, gate), exact):
            hold(what, kernel, twin, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 576), (2, 1536)])
def test_swiglu(dtype, rows, width):
    compare_swiglu(DEVICE, dtype, rows, width)
    compare_swiglu(DEVICE, dtype, rows, width, "gelu_pytorch_tanh")


def test_swiglu_of_extreme_gates():
    gate = torch.tensor([[1e4, -1e4, 0.0, 80.0, -80.0]], device=DEVICE)
    up = grad = torch.full_like(gate, 2.0)
    d_gate, d_up, act = swiglu.swiglu_backward(grad, gate, up)
    assert all(torch.isfinite(t).all() for t in (d_gate, d_up, act))
    torch.testing.assert_close(d_gate, torch.tensor([[4.0, 0, 2.0, 4.0, 0]], device=DEVICE))
    torch.testing.assert_close(act, torch.tensor([[2e4, 0, 0, 160.0, 0]], device=DEVICE))
    torch.testing.assert_close(swiglu.swiglu_forward(gate, up), act)
    d_gate, d_up, act = swiglu.swiglu_backward(grad, gate, up, activation="gelu_pytorch_tanh")
    torch.testing.assert_close(d_gate, torch.tensor([[4.0, 0, 2.0, 4.0, 0]], device=DEVICE))
    torch.testing.assert_close(act, torch.tensor([[2e4, 0, 0, 160.0, 0]], device=DEVICE))


# Dropout


def compare_dropout(device, dtype, rows, width, p=0.3) -> None:
    streams = torch.randint(-(2**62), 2**62, (rows,), device=device)
    key = DropoutKey(p, 2**35 + 1, 17, streams, torch.arange(rows, device=device) + 2**31, 31, 3)
    x, target = rand(rows, width, device=device, dtype=dtype) + 9, rand(rows, width, device=device, dtype=dtype)
    stays = dropout_mask(key, width) != 0
    exact = torch.where(stays, x, torch.zeros_like(x))
    for got in both("dropout", lambda: drop(x, key), x):
        assert torch.equal(got, exact)
    out = torch.empty_like(x)
    assert drop(x, key, out) is out and torch.equal(out, exact)
    strided = torch.cat([x, x], 1)[:, :width]
    assert drop(strided, key, strided) is strided and torch.equal(strided, exact)
    kernel, twin = both("dropout", lambda: add_dropped_(target.clone(), x, key), x)
    same(kernel, twin)
    assert torch.equal(kernel[~stays], target[~stays]) and not torch.equal(kernel, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 40), (5, 576), (2, 1100)])
def test_dropout_has_the_bits_of_its_mask(dtype, rows, width):
    compare_dropout(DEVICE, dtype, rows, width)


@pytest.mark.parametrize(("p", "left"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_all_and_of_nothing(p, left):
    key = DropoutKey(p, 1, 2, torch.arange(4, device=DEVICE), torch.arange(4, device=DEVICE))
    x = rand(4, 500)
    kernel, twin = both("dropout", lambda: drop(x, key), x)
    assert torch.equal(kernel, x * left) and torch.equal(twin, x * left)


# Products under dropout


def compare_dropout_products(device, dtype, rows, width, rank, p=0.3) -> None:
    streams = torch.randint(-(2**62), 2**62, (rows,), device=device)
    key = DropoutKey(p, 2**35 + 1, 17, streams, torch.arange(rows, device=device) + 2**31, 31, 3)
    x, target, d_z, a = (
        rand(*shape, device=device, dtype=dtype)
        for shape in ((rows, width + 8), (rows, width), (rows, rank), (rank, width))
    )
    x, scale = x[:, :width], dropout_scale(key, width, torch.float64)
    of_x, of_z, of_a = x.double() * scale, d_z.double(), a.double()
    for what, run, exact in (
        ("product", lambda: dropped_product(x, a, key), of_x @ of_a.T),
        ("input", lambda: add_input_gradient_(target.clone(), d_z, a, key), target.double() + of_z @ of_a * scale),
        ("matrix", lambda: matrix_gradient(d_z, x, key), of_z.T @ of_x),
    ):
        kernel, twin = both("dropout_products", run, x)
        hold(what, kernel, twin, exact)
        assert torch.equal(run(), kernel)
        if what == "input":
            assert torch.equal(kernel[scale == 0], target[scale == 0])
    assert kernel.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "width", "rank"),
    [
        (1, 40, 1),
        (33, 576, 16),
        (70, 300, 48),
        (5, 130, 256),
        (2049, 24, 8),  # two sums over the tokens
        (65, 64, 130),
    ],
)
def test_products_under_dropout(dtype, rows, width, rank):
    compare_dropout_products(DEVICE, dtype, rows, width, rank)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="no CUDA GPU")
@pytest.mark.parametrize(("width", "rank"), [(4096, 48), (4096, 384), (14336, 16)])
def test_products_under_dropout_at_the_recipes_sizes(width, rank):
    compare_dropout_products(DEVICE, torch.bfloat16, 4096, width, rank, p=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_under_dropout_without_a_kernel_are_dropped_copies(dtype):
    key = DropoutKey(0.3, 1, 2, torch.arange(3, device=DEVICE), torch.arange(3, device=DEVICE))
    x, d_z, a = (rand(*shape, dtype=dtype) for shape in ((3, 40), (3, 2), (2, 40)))
    with twins():
        wanted = drop(x, key) @ a.T / 0.7, x + drop(d_z / 0.7 @ a, key), (d_z / 0.7).T @ drop(x, key)
        found = dropped_product(x, a, key), add_input_gradient_(x.clone(), d_z, a, key), matrix_gradient(d_z, x, key)
    assert all(map(torch.equal, found, wanted))


# token_logps


def compare_token_logps(device, dtype, rows, width, vocabulary, scale=1.0) -> None:
    hidden, head = rand(rows, width, device=device, dtype=dtype), rand(vocabulary, width, device=device, dtype=dtype)
    targets = torch.randint(vocabulary, (rows,)).to(device)
    hidden *= scale
    hidden[0] = head[targets[0]] * (2 / width)  # one that is right beyond any rounding, and not certain
    upstream = rand(rows, device=device)

    def run():
        leaf = hidden.clone().requires_grad_()
        logps, stats = token_logps.token_logps(leaf, head, targets, stats=True)
        bare = token_logps.token_logps(hidden, head, targets)  # keeps nothing, writes nothing back
        torch.testing.assert_close(bare, logps.detach(), rtol=1e-5, atol=1e-5)
        assert not stats.entropy.requires_grad
        return logps, *torch.autograd.grad(logps, leaf, upstream), stats

    kernel, twin = both("token_logps", run, hidden)
    leaf = hidden.double().requires_grad_()
    full = (leaf @ head.double().T).log_softmax(-1)
    logps = full.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(logps, leaf, upstream.double())
    full = full.detach()
    hold("logps", kernel[0], twin[0], logps.detach())
    hold("gradient", kernel[1], twin[1], gradient)
    hold("entropy", kernel[2].entropy, twin[2].entropy, -(full.exp() * full).sum(-1))
    assert torch.equal(kernel[2].correct, twin[2].correct)
    assert kernel[2].correct[0] and bool(kernel[2].correct.all()) == (rows == 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (5, 448), (2, 1000), (3, 40_000)])
def test_token_logps(dtype, rows, vocabulary, monkeypatch):
    monkeypatch.setattr(token_logps, "CHUNK_BYTES", 2 * vocabulary * 4)  # more than one chunk, the last not full
    compare_token_logps(DEVICE, dtype, rows, 64, vocabulary, scale=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_logps_of_extreme_logits(dtype):
    head = torch.tensor([[1e4], [-1e4], [0.0]], device=DEVICE, dtype=dtype)
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], device=DEVICE, dtype=dtype, requires_grad=True)
    targets = torch.tensor([1, 0, 0], device=DEVICE)
    logps, stats = token_logps.token_logps(hidden, head, targets, stats=True)
    (gradient,) = torch.autograd.grad(logps.sum(), hidden)
    high = head[0].float().item()  # 1e4 has no exact bfloat16
    assert logps.tolist() == [-2 * high, -2 * high, 0.0] and stats.correct.tolist() == [False, False, True]
    assert stats.entropy.tolist() == [0.0, 0.0, 0.0]
    assert gradient[:, 0].tolist() == [-2 * high, 2 * high, 0.0]


def test_a_tie_counts_as_correct():
    hidden, head = torch.zeros(1, 4, device=DEVICE), rand(10, 4)
    for run in both(
        "token_logps", lambda: token_logps.token_logps(hidden, head, torch.tensor([3], device=DEVICE), True), hidden
    ):
        assert run[1].correct.tolist() == [True]


def test_a_flat_distribution_keeps_its_digits_in_float16():
    """Every probability is under float16's smallest normal number; the expected embedding must not notice."""
    vocabulary = 40_000
    logits = torch.zeros(1, vocabulary, dtype=torch.float16, device=DEVICE)
    chunk = token_logps._kernel(logits, torch.tensor([0], device=DEVICE), False, True)
    assert abs(chunk.weights.double().sum().item() / chunk.divisor.item() - 1) < 1e-3


def test_nothing_in_nothing_out():
    empty = torch.empty(0, 64, device=DEVICE)
    norm, none = rms_norm.Norm(torch.ones(64, device=DEVICE), 1e-5), torch.empty(0, dtype=torch.int64, device=DEVICE)
    y, h, inverse = norm.forward(empty, empty)
    assert y.shape == h.shape == (0, 64) and inverse.shape == (0,)
    assert norm.backward(empty, empty, inverse, empty).shape == (0, 64)
    assert rope.rope_(empty.view(0, 4, 16), empty[:, :16], empty[:, :16]).shape == (0, 4, 16)
    assert swiglu.swiglu_forward(empty, empty).shape == (0, 64)
    assert [t.shape for t in swiglu.swiglu_backward(empty, empty, empty)] == [(0, 64)] * 3
    key = DropoutKey(0.1, 1, 2, none, none)
    assert drop(empty, key).shape == add_dropped_(empty, empty, key).shape == (0, 64)
    half, of_z, a = empty.half(), empty[:, :3].half(), torch.zeros(3, 64, dtype=torch.float16, device=DEVICE)
    assert dropped_product(half, a, key).shape == (0, 3) and add_input_gradient_(half, of_z, a, key).shape == (0, 64)
    assert torch.equal(matrix_gradient(of_z, half, key), torch.zeros(3, 64, device=DEVICE))
    hidden = empty.clone().requires_grad_()
    logps, stats = token_logps.token_logps(hidden, rand(9, 64), none, stats=True)
    logps.sum().backward()
    assert logps.shape == stats.entropy.shape == stats.correct.shape == (0,) and hidden.grad.shape == (0, 64)
