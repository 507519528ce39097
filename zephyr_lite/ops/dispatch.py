"""Which of an operation's two implementations runs, the Triton kernel or its plain PyTorch twin: one rule for all.

A kernel runs for CUDA tensors wherever triton is installed and the operation's check on this device and dtype did not
fail, and for CPU tensors where ``TRITON_INTERPRET=1`` asks for triton's interpreter. Everything else, and float64
always, runs the twin.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton  # noqa: F401
    import triton.language as tl
    from triton import jit, next_power_of_2

    HAVE_TRITON = True
except ImportError:
    # stand-ins with which an operation's file imports; no kernel of it is ever launched
    HAVE_TRITON = False
    tl: Any = None  # type: ignore[no-redef]

    def jit(function: Any = None, **_: Any) -> Any:  # type: ignore[no-redef]
        return (lambda f: f) if function is None else function

    def next_power_of_2(n: int) -> int:  # type: ignore[misc]
        return 1 << max(0, n - 1).bit_length()


class Widths(NamedTuple):
    """What kernels are compiled for (``tl.constexpr``); the defaults are the sizes of a small model.

    Attributes:
        hidden, inner: channels of a layer's input, and of its MLP.
        queries: channels of the attention's output.
        rotated, head: how many heads rope rotates together, and their size.
        vocabulary: logits of a row.
        activation: of the MLP's gate (see ``swiglu``).
        norm_offset: whether norms multiply by 1 + weight (see ``rms_norm``).
        head_norms: whether there are norms of the heads of q and k.
        rotary: channels of a head that rope rotates; 0: all.
        int8: whether products with frozen matrices run in 8 bits.
    """

    hidden: int = 576
    inner: int = 1100
    queries: int = 576
    rotated: int = 5
    head: int = 80
    vocabulary: int = 448
    activation: str = "silu"
    norm_offset: bool = False
    head_norms: bool = False
    rotary: int = 0
    int8: bool = False


SMALL = Widths()

# the files with a kernel; ``sample`` in each runs the operation on a few rows, as the layer does
OPERATIONS = ("nf4", "int8", "int8_weights", "rms_norm", "rope", "swiglu", "dropout", "dropout_products", "token_logps")
_failed: set[tuple[str, torch.device, torch.dtype]] = set()
_twins_only = False


def runs_triton(op: str, x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `op` runs its kernel on x.

    Args:
        dtype: the operation's, where it is not x's own.
    """
    dtype = x.dtype if dtype is None else dtype
    if not HAVE_TRITON or _twins_only or dtype == torch.float64:
        return False
    return (x.device.type == "cuda" or _interpreted(x.device)) and (op, x.device, dtype) not in _failed


def _interpreted(device: torch.device) -> bool:
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def twins() -> Iterator[None]:
    """Within it every operation runs its twin."""
    global _twins_only
    before, _twins_only = _twins_only, True
    try:
        yield
    finally:
        _twins_only = before


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def rows_dense(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not dense: what kernels take that step from row to row by a stride."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def truncates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels round towards zero here: triton's interpreter does in bfloat16."""
    return dtype == torch.bfloat16 and _interpreted(device)


class Draw:
    """Normal values for ``sample``, the same for every instance: ``draw(*shape)``."""

    def __init__(self, device: torch.device, dtype: torch.dtype, wide: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.device, self.dtype, self.wide = device, dtype, wide

    def __call__(self, *shape: int) -> Tensor:
        x = torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)
        return x.double() if self.wide else x


def _disagreement(kernel: Tensor, twin: Tensor, exact: Tensor) -> str | None:
    """How a kernel breaks its bound, or None. Integers are equal; else

    ‖kernel - exact‖ ≤ 1.1 ‖twin - exact‖ + 1e-6 ‖exact‖ in float32, 1e-3 ‖exact‖ in 16 bits; two units in the last
    place of bfloat16 in the interpreter.
    """
    if kernel.shape != twin.shape or kernel.dtype != twin.dtype:
        return f"{list(kernel.shape)} {kernel.dtype} instead of {list(twin.shape)} {twin.dtype}"
    if not kernel.is_floating_point():
        wrong = int((kernel != twin).sum())
        return f"{wrong} of {twin.numel()} values differ" if wrong else None
    norm = float(exact.norm())
    share = 2.0**-6 if truncates(kernel.device, kernel.dtype) else 1e-6 if kernel.dtype == torch.float32 else 1e-3
    error, allowed = float((kernel - exact).norm()), 1.1 * float((twin - exact).norm()) + share * norm
    # false for a NaN
    return None if error <= allowed else f"an error of {error:.2e} where {allowed:.2e} is allowed (norm {norm:.2e})"


def check_kernels(device: torch.device, dtype: torch.dtype, widths: Widths = SMALL) -> list[str]:
    """Compile every kernel and compare it with its twin; from then on one that fails is replaced by the twin.

    Args:
        device: where the run computes.
        dtype: in which it computes.
        widths: the model's, so that what is compiled and compared is what the run launches.
    Returns:
        A sentence for each operation whose kernel is not used though kernels run here; empty where none do.
    """
    device = torch.empty(0, device=device).device  # with its index
    if not HAVE_TRITON or dtype == torch.float64 or not (device.type == "cuda" or _interpreted(device)):
        return []
    notes = []
    for op in OPERATIONS:
        sample = import_module(f".{op}", __package__).sample
        _failed.discard((op, device, dtype))
        try:
            kernel = sample(Draw(device, dtype), widths)
            with twins():
                twin, exact = sample(Draw(device, dtype), widths), sample(Draw(device, dtype, wide=True), widths)
            found = map(_disagreement, kernel, twin, exact)
            fault = next((f"result {place}: {fault}" for place, fault in enumerate(found) if fault), None)
        except Exception as error:  # a compiler's failure has no common class
            first = (str(error).strip().splitlines() or [""])[0]
            fault = f"{type(error).__name__}: {first}"[:300]
        if fault is not None:
            _failed.add((op, device, dtype))
            notes.append(f"The Triton kernel {op} is not used in {dtype} on {device}; plain PyTorch is ({fault}).")
    return notes
