"""Does the merged folder say what the live stack said? Log-probabilities from the folder, by plain transformers."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..io.safetensors import SafetensorsFile


@dataclass(frozen=True)
class LogpDifference:
    """How far two lists of per-token log-probabilities lie apart.

    Attributes:
        mean: mean of |Δ| over all tokens.
        max: the largest |Δ|.
        tokens: how many were compared.
    """

    mean: float
    max: float
    tokens: int

    def line(self) -> str:
        """For the console."""
        return f"merged against live, {self.tokens} tokens: mean |Δ log p| {self.mean:.2e}, largest {self.max:.2e}"


def compare_logps(live: Sequence[Tensor], merged: Sequence[Tensor]) -> LogpDifference:
    """Summarise the difference of two lists of per-token log-probabilities, row by row of the same shape [T - 1].

    Raises:
        ValueError: the lists are not of the same rows, or are empty.
    """
    if [tuple(x.shape) for x in live] != [tuple(x.shape) for x in merged] or not live:
        raise ValueError("the two lists hold different rows, or none")
    gaps = torch.cat(
        [(x.detach().float().cpu() - y.detach().float().cpu()).abs().flatten() for x, y in zip(live, merged)]
    )
    return LogpDifference(float(gaps.mean()), float(gaps.max()), gaps.numel())


@contextmanager
def open_folder(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    memory: int | None = None,
) -> Iterator[Any]:
    """A model folder, loaded with plain transformers, for as long as the block runs.

    What does not fit in the free memory stays on the disk and is read layer by layer (accelerate's offload), so that
    the check runs on the machine that merged.

    Args:
        device: where to compute.
        dtype: to load in.
        memory: bytes to use at most; None: what is free.
    """
    folder, device = Path(folder), torch.device(device)
    with tempfile.TemporaryDirectory(prefix="zephyr-lite-") as offload:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            **_placement(folder, device, dtype, memory, offload),
        ).eval()
        yield model
        del model


@torch.no_grad()
def folder_logps(
    folder: str | Path,
    rows: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    memory: int | None = None,
) -> list[Tensor]:
    """Per-token log-probabilities of a model folder (``open_folder``); the log-softmax is float32 whatever the dtype.

    Args:
        rows: token ids, each row at least 2 long.

    Returns:
        For each row float32 [T - 1] on the CPU: log p of tokens 1 … T-1.
    """
    result = []
    with open_folder(folder, device, dtype, memory=memory) as model:
        for row in rows:
            ids = torch.tensor([list(row)], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            chosen = logits.gather(1, ids[0, 1:, None].to(logits.device))[:, 0]
            result.append((chosen - logits.logsumexp(dim=-1)).cpu())
    return result


def _placement(
    folder: Path, device: torch.device, dtype: torch.dtype, memory: int | None, offload: str
) -> dict[str, Any]:
    counts = [
        sum(entry.nbytes // entry.torch_dtype.itemsize for entry in SafetensorsFile(path).entries.values())
        for path in folder.glob("*.safetensors")
    ]
    need = sum(counts) * dtype.itemsize
    free = memory if memory is not None else _free(device)
    # A fifth on top for activations, logits and the loader's own copies.
    if need * 1.2 <= free:
        return {"device_map": {"": str(device)}}
    host = free if device.type == "cpu" else _free(torch.device("cpu"))
    limits: dict[int | str, int] = {"cpu": int(host * 0.6)}
    if device.type == "cuda":
        limits[device.index or 0] = int(free * 0.6)
    return {"device_map": "auto", "max_memory": limits, "offload_folder": offload}


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil  # accelerate depends on it

    return int(psutil.virtual_memory().available)
