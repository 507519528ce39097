"""How a device allocates, and sizes in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


def in_words(size: int) -> str:
    """``3.35 GiB``; below a tenth of one ``12.3 MiB``."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"
