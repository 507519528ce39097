"""How much of a run fits into memory: how many tokens run at once, and what each layer keeps for its backward pass."""

from __future__ import annotations

import ctypes
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import MemorySpec
from .layer import Keep
from .memory import ScratchMode

# At once, where memory allows it: enough for matrix products at full speed, little enough for a CPU's caches.
WANTED_TOKENS = {"cuda": 16384, "cpu": 2048}
# Of an optimizer's moments, a trained parameter; paged ones move to the host when the card is full.
STATE_BYTES = {"adamw_torch": 8, "adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0}
# Of the free memory; the rest is for the head's chunk, the allocator's slack and what else runs on the machine.
SHARE = 0.7


@dataclass(frozen=True)
class Plan:
    """The plan of a run; part of stage.json, so that a resumed run makes the same split and the same sums.

    Attributes:
        micro_tokens: a micro-batch holds at most so many tokens (one example at least).
        keep: what each layer keeps for its backward pass, from the first layer to the last (see ``layer``).
        offload: what the first so many layers keep lies on the host between the two passes (see ``offload``).
        stream: the decoder layers' weights lie on the host, and come to the device one layer ahead (see ``stream``).
        tile: the MLP runs over so many tokens at a time; None: over all of a micro-batch.
        scratch: how much room dequantized weights get (see ``memory``).
        reference: a live reference runs in the policy's pass (``together``), or in one of its own before it.
        threads: the number of CPU threads, which decides the order of sums there.
        bytes_per_token: of what all layers keep under this plan, wherever it lies.
        free_bytes: what was free when the plan was made, less what the optimizer will take.
    """

    micro_tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    reference: Literal["together", "own"] = "together"
    threads: int = 1
    bytes_per_token: int = 0
    free_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep))  # JSON knows lists only

    @property
    def recomputes(self) -> bool:
        """Whether any layer's matrix products are computed again in the backward pass."""
        return any(keep != "all" for keep in self.keep)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}

    def lines(self) -> list[str]:
        kept = {
            "all": "everything that a matrix product computed",
            "attention": "layer inputs and the attention's output, the rest is recomputed",
            "input": "layer inputs, the rest is recomputed",
        }[self.keep[0]]
        return [
            f"{self.micro_tokens:,} tokens at once, {self.bytes_per_token / 2**20:.2f} MiB kept a token ({kept}); "
            f"{self.free_bytes / 2**30:.1f} GiB free"
        ]


def make_plan(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    longest: int,
    memory: MemorySpec,
    *,
    parameters: int = 0,
    optim: str = "adamw_torch",
    ranks: int = 0,
    in_4bit: bool = False,
) -> Plan:
    """Choose for a model's configuration and the free memory.

    The first policy of ``all``, ``attention``, ``input`` under which a micro-batch of useful size fits; a live reference
    in the policy's pass where the one hidden state more a token fits as well.

    Args:
        config: the Hugging Face configuration of the base.
        dtype: of the hidden states.
        device: where the run computes.
        longest: tokens of the longest example, which must run at once.
        memory: what the user fixed.
        parameters, optim: how many are trained, and with what: their gradients and moments are not there yet.
        ranks: the sum of the ranks of all adapters on all projections of a layer.
        in_4bit: the base's weights are dequantized, layer by layer.
    """
    free = max(0, free_memory(device) - parameters * (4 + STATE_BYTES[optim]))
    wanted = max(longest, WANTED_TOKENS[device.type])
    budget = int(free * SHARE)
    scratch: ScratchMode = "layer"
    if in_4bit:
        least = longest * (kept_bytes(config, dtype, "input") + transient_bytes(config, dtype, "input"))
        if scratch_bytes(config, dtype, "layer") + least > budget:
            scratch = "small"
        budget = max(0, budget - scratch_bytes(config, dtype, scratch))
    keep: Keep = "input"
    if memory.keep is not None:
        keep = memory.keep
    else:
        for policy in ("all", "attention"):
            if kept_bytes(config, dtype, policy, ranks=ranks) * max(longest, min(wanted, 2048)) <= budget:
                keep = policy
                break
    kept = kept_bytes(config, dtype, keep, ranks=ranks)
    per_token = kept + transient_bytes(config, dtype, keep)
    one_more = config.hidden_size * dtype.itemsize
    together = longest * (per_token + one_more) <= budget
    tokens = memory.micro_tokens or max(longest, min(wanted, budget // (per_token + (one_more if together else 0))))
    return Plan(
        tokens,
        (keep,) * config.num_hidden_layers,
        scratch=scratch,
        reference="together" if together else "own",
        threads=torch.get_num_threads(),
        bytes_per_token=kept,
        free_bytes=free,
    )


def transient_bytes(config: Any, dtype: torch.dtype, keep: Keep) -> int:
    """About what a token takes while one layer's backward pass runs, beside what is kept: everything that is recomputed,
    the activation's gradient and, with dropout, its dropped copy, and two hidden states."""
    layer = kept_bytes(config, dtype, "all") // config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    extra = 2 * (inner + config.hidden_size) * dtype.itemsize
    return extra + (2 * inner * dtype.itemsize if keep == "all" else layer)


def scratch_bytes(config: Any, dtype: torch.dtype, mode: ScratchMode) -> int:
    """Of the dequantized weights of one decoder layer (``memory.scratch_elements``)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = 2 * hidden * (config.num_attention_heads + config.num_key_value_heads) * head_dim
    return dtype.itemsize * (attention + (3 if mode == "layer" else 1) * hidden * inner)


def kept_bytes(config: Any, dtype: torch.dtype, keep: Keep, *, ranks: int = 0) -> int:
    """Bytes a token that the decoder layers leave for the backward pass, exactly.

    Args:
        config: the Hugging Face configuration.
        dtype: of the hidden states.
        keep: the policy.
        ranks: the sum of the ranks of all adapters on all projections of a layer.
    """
    # engine trl takes families whose configurations lack some of these names
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, key_heads * head_dim
    narrow = hidden  # the layer's input
    wide = 0
    if keep != "input":
        narrow += queries + hidden  # the attention's output, and the residual after it
        wide += config.num_attention_heads  # its log-sum-exp
    if keep == "all":
        narrow += queries + 2 * keys + 2 * inner + ranks
    return config.num_hidden_layers * (narrow * dtype.itemsize + wide * max(4, dtype.itemsize))


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 8 * 2**30


def keep_freed_pages() -> bool:
    """Let glibc keep what a step frees for the next one: given back to the system, it costs a CPU run a twentieth of its
    time to get every page again. Returns whether it was told to; there is nothing to tell elsewhere."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False  # not Linux, or another C library
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**31 - 1))
