"""FlashAttention-2's Python interface (``flash_attn``) over the FlashAttention kernels that PyTorch ships.

Transformers and Unsloth run packed rows through a variable-length kernel only if the package flash_attn is installed.
Building it takes hours, so the bench's baselines get this instead (``process.install_flash_attn``): 16 bits, compute
capability 8.0 or later. What training a Mistral does not need raises NotImplementedError.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__version__ = "2.8.3+aten"
flash_attn_gpu = torch.ops.aten  # Unsloth imports flash-attn's extension module to see that it loads


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *options: Any) -> Tensor:
        max_q, max_k, causal, scale, (left, right) = options
        window = {"window_size_left": left, "window_size_right": 0 if causal else right}
        # causal with a window to the left is a window of 0 to the right, which is how ATen's flag is set, too
        settings = (cu_q, cu_k, max_q, max_k, 0.0, causal and left < 0)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *settings, False, scale=scale, **window
        )
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k, state, unused)
        ctx.rest, ctx.keywords = settings[2:], {"scale": scale, **window}
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse, cu_q, cu_k, state, unused = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out, lse, cu_q, cu_k, *ctx.rest, state, unused, **ctx.keywords
        )
        return *grads, *[None] * 7


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention of packed sequences: q [tokens, heads, d], k and v [tokens, kv heads, d], cumulative lengths int32."""
    refused = {"dropout_p": dropout_p, "softcap": softcap, "alibi_slopes": alibi_slopes, "block_table": block_table}
    refused |= {"deterministic": deterministic, "return_attn_probs": return_attn_probs}
    if given := [name for name, value in refused.items() if value is not None and value]:
        raise NotImplementedError(f"{', '.join(given)}: PyTorch's FlashAttention kernel is called without.")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    longest = int(max_seqlen_q), int(max_seqlen_k)
    return _Varlen.apply(q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), *longest, causal, scale, tuple(window_size))


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """Attention of a batch of equally long sequences: q [batch, queries, heads, d], k and v [batch, keys, kv heads, d]."""
    ends = [torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1] for x in (q, k)]
    rest = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return flash_attn_varlen_func(*flat, *ends, q.shape[1], k.shape[1], *rest).unflatten(0, q.shape[:2])


def flash_attn_with_kvcache(*words: Any, **options: Any) -> Any:
    raise NotImplementedError("flash_attn_with_kvcache: PyTorch has no kernel for it; training needs none.")


def unpad_input(
    x: Tensor, mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The unmasked rows of x [batch, length, ...], their places, cumulative lengths, the longest, and the lengths."""
    if unused_mask is not None:
        raise NotImplementedError("unused_mask")
    lengths = mask.sum(-1, dtype=torch.int32)
    places = mask.flatten().nonzero().flatten()
    return (
        x.flatten(0, 1)[places],
        places,
        F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        int(lengths.max()),
        lengths,
    )


def pad_input(x: Tensor, places: Tensor, batch: int, length: int) -> Tensor:
    """The inverse of ``unpad_input``, with zeros where the mask was 0."""
    return x.new_zeros(batch * length, *x.shape[1:]).index_put((places,), x).unflatten(0, (batch, length))
