"""How fast this machine's card is, measured in about two seconds: a matrix product of a layer's size, and copies."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .cards import Card
from .offload import host_bytes

SECONDS = 0.25  # of each measurement, at least
COPY_BYTES = 128 * 2**20


def measure(device: torch.device, dtype: torch.dtype) -> Card:
    """The card as ``cards`` describes one; what was measured is rounded to two digits, so that two starts plan alike.

    Args:
        device: a CUDA device.
        dtype: of the matrix products.
    """
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    rows, width = (4096, 4096) if free > 2**30 else (1024, 2048)
    products, memory, pcie = _rates(device, dtype, rows, width, min(COPY_BYTES, free // 8))
    # autograd's thread has a handle and a workspace of its own, which are to be there when free memory is asked for
    weight = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    (weight @ weight).sum().backward()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts them
    torch.cuda.empty_cache()
    return Card(
        name=properties.name,
        memory=properties.total_memory / 2**30,
        tflops=_rounded(products / 1e12),
        bandwidth=_rounded(memory / 1e9),
        pcie=_rounded(pcie / 1e9),
        capability=torch.cuda.get_device_capability(device),
        share=0.9,  # of what one product alone reaches: others are smaller, and the card gets warm
        measured=True,
    )


def _rates(device: torch.device, dtype: torch.dtype, rows: int, width: int, size: int) -> tuple[float, float, float]:
    """Operations a second of a product; bytes a second through the card's memory, and between it and locked memory."""
    a, b = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(rows, rows, device=device, dtype=dtype)
    products = _rate(device, lambda: torch.mm(a, b.T, out=out), 2 * rows * rows * width)
    one, two = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    memory = _rate(device, lambda: two.copy_(one), 2 * size)
    host = host_bytes(size // 2, device)
    there = one[: size // 2]
    up = _rate(device, lambda: there.copy_(host, non_blocking=True), size // 2)
    down = _rate(device, lambda: host.copy_(there, non_blocking=True), size // 2)
    return products, memory, min(up, down)


def _rate(device: torch.device, run: Callable[[], object], amount: float) -> float:
    """What `run` does a second."""
    run()
    torch.cuda.synchronize(device)
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < SECONDS:
        for _ in range(4):
            run()
        torch.cuda.synchronize(device)
        count += 4
    return amount * count / passed


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
