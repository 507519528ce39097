"""zephyr-lite: a base Mistral-7B becomes a chat model, the way Zephyr was made, on one consumer GPU."""

import logging
from typing import Any

__version__ = "0.1.0"

# bitsandbytes warns at import that a kernel from the hub is missing. Nothing here calls it: it serves inference on
# processors with AVX512-BF16, after repacking the weights in place, which is switched off (see model/load.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__all__ = ["__version__", "fuse"]


def __getattr__(name: str) -> Any:
    """``zephyr_lite.fuse``, imported when asked for: torch and transformers take seconds."""
    if name == "fuse":
        from .model.fuse import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
