"""What a card can do at most, and how long something takes on it: the yardsticks of the benches.

Times on CUDA are between two events, with a buffer larger than the second-level cache overwritten some times before each
run: that empties the cache, and keeps the card busy while the processor enqueues what is measured, Python and all. On a
CPU, where only the bench itself is tested, they are the processor's clock.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 512 * 2**20
FLUSHES = 4


class Clock:
    """Measures one device.

    Args:
        device: a CUDA device or the CPU.
        rounds: runs that count; the median is taken.
        warm_up: runs before them.
    """

    def __init__(self, device: torch.device, rounds: int = 25, warm_up: int = 5) -> None:
        self.device, self.rounds, self.warm_up = device, rounds, warm_up
        cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if cuda else None

    def seconds(self, run: Callable[[], Any]) -> float:
        """Median seconds of a run."""
        for _ in range(self.warm_up):
            run()
        times = []
        for _ in range(self.rounds):
            if self._flush is None:
                begun = time.perf_counter()
                run()
                times.append(time.perf_counter() - begun)
                continue
            for _ in range(FLUSHES):
                self._flush.zero_()
            self._flush.amax()  # a read at last: written lines left in the cache would be charged to the run
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            times.append((start, end))
        if self._flush is not None:
            torch.cuda.synchronize(self.device)
            times = [start.elapsed_time(end) / 1e3 for start, end in times]
        return median(times)


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Bytes a second, read and written, of a plain copy of `size` bytes."""
    source = torch.empty(size // 4, dtype=torch.int32, device=clock.device).zero_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))


def matmul_ceiling(
    clock: Clock, shape: dict[str, Any], tokens: int, square: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """FLOP/s of x · Wᵀ: a large square one, and a decoder layer's own products at so many tokens.

    Args:
        shape: the model's, as ``mistral.MISTRAL_7B``.
        tokens: rows of x.
        square: side of the square product.
    """
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    sizes = {
        "square": (square, square, square),
        "qkv": (tokens, hidden + 2 * keys, hidden),
        "o": (tokens, hidden, hidden),
        "gate_up": (tokens, 2 * inner, hidden),
        "down": (tokens, hidden, inner),
    }
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "products": {}}
    seconds, flops = {}, {}

    def draw(*size: int) -> Tensor:
        # zeros and ones would draw less power, and let the card clock higher than real numbers do
        return torch.empty(size, device=clock.device, dtype=dtype).normal_()

    for name, (m, n, k) in sizes.items():
        x, weight, out = draw(m, k), draw(n, k), draw(m, n)
        seconds[name] = clock.seconds(lambda x=x, weight=weight, out=out: torch.mm(x, weight.T, out=out))
        flops[name] = 2 * m * n * k
        found["products"][name] = {"m": m, "n": n, "k": k, "flop_per_second": flops[name] / seconds[name]}
    layer = [name for name in sizes if name != "square"]
    found["square_flop_per_second"] = found["products"]["square"]["flop_per_second"]
    found["layer_flop_per_second"] = sum(flops[name] for name in layer) / sum(seconds[name] for name in layer)
    return found


def describe_card(device: torch.device) -> dict[str, Any]:
    """The card and its driver."""
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "total_bytes": total,
        "free_bytes": free,
        "cuda": torch.version.cuda,
    }
    if tool := shutil.which("nvidia-smi"):
        asked = ["driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory"]
        command = [tool, f"--query-gpu={','.join(asked)}", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        if told.returncode == 0:
            found |= dict(zip(asked, told.stdout.strip().split(", ")))
    return found
