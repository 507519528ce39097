"""How much of a run fits into memory: how many tokens run at once, and what each layer keeps for its backward pass."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import MemorySpec
from .decoder import Keep

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
        keep: ``all`` keeps what the backward pass needs, ``input`` keeps each layer's input and recomputes the rest.
        bytes_per_token: estimated, of what is kept under this plan.
        free_bytes: what was free when the plan was made, less what the optimizer will take.
        threads: the number of CPU threads, which decides the order of sums there.
    """

    micro_tokens: int
    keep: Keep
    bytes_per_token: int
    free_bytes: int
    threads: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        kept = "everything the backward pass needs" if self.keep == "all" else "layer inputs, the rest is recomputed"
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
) -> Plan:
    """Choose for a model's configuration and the free memory.

    Args:
        config: the Hugging Face configuration of the base.
        dtype: of the hidden states.
        device: where the run computes.
        longest: tokens of the longest example, which must run at once.
        memory: what the user fixed.
        parameters, optim: how many are trained, and with what: their gradients and moments are not there yet.
    """
    free = max(0, free_memory(device) - parameters * (4 + STATE_BYTES[optim]))
    wanted = max(longest, WANTED_TOKENS[device.type])
    budget = int(free * SHARE)
    everything = kept_bytes(config, dtype, "all")
    keep: Keep
    if memory.keep is not None:
        keep = memory.keep
    else:
        keep = "all" if everything * max(longest, min(wanted, 2048)) <= budget else "input"
    per_token = everything if keep == "all" else kept_bytes(config, dtype, "input")
    # while one layer is recomputed, all that it keeps exists once
    transient = 0 if keep == "all" else everything // config.num_hidden_layers
    fits = budget // (per_token + transient)
    tokens = memory.micro_tokens or max(longest, min(wanted, fits))
    return Plan(tokens, keep, per_token, free, torch.get_num_threads())


def kept_bytes(config: Any, dtype: torch.dtype, keep: Keep) -> int:
    """Bytes a token that one forward pass leaves for its backward pass, adapters' small products aside."""
    # engine trl takes families whose configurations lack some of these names
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, key_heads * head_dim
    if keep == "input":
        floats = hidden
    else:
        # both norms' inputs and outputs; q, k, v and what attention saves of its output; o's input; gate, up, their product
        floats = 4 * hidden + 2 * queries + 2 * keys + queries + 3 * inner
    return config.num_hidden_layers * floats * dtype.itemsize


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
