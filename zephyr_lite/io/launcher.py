"""The environment variables that ``torchrun``, ``accelerate launch`` and MPI set in the processes that they start."""

from __future__ import annotations

import os
import time

RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
_OTHERS = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_PREFIXES = (
    "OMPI_COMM_WORLD_",
    "PMI_",
    "MV2_COMM_WORLD_",
    "TORCHELASTIC_",
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON",
    "ACCELERATE_USE_PARALLELISM",
    "ACCELERATE_USE_TP",
)
# Seconds within which a second signal is the launcher's copy of the first.
ECHO = 5.0

_launched_alone = False  # ``alone`` removed a launcher's variables


def launched() -> int:
    """The number of processes that were started; 1 without a launcher."""
    return int(os.environ.get(SIZE, "1"))


def alone() -> None:
    """Remove the launchers' variables where one process was started: a shell or a container may have kept some, and
    accelerate and torch would wait for processes that do not exist."""
    global _launched_alone
    if launched() > 1:
        return
    _launched_alone = _launched_alone or RANK in os.environ
    for name in list(os.environ):
        if name in (RANK, SIZE, LOCAL_RANK, LOCAL_SIZE, *_OTHERS) or name.startswith(_PREFIXES):
            del os.environ[name]


def speaks() -> bool:
    """Whether this is the first process, which prints what all of them know."""
    return os.environ.get(SIZE, "1") == "1" or os.environ.get(RANK, "0") == "0"


def echoes(first: float | None) -> bool:
    """Whether a signal that comes now is the launcher's copy of an earlier one: Ctrl-C, systemd and scancel signal torchrun
    and its processes alike, and torchrun passes the signal on.

    Args:
        first: time of the earlier signal (time.monotonic), None without one.
    """
    return first is not None and (_launched_alone or RANK in os.environ) and time.monotonic() - first < ECHO
