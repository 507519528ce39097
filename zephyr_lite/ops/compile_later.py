"""Functions that a library compiles while it is imported are compiled when they are called."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compile_later() -> Iterator[None]:
    """``torch.compile`` of a function waits for its first call, for whatever is imported within.

    bitsandbytes compiles its CPU implementation of the 8-bit optimizers while it is imported. That alone imports PyTorch's
    compiler: importing bitsandbytes took 2.4 seconds of processor time instead of 0.2, for functions that
    a run on a GPU never calls. What is computed is the same.
    """
    now = torch.compile

    def later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda function: later(function, **options)
        if isinstance(model, torch.nn.Module):
            return now(model, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not compiled:
                compiled.append(now(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = now
