"""How the decoder computes a step: what runs at once, what layers keep, what is on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .dequant_buffer import ScratchMode
from .layer_spec import Keep

Reference = Literal["together", "own"]


@dataclass(frozen=True)
class ExecutionConfig:
    """Settings that change memory and speed of a step, and its result only by rounding.

    Attributes:
        micro_tokens: tokens of a micro-batch at most (one example at least).
        keep: what each layer keeps for its backward pass, from the first layer to the last (see ``layer``).
        offload: the first so many layers keep it on the host (see ``activation_offload``).
        stream: the decoder layers' weights are on the host and are copied one layer ahead (see ``weight_streaming``).
        tile: tokens that the MLP takes at a time; None: all of a micro-batch.
        scratch: size of the buffer for dequantized weights (see ``dequant_buffer``).
        reference: a live DPO reference runs in the policy's pass (``together``) or in its own before it.
        threads: CPU threads, which decide the order of sums there.
    """

    micro_tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    reference: Reference = "together"
    threads: int = 1
