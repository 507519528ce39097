"""Graphics cards by name, from their data sheets, to plan a run for a card of another machine; and how a device allocates."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import UserError

MIB, GIB = 2**20, 2**30
# A process's CUDA context, its kernels and the driver's own memory, outside the allocator: 0.4 to 0.8 GiB.
CONTEXT_BYTES = 3 * GIB // 4
# cuBLAS keeps a workspace (torch/cuda: CUBLAS_WORKSPACE_CONFIG's default :4096:2:16:8; 32 MiB from compute capability 9.0)
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = 8_519_680, 32 * MIB


@dataclass(frozen=True)
class Device:
    """How a device allocates."""

    backend: Literal["flash", "efficient", "cpu"] = "flash"  # the attention's implementation
    workspace: int = CUBLAS_BYTES  # bytes that its matrix products keep
    # bytes that a process takes before its first tensor, where free memory was not measured without them
    context: int = 0
    fuses_dropout: bool = False  # dropout in the adapters' products (``ops.dropout_products``)

    @classmethod
    def of(cls, capability: tuple[int, int], half: bool = True, *, context: int = CONTEXT_BYTES) -> Device:
        """A CUDA card by its compute capability; `half`: it computes in 16 bits."""
        ampere = half and capability >= (8, 0)
        workspace = CUBLAS_BYTES_HOPPER if capability[0] == 9 else CUBLAS_BYTES
        return cls("flash" if ampere else "efficient", workspace, context, fuses_dropout=ampere)

    @property
    def cuda(self) -> bool:
        return self.backend != "cpu"


CPU = Device("cpu", 0)


@dataclass(frozen=True)
class Gpu:
    """A card's memory and speed."""

    name: str  # its common name
    # GiB that its driver reports, which is less than the box says where memory checks itself (T4, L4, A10G)
    memory: float
    tflops: float  # dense products of 16-bit matrices with 32-bit sums, 10^12 operations a second
    bandwidth: float  # of its memory, 10^9 bytes a second
    pcie: float  # between main memory and card, each way, 10^9 bytes a second, as copies of locked memory reach it
    capability: tuple[int, int]  # CUDA compute capability
    # US dollars an hour, rented; about what it cost at the end of 2026. None: not rented out
    price: float | None = None
    share: float = 0.6  # of `tflops` that large matrix products reach
    measured: bool = False  # its numbers were measured here (in the run's dtype)
    tflops32: float | None = None  # of 32-bit matrices, without TF32
    int8: float = 4.0  # rate of int8 products, as a multiple of `tflops`: 4 where that is halved by 32-bit sums, else 2
    # 10^9 NF4 numbers dequantized a second; None: as many as the memory's bandwidth lets through
    unpacking: float | None = None

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second that large matrix products of a dtype reach."""
        tflops = self.tflops
        if dtype.itemsize > 2 and not self.measured:
            # of graphics cards whose number is not known: about a quarter; 64 bits: a 32nd of 32
            tflops = (self.tflops32 or self.tflops / 4) / (32 if dtype.itemsize > 4 else 1)
        return tflops * 1e12 * self.share

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16


# PCIe 3.0 x16 reaches 12, 4.0 x16 24, 4.0 x8 12, 5.0 x8 24, 5.0 x16 50 (10^9 bytes a second).
# A GeForce card's rate with 32-bit sums is half of the one with 16-bit sums, so that it can keep it up. Others are limited by
# their power, a T4 (70 W) most of all. Before capability 8.0 there is no FlashAttention and no bfloat16 either: a T4 trains at
# about two thirds of a 3060's speed.
_CARDS = (
    #    name               GiB  TFLOP/s   GB/s  PCIe  capability  $/h
    Gpu("RTX2060", 6, 26, 336, 12, (7, 5), share=0.45, tflops32=6.5),
    Gpu("2080Ti", 11, 53.8, 616, 12, (7, 5), share=0.45, tflops32=13.4),
    Gpu("3060", 12, 25.5, 360, 24, (8, 6), 0.10, tflops32=12.7),
    Gpu("3060Ti", 8, 32.5, 448, 24, (8, 6), 0.10, tflops32=16.2),
    Gpu("3070", 8, 40.6, 448, 24, (8, 6), tflops32=20.3),
    Gpu("3080", 10, 59.5, 760, 24, (8, 6), tflops32=29.8),
    Gpu("3090", 24, 71, 936, 24, (8, 6), 0.22, tflops32=35.6),
    Gpu("Laptop", 8, 30, 256, 12, (8, 9), tflops32=15.1),  # a mobile 4060
    Gpu("4060", 8, 30, 272, 12, (8, 9), tflops32=15.1),
    Gpu("4060Ti-8", 8, 44, 288, 12, (8, 9), tflops32=22.1),
    Gpu("4060Ti-16", 16, 44, 288, 12, (8, 9), 0.12, tflops32=22.1),
    Gpu("4070", 12, 58, 504, 24, (8, 9), 0.15, tflops32=29.1),
    Gpu("4070Super", 12, 71, 504, 24, (8, 9), tflops32=35.5),
    Gpu("4070Ti", 12, 80, 504, 24, (8, 9), tflops32=40.1),
    Gpu("4070TiSuper", 16, 88, 672, 24, (8, 9), tflops32=44.1),
    Gpu("4080", 16, 97.5, 717, 24, (8, 9), 0.25, tflops32=48.7),
    Gpu("4080Super", 16, 104, 736, 24, (8, 9), tflops32=52.2),
    Gpu("4090", 24, 165, 1008, 24, (8, 9), 0.40, tflops32=82.6),
    Gpu("5060Ti", 16, 47.4, 448, 24, (12, 0), tflops32=23.7),
    Gpu("5070", 12, 61.7, 672, 50, (12, 0), tflops32=30.9),
    Gpu("5070Ti", 16, 87.9, 896, 50, (12, 0), tflops32=43.9),
    Gpu("5080", 16, 112.6, 960, 50, (12, 0), tflops32=56.3),
    Gpu("5090", 32, 209, 1792, 50, (12, 0), 0.60, tflops32=104.8),
    Gpu("A4000", 16, 76.7, 448, 24, (8, 6), share=0.35, tflops32=19.2, int8=2),
    Gpu("A6000", 48, 154.8, 768, 24, (8, 6), 0.45, share=0.4, tflops32=38.7, int8=2),
    Gpu("6000Ada", 48, 364, 960, 24, (8, 9), 0.75, share=0.35, tflops32=91.1, int8=2),
    # it shares 128 GB with its processor, and there is nothing to copy between them
    Gpu("GB10", 121.7, 62.5, 273, 50, (12, 1), tflops32=31),
    Gpu("T4", 15, 65, 300, 12, (7, 5), 0.35, share=0.16, tflops32=8.1, int8=2),
    Gpu("L4", 22.5, 121, 300, 24, (8, 9), 0.70, share=0.4, tflops32=30.3, int8=2),
    # only torch's CUDA 12.6 builds have code for capability 7.0 (``zephyr-lite env`` says so)
    Gpu("V100-16", 15.8, 125, 900, 12, (7, 0), share=0.4, tflops32=15.7, int8=2),
    Gpu("V100-32", 31.7, 125, 900, 12, (7, 0), share=0.4, tflops32=15.7, int8=2),
    Gpu("A10G", 22.5, 70, 600, 24, (8, 6), 1.00, tflops32=31.2, int8=2),
    Gpu("L40S", 45, 362, 864, 24, (8, 9), 0.85, share=0.35, tflops32=91.6, int8=2),
    Gpu("A100-40", 40, 312, 1555, 24, (8, 0), 1.20, tflops32=19.5, int8=2),
    Gpu("A100-80", 80, 312, 2039, 24, (8, 0), 1.60, tflops32=19.5, int8=2),
    Gpu("H100", 79.6, 989, 3350, 50, (9, 0), 2.50, share=0.5, tflops32=66.9, int8=2),
    Gpu("H200", 140.4, 989, 4800, 50, (9, 0), 3.20, share=0.5, tflops32=66.9, int8=2),
)
# A CPU that was not measured: for plans whose speed does not matter.
PROCESSOR = Gpu("cpu", 0, 0.08, 20, 10, (0, 0), share=1.0, int8=1)
CARDS = {card.name.lower(): card for card in _CARDS}
# For --vram alone: a plain consumer card of that size, none slower than a smaller one (of 6 and 8 GB: one of 12 with less).
_BY_MEMORY = {
    12: "3060",
    16: "4060ti-16",
    24: "3090",
    32: "5090",
    40: "a100-40",
    80: "a100-80",
}


def find_gpu(name: str) -> Gpu:
    """A card by its name, spelled as people do ("RTX 4090", "A100 80GB")."""
    plain = re.sub(r"nvidia|geforce|tesla|generation|[^a-z0-9]|gi?b$", "", name.lower().replace("dgx spark", "gb10"))
    known: dict[str, Gpu] = {}
    for card in _CARDS:
        whole = card.name.lower().replace("-", "")
        # "3060 12GB" is the 3060; "a100" the smaller one of two
        for alias in (whole, f"{whole}{math.ceil(card.memory)}", card.name.lower().split("-")[0]):
            known.setdefault(alias, card)
    for alias in (plain, plain.removeprefix("rtx"), f"rtx{plain}"):
        if alias in known:
            return known[alias]
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"Did you mean {known[near[0]].name}? " if near else ""
    raise UserError(
        f"--gpu {name}: no card of that name is known.",
        f"{hint}Known are: {', '.join(CARDS)}. For any other card give its memory: --vram 16GiB.",
    )


def gpu_of_size(gib: float) -> Gpu:
    """A plain card of at least this memory, or the largest there is."""
    return CARDS[next((name for size, name in _BY_MEMORY.items() if size >= gib), "h200")]


def in_words(size: int) -> str:
    """``3.35 GiB``; below a tenth of one ``12.3 MiB``."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"
