"""The operations that ``bench.ops`` measures: each with its shapes, and the bytes that it must move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from torch import Tensor

from zephyr_lite.ops import (
    dispatch,
    dropout,
    dropout_products,
    int8,
    int8_weights,
    nf4,
    rms_norm,
    rope,
    swiglu,
    token_logps,
)

EPS = 1e-5

Run = Callable[[], Any]


@dataclass
class Case:
    """One operation at one shape.

    Attributes:
        name: in the table.
        op: as ``dispatch`` knows it.
        bytes: the least that must be read and written.
        ours: the operation; kernel or twin is the dispatch's choice.
        flops: where it is bound by products.
        peers: the same by another library.
    """

    name: str
    op: str
    bytes: int
    ours: Run
    flops: int | None = None
    peers: dict[str, Run] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """What the cases are made of: the model's shape, the number of tokens, where and in which dtype."""

    shape: dict[str, Any]
    tokens: int
    device: torch.device
    dtype: torch.dtype

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device).to(self.dtype)

    def bytes(self, *size: int) -> int:
        return self.dtype.itemsize * math.prod(size)


def cases(bench: Bench) -> list[Case]:
    of_all = (_nf4, _int8, _norm, _rope, _swiglu, _dropout, _logps)
    return [case for of_operation in of_all for case in of_operation(bench)]


def _nf4(bench: Bench) -> list[Case]:
    hidden, inner = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    keys = hidden * bench.shape["num_key_value_heads"] // bench.shape["num_attention_heads"]
    found = []
    for name, rows in (("gate_proj", inner), ("k_proj", keys)):
        plain = bench.random(rows, hidden)
        weight = Params4bit(plain, requires_grad=False, quant_type="nf4", compress_statistics=True)
        weight = weight.to(bench.device)  # which quantizes it
        out, count = torch.empty_like(plain), plain.numel()
        # four bits, eight of scale for each 64, 32 of scale for each 64 * 256
        read = count // 2 + count // 64 + 4 * -(-count // (64 * 256))
        found.append(
            Case(
                f"nf4.dequantize {name}",
                "nf4",
                read + bench.bytes(count),
                lambda weight=weight, out=out: nf4.dequantize(weight, bench.dtype, out=out),
                peers={"bitsandbytes": lambda weight=weight: bnb.dequantize_4bit(weight.data, weight.quant_state)},
            )
        )
    return found


def _int8(bench: Bench) -> list[Case]:
    """Of up_proj, with an adapter of rank 16."""
    hidden, inner, tokens, rank = bench.shape["hidden_size"], bench.shape["intermediate_size"], bench.tokens, 16
    plain, x, out = bench.random(inner, hidden), bench.random(tokens, hidden), bench.random(tokens, inner)
    weight = nf4.sample_weight(plain)
    outliers = int8.largest_channels(x.abs().amax(0))
    kept = len(outliers.channels)
    codes = torch.empty(2, inner * hidden, dtype=torch.int8, device=bench.device)
    scales = int8_weights.static_scales(weight)
    forward = int8.Int8Matrix(codes[0].view(inner, hidden), scales[0], bench.random(inner, kept))
    backward = int8.Int8Matrix(codes[1].view(hidden, inner), scales[1])
    x8, grad8, grad = int8.quantize_rows(x, outliers), int8.quantize_rows(out), bench.random(tokens, hidden)
    z, b, a = bench.random(tokens, rank), bench.random(inner, rank), bench.random(rank, hidden)
    count = inner * hidden
    requantized = count // 2 + count // 64 + 4 * -(-count // (64 * 256)) + count
    moved = bench.bytes(tokens, hidden + kept) + tokens * (hidden + 4)
    runs: list[tuple[str, int, Run]] = [
        ("quantize_rows", moved, lambda: int8.quantize_rows(x, outliers)),
        (
            "requantize up_proj",
            requantized + bench.bytes(inner, kept) + 4 * inner,
            lambda: int8_weights.requantize([(weight, forward, outliers)], bench.dtype, transposed=False),
        ),
        (
            "requantize up_proj, transposed",
            requantized + 4 * hidden,
            lambda: int8_weights.requantize([(weight, backward, None)], bench.dtype, transposed=True),
        ),
    ]
    found = [Case(f"int8.{name}", "int8", moved, run) for name, moved, run in runs]
    # torch: the frozen product alone, in the compute dtype
    for name, moved, ours, theirs in (
        (
            "int8_mm up_proj",
            tokens * (hidden + 2 * kept + 2 * inner) + count,
            lambda: int8.int8_mm(x8, forward, out, (z, b)),
            lambda: torch.mm(x, plain.T, out=out),
        ),
        (
            "int8_mm up_proj, transposed, adding",
            tokens * (inner + 4 * hidden) + count,
            lambda: int8.int8_mm(grad8, backward, grad, (z, a.T), add=True),
            lambda: grad.addmm_(out, plain),
        ),
    ):
        found.append(Case(name, "int8", moved, ours, flops=2 * tokens * count, peers={"torch": theirs}))
    return found


def _norm(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["hidden_size"])
    x, residual, grad, more = (bench.random(*size) for _ in range(4))
    norm = rms_norm.Norm(bench.random(size[1]), EPS)
    _, h, inverse = norm.forward(x, residual)
    one = bench.bytes(*size)
    runs: dict[str, tuple[int, Run]] = {
        "forward": (2, lambda: norm.forward(x)),
        "forward, adding": (4, lambda: norm.forward(x, residual)),
        "backward": (3, lambda: norm.backward(grad, h, inverse)),
        "backward, adding": (4, lambda: norm.backward(grad, h, inverse, more)),
    }
    return [Case(f"rms_norm {name}", "rms_norm", count * one, run) for name, (count, run) in runs.items()]


def _rope(bench: Bench) -> list[Case]:
    shape, tokens = bench.shape, bench.tokens
    heads, key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    # q, k and v lie in one buffer, of which q and k are rotated
    x = bench.random(tokens, heads + 2 * key_heads, width)[:, : heads + key_heads]
    angles = torch.rand(tokens, width // 2, device=bench.device) * 6.28
    cos, sin = (torch.cat([f, f], -1).to(bench.dtype) for f in (angles.cos(), angles.sin()))
    traffic = 2 * bench.bytes(*x.shape) + 2 * bench.bytes(tokens, width // 2)
    return [
        Case("rope forward", "rope", traffic, lambda: rope.rope_(x, cos, sin)),
        Case("rope backward", "rope", traffic, lambda: rope.rope_(x, cos, sin, inverse=True)),
    ]


def _swiglu(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["intermediate_size"])
    gate, up = bench.random(size[0], 2 * size[1]).split(size[1], dim=1)
    grad, out = bench.random(*size), bench.random(*size)
    d_gate, d_up, act = (torch.empty_like(grad) for _ in range(3))
    one = bench.bytes(*size)

    def backward() -> Any:
        return swiglu.swiglu_backward(grad, gate, up, d_gate, d_up, act)

    return [
        Case("swiglu forward", "swiglu", 3 * one, lambda: swiglu.swiglu_forward(gate, up, out)),
        Case("swiglu backward, and forward again", "swiglu", 6 * one, backward),
    ]


def _dropout(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["hidden_size"])
    x, target, out = (bench.random(*size) for _ in range(3))
    streams = torch.arange(size[0], device=bench.device) // 512
    positions = torch.arange(size[0], device=bench.device) % 512
    key = dropout.DropoutKey(0.05, 42, 7, streams, positions).at(3, 1)
    one, rank, products = bench.bytes(*size), 48, dropout_products
    a, d_z = bench.random(rank, size[1]), bench.random(size[0], rank)
    narrow = bench.bytes(rank, size[0] + size[1])
    theirs = {"torch": lambda: F.dropout(x, 0.05, training=True)}
    found = [
        Case("dropout", "dropout", 2 * one, lambda: dropout.drop(x, key, out), peers=theirs),
        Case("dropout backward, adding", "dropout", 3 * one, lambda: dropout.add_dropped_(target, x, key)),
    ]
    # torch: a product of the dropped copy, which other cards run
    for name, moved, ours, apart in (
        ("product", one, partial(products.dropped_product, x, a), partial(products._twin_product, x, a)),
        (
            "input gradient",
            2 * one,
            partial(products.add_input_gradient_, target, d_z, a),
            partial(products._twin_input, target, d_z, a),
        ),
        ("matrix gradient", one, partial(products.matrix_gradient, d_z, x), partial(products._twin_matrix, d_z, x)),
    ):
        peers = {"torch": partial(apart, key)}
        found.append(
            Case(f"dropout {name}, rank {rank}", "dropout_products", moved + narrow, partial(ours, key), peers=peers)
        )
    return found


def _logps(bench: Bench) -> list[Case]:
    size, vocabulary = (bench.tokens, bench.shape["hidden_size"]), bench.shape["vocab_size"]
    hidden = bench.random(*size).requires_grad_()
    head = bench.random(vocabulary, size[1]).mul_(0.02)
    targets = torch.randint(vocabulary, (size[0],), device=bench.device)
    grad = torch.randn(size[0], device=bench.device)

    def ours() -> Any:
        return torch.autograd.grad(token_logps.token_logps(hidden, head, targets), hidden, grad)

    def plain() -> Any:
        return torch.autograd.grad(F.cross_entropy((hidden @ head.T).float(), targets), hidden)

    # in it, of a chunk of the logits: what is bound by memory, the rest is products
    rows = min(size[0], max(1, token_logps.CHUNK_BYTES // (4 * vocabulary)))
    logits = bench.random(rows, vocabulary)

    def softmax() -> Any:
        run = token_logps._kernel if dispatch.runs_triton("token_logps", logits) else token_logps._twin
        return run(logits, targets[:rows], False, True)

    return [
        Case("token_logps, softmax of a chunk", "token_logps", 2 * bench.bytes(rows, vocabulary), softmax),
        Case(
            "token_logps, forward and backward",
            "token_logps",
            bench.bytes(2 * size[0] + vocabulary, size[1]),
            ours,
            flops=4 * vocabulary * size[0] * size[1],
            peers={"torch": plain},
        ),
    ]
