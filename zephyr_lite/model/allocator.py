"""The setting of PyTorch's CUDA allocator, which has to be made before torch is imported."""

from __future__ import annotations

import os
import platform


def is_wsl() -> bool:
    """Whether this is the Windows Subsystem for Linux."""
    release = platform.release().lower()
    return "microsoft" in release or "wsl" in release


def set_allocator() -> None:
    """Let the allocator's segments grow, unless the user configured it: micro-batches differ in size, and segments of a fixed
    size would fragment. Not under WSL2, whose drivers before R615 may fail in cuMemSetAccess (pytorch #192330)."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and not is_wsl():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
