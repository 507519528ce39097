"""Measured speed of this machine: matrix products and copies on a card, in about two seconds; a matrix product, an exponential
and the dequantization of a weight on a CPU, in less than one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from bitsandbytes.nn import Params4bit

from ..model.activation_offload import host_bytes
from ..ops.nf4 import dequantize
from .gpus import PROCESSOR, Gpu

SECONDS, CALLS = 0.15, 25  # of each measurement, at least
COPY_BYTES = 128 * 2**20
# of a CPU's measurements: each takes a millisecond or two, which other processes seldom interrupt
TOKENS, WIDTH, ELEMENTS = 256, 512, 2**20


def measure(device: torch.device, dtype: torch.dtype) -> Gpu:
    """The speed of a device, rounded to two digits, so that two starts plan alike.

    Args:
        device: a CUDA device, or the CPU with as many threads as training will use.
        dtype: of the matrix products.
    """
    if device.type == "cpu":
        return _processor(dtype, torch.get_num_threads())
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    rows, width = (4096, 4096) if free > 2**30 else (1024, 2048)
    products, memory, pcie = _card_rates(device, dtype, rows, width, min(COPY_BYTES, free // 8))
    # autograd's thread has a handle and a workspace of its own, which are to be there when free memory is asked for
    weight = torch.randn(64, 64, device=device, dtype=dtype, requires_grad=True)
    (weight @ weight).sum().backward()
    torch._C._cuda_clearCublasWorkspaces()  # the plan counts them
    torch.cuda.empty_cache()
    return Gpu(
        name=properties.name,
        memory=properties.total_memory / 2**30,
        tflops=_rounded(products / 1e12),
        bandwidth=_rounded(memory / 1e9),
        pcie=_rounded(pcie / 1e9),
        capability=torch.cuda.get_device_capability(device),
        share=0.9,  # of what one product alone reaches: others are smaller, and the card gets warm
        measured=True,
    )


def _card_rates(
    device: torch.device, dtype: torch.dtype, rows: int, width: int, size: int
) -> tuple[float, float, float]:
    """(operations of a product, bytes through the card's memory, bytes between it and locked memory) a second."""
    a, b = (torch.randn(rows, width, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty(rows, rows, device=device, dtype=dtype)
    products = _rate(device, lambda: torch.mm(a, b.T, out=out), 2 * rows * rows * width)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    memory = _rate(device, lambda: target.copy_(source), 2 * size)
    host, there = host_bytes(size // 2, device), source[: size // 2]
    up = _rate(device, lambda: there.copy_(host, non_blocking=True), size // 2)
    down = _rate(device, lambda: host.copy_(there, non_blocking=True), size // 2)
    return products, memory, min(up, down)


@cache
def _processor(dtype: torch.dtype, threads: int) -> Gpu:
    """The CPU with this number of threads, measured once in a process."""
    cpu = torch.device("cpu")
    # no random numbers: the generators are the run's
    a, b = torch.ones(TOKENS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    out = torch.empty(TOKENS, WIDTH, dtype=dtype)
    products = _rate(cpu, lambda: torch.mm(a, b.T, out=out), 2 * TOKENS * WIDTH * WIDTH)
    # not a copy: what only moves bytes on a card is bound by its arithmetic here, SiLU and softmax most of all
    logits = torch.ones(ELEMENTS, dtype=dtype)
    weights = torch.empty_like(logits)
    memory = _rate(cpu, lambda: torch.exp(logits, out=weights), 2 * ELEMENTS * dtype.itemsize)
    values = b if dtype.itemsize <= 4 else b.float()  # bitsandbytes knows no float64
    weight = Params4bit(values, quant_type="nf4", compress_statistics=True, requires_grad=False).to("cpu")
    buffer = torch.empty(WIDTH, WIDTH, dtype=dtype)
    unpacked = _rate(cpu, lambda: dequantize(weight, dtype, out=buffer), WIDTH * WIDTH)
    return replace(
        PROCESSOR,
        tflops=_rounded(products / 1e12),
        bandwidth=_rounded(memory / 1e9),
        pcie=_rounded(memory / 1e9),  # what is offloaded or streamed is a copy in the same memory
        unpacking=_rounded(unpacked / 1e9),
        measured=True,
    )


def _rate(device: torch.device, run: Callable[[], object], amount: float) -> float:
    """What `run` does a second at its fastest: other processes only make it slower."""
    repeat = 4 if device.type == "cuda" else 1

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(repeat):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - started) / repeat

    seconds()
    times = [seconds()]
    # where other processes hold a core, most calls wait for a thread
    while repeat * sum(times) < SECONDS or len(times) < CALLS:
        times.append(seconds())
    return amount / min(times)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
