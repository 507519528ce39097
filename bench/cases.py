"""The operations that ``bench.ops`` measures: each with its shapes, the bytes that it must move, and what does the same
elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Params4bit
from torch import Tensor

from zephyr_lite.ops import dispatch, dropout, nf4, rms_norm, rope, swiglu, token_logps

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
        peers: who → makes what does the same there; it may raise, where a version has no such function.
        peer_bytes: of a peer that computes less.
    """

    name: str
    op: str
    bytes: int
    ours: Run
    flops: int | None = None
    peers: dict[str, Callable[[], Run]] = field(default_factory=dict)
    peer_bytes: dict[str, int] = field(default_factory=dict)


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
        count = self.dtype.itemsize
        for n in size:
            count *= n
        return count


def cases(bench: Bench) -> list[Case]:
    return [*_nf4(bench), *_norm(bench), *_rope(bench), *_swiglu(bench), *_dropout(bench), *_logps(bench)]


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
                peers={
                    "bitsandbytes": lambda weight=weight: lambda: bnb.dequantize_4bit(weight.data, weight.quant_state),
                    "unsloth": lambda weight=weight: _unsloth_dequantize(weight),
                },
            )
        )
    return found


def _unsloth_dequantize(weight: Any) -> Run:
    run = importlib.import_module("unsloth.kernels").fast_dequantize
    return lambda: run(weight.data, weight.quant_state)


def _norm(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["hidden_size"])
    x, residual, grad, more = (bench.random(*size) for _ in range(4))
    weight = bench.random(size[1])
    _, h, inverse = rms_norm.rms_norm_forward(x, weight, EPS, residual)
    one = bench.bytes(*size)
    leaf = x.clone().requires_grad_()

    def liger_forward() -> Run:
        run = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
        return lambda: run(leaf, weight, EPS)

    def liger_added() -> Run:
        run = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction.apply
        return lambda: run(leaf, residual, weight, EPS)

    def unsloth_forward() -> Run:
        run = importlib.import_module("unsloth.kernels").fast_rms_layernorm
        layer = SimpleNamespace(weight=weight, variance_epsilon=EPS)
        return lambda: run(layer, leaf)

    return [
        Case(
            "rms_norm forward",
            "rms_norm",
            2 * one,
            lambda: rms_norm.rms_norm_forward(x, weight, EPS),
            peers={"liger": liger_forward, "unsloth": unsloth_forward},
        ),
        Case(
            "rms_norm forward, adding",
            "rms_norm",
            4 * one,
            lambda: rms_norm.rms_norm_forward(x, weight, EPS, residual),
            peers={"liger": liger_added},
        ),
        Case(
            "rms_norm backward",
            "rms_norm",
            3 * one,
            lambda: rms_norm.rms_norm_backward(grad, h, weight, inverse),
            peers={"liger": _backward(liger_forward, leaf, grad), "unsloth": _backward(unsloth_forward, leaf, grad)},
        ),
        Case(
            "rms_norm backward, adding",
            "rms_norm",
            4 * one,
            lambda: rms_norm.rms_norm_backward(grad, h, weight, inverse, more),
            peers={"liger": _backward(liger_added, leaf, (grad, more))},
        ),
    ]


def _backward(forward: Callable[[], Run], inputs: Any, grads: Any) -> Callable[[], Run]:
    """A peer's backward pass through autograd. The gradients are its own copies: some write into them."""

    def make() -> Run:
        out = forward()()
        own = [g.clone() for g in (grads if isinstance(grads, tuple) else (grads,))]
        return lambda: torch.autograd.grad(out, inputs, own, retain_graph=True)

    return make


def _rope(bench: Bench) -> list[Case]:
    shape, tokens = bench.shape, bench.tokens
    heads, key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    # q, k and v lie in one buffer, of which q and k are rotated
    x = bench.random(tokens, heads + 2 * key_heads, width)[:, : heads + key_heads]
    angles = torch.rand(tokens, width // 2, device=bench.device) * 6.28
    cos, sin = (torch.cat([f, f], -1).to(bench.dtype) for f in (angles.cos(), angles.sin()))
    traffic = 2 * bench.bytes(*x.shape) + 2 * bench.bytes(tokens, width // 2)
    # a peer's layout: [1, heads, tokens, width] over [1, tokens, heads, width]
    leaves = [bench.random(1, tokens, n, width).transpose(1, 2).requires_grad_() for n in (heads, key_heads)]
    dense = [bench.random(1, n, tokens, width).requires_grad_() for n in (heads, key_heads)]

    def liger() -> Run:
        run = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction.apply
        return lambda: run(*leaves, cos[None], sin[None])

    def unsloth() -> Run:
        run = importlib.import_module("unsloth.kernels").fast_rope_embedding
        places = torch.arange(tokens, device=bench.device, dtype=torch.int32)[None]
        # it rotates in place, which autograd refuses for a leaf
        return lambda: run(*(t.view_as(t) for t in dense), cos, sin, places)

    grads = tuple(torch.randn_like(t) for t in leaves)
    dense_grads = tuple(torch.randn_like(t) for t in dense)
    return [
        Case(
            "rope forward", "rope", traffic, lambda: rope.rope_(x, cos, sin), peers={"liger": liger, "unsloth": unsloth}
        ),
        Case(
            "rope backward",
            "rope",
            traffic,
            lambda: rope.rope_(x, cos, sin, inverse=True),
            peers={"liger": _backward(liger, leaves, grads), "unsloth": _backward(unsloth, dense, dense_grads)},
        ),
    ]


def _swiglu(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["intermediate_size"])
    both = bench.random(size[0], 2 * size[1])
    gate, up = both.split(size[1], dim=1)
    grad, out = bench.random(*size), bench.random(*size)
    d_gate, d_up, act = (torch.empty_like(grad) for _ in range(3))
    one = bench.bytes(*size)
    leaves = [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in (gate, up)]

    def liger() -> Run:
        run = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply
        return lambda: run(*leaves)

    def unsloth() -> Run:
        run = importlib.import_module("unsloth.kernels").swiglu_fg_kernel
        e, g = (t.detach()[None] for t in leaves)
        return lambda: run(e, g)

    def unsloth_backward() -> Run:
        run = importlib.import_module("unsloth.kernels").swiglu_DWf_DW_dfg_kernel
        own = [t.detach().clone() for t in (grad, *leaves)]  # all three are written over
        return lambda: run(*own)

    return [
        Case(
            "swiglu forward",
            "swiglu",
            3 * one,
            lambda: swiglu.swiglu_forward(gate, up, out),
            peers={"liger": liger, "unsloth": unsloth},
        ),
        Case(
            "swiglu backward, and forward again",
            "swiglu",
            6 * one,
            lambda: swiglu.swiglu_backward(grad, gate, up, d_gate, d_up, act),
            peers={"liger": _backward(liger, leaves, grad), "unsloth": unsloth_backward},
            peer_bytes={"liger": 5 * one},  # it does not give the product again
        ),
    ]


def _dropout(bench: Bench) -> list[Case]:
    size = (bench.tokens, bench.shape["hidden_size"])
    x, target, out = (bench.random(*size) for _ in range(3))
    streams = torch.arange(size[0], device=bench.device) // 512
    positions = torch.arange(size[0], device=bench.device) % 512
    key = dropout.DropoutKey(0.05, 42, 7, streams, positions).at(3, 1)
    one = bench.bytes(*size)
    return [
        Case(
            "dropout",
            "dropout",
            2 * one,
            lambda: dropout.drop(x, key, out),
            peers={"torch": lambda: lambda: F.dropout(x, 0.05, training=True)},
        ),
        Case("dropout backward, adding", "dropout", 3 * one, lambda: dropout.add_dropped_(target, x, key)),
    ]


def _logps(bench: Bench) -> list[Case]:
    size, vocabulary = (bench.tokens, bench.shape["hidden_size"]), bench.shape["vocab_size"]
    hidden = bench.random(*size).requires_grad_()
    head = bench.random(vocabulary, size[1]).mul_(0.02)
    targets = torch.randint(vocabulary, (size[0],), device=bench.device)
    grad = torch.randn(size[0], device=bench.device)

    def ours() -> Any:
        return torch.autograd.grad(token_logps.token_logps(hidden, head, targets), hidden, grad)

    def liger() -> Run:
        name = "liger_kernel.ops.fused_linear_cross_entropy"
        run = importlib.import_module(name).LigerFusedLinearCrossEntropyFunction.apply

        def step() -> Any:
            found = run(hidden, head, targets)
            return torch.autograd.grad(found[0] if isinstance(found, tuple) else found, hidden)

        return step

    def unsloth() -> Run:
        run = importlib.import_module("unsloth.kernels").fast_cross_entropy_loss
        return lambda: torch.autograd.grad(run((hidden @ head.T)[None], targets[None]), hidden)

    def plain() -> Run:
        return lambda: torch.autograd.grad(F.cross_entropy((hidden @ head.T).float(), targets), hidden)

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
            peers={"torch": plain, "liger": liger, "unsloth": unsloth},
        ),
    ]
