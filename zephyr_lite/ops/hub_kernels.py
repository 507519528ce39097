"""The package ``kernels``, which downloads compiled code from the hub and runs it, cannot be imported."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_hub_kernels() -> Iterator[None]:
    """``import kernels`` fails within, installed or not.

    On a processor with AVX512-BF16 bitsandbytes asks it for a kernel while it is imported, and warns where it gets none.
    Nothing here calls that kernel: it serves inference after repacking the weights, which model/base.py switches off.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    imported, before = "kernels" in modules, modules.get("kernels")
    modules["kernels"] = None
    try:
        yield
    finally:
        del modules["kernels"]
        if imported:
            modules["kernels"] = before
