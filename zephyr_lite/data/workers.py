"""``datasets.Dataset.map`` as this package calls it: cached by code and options, on all cores, interruptible."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np

PARALLEL_ROWS = 2000  # starting processes does not pay for fewer
PR_SET_PDEATHSIG = 1
_in_map = False
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def map_rows(
    table: datasets.Dataset,
    function: Callable[..., dict[str, list[Any]]],
    features: datasets.Features,
    options: dict[str, Any],
    key: dict[str, Any],
    desc: str,
    *,
    with_indices: bool = False,
    batch_size: int = 1000,
) -> datasets.Dataset:
    """Map batches of rows to rows with other columns, in one process a core (up to 16).

    Args:
        table: the rows.
        function: a batch of columns (and its indices) → a batch of ``features``.
        options: keyword arguments of ``function``.
        key: the options that the result depends on, for ``cache_key``.
        desc: the progress bar's label.
    """
    with interruptible(quiet=len(table) <= PARALLEL_ROWS):
        return table.map(
            function,
            with_indices=with_indices,
            batched=True,
            batch_size=batch_size,
            remove_columns=table.column_names,
            fn_kwargs=options,
            features=features,
            new_fingerprint=cache_key(table, key),
            num_proc=min(cores(), 16) if len(table) > PARALLEL_ROWS and cores() > 1 else None,
            desc=desc,
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_key(source: datasets.Dataset, options: dict[str, Any]) -> str:
    """The fingerprint of a mapped data set: of its source, the options and this package's code.

    datasets' own hash of a function in a module covers its name only, and a tokenizer's hash changes with its use: an
    update would read an older version's results, and a second start would not find those of the first.
    """
    digest = hashlib.sha256(source._fingerprint.encode())
    for key, value in sorted(options.items()):
        digest.update(repr((key, value.tobytes() if isinstance(value, np.ndarray) else value)).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _in_child() -> None:
    """In a worker: leave a terminal's Ctrl-C to the parent, and end with the parent if that is killed."""
    if _in_map:
        if _libc is not None:  # first: a Ctrl-C just after the fork ends this function at signal.signal
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


@contextmanager
def interruptible(quiet: bool = False) -> Iterator[None]:
    """Raise Ctrl-C as KeyboardInterrupt: datasets' pool waits for its workers then, and raises a timeout instead.

    Args:
        quiet: hide datasets' progress bars within.

    Raises:
        KeyboardInterrupt: it caused an exception within.
    """
    global _in_map
    before, _in_map = _in_map, True
    hide = quiet and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:
        causes: list[BaseException | None] = [error]
        while causes:
            cause = causes.pop()
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            if cause is not None:
                causes += (cause.__cause__, cause.__context__)
        raise
    finally:
        _in_map = before
        if hide:
            datasets.enable_progress_bars()
