"""What a run takes of the device's memory, of the main memory and of the disk, in bytes by name, before any of it is taken.

Everything is counted from the sizes of tensors, as the code makes them (``phases`` for a layer while it runs). Two numbers
are no counts: what a CUDA context takes, and the allocator's slack. ``tests/memory/test_account.py`` compares what can be compared
on a CPU, to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ..model.dequant_buffer import ScratchMode
from ..model.layer_spec import Keep
from ..ops.token_logps import CHUNK_BYTES
from .ledger import Backend, Run, sites_of
from .phases import backward_peak, forward_peak
from .workload import PROJECTIONS, Shape, Workload

MIB, GIB = 2**20, 2**30
ALIGNMENT = 256  # of a tensor in a streamed layer's slab (``stream``)
NF4_BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale; scales that share one of their own
# A process's CUDA context, its kernels and the driver's own, outside the allocator: 0.4 to 0.8 GiB.
CONTEXT_BYTES = 3 * GIB // 4
# cuBLAS keeps a workspace (torch/cuda: CUBLAS_WORKSPACE_CONFIG's default :4096:2:16:8; 32 MiB from compute capability 9.0)
CUBLAS_BYTES, CUBLAS_BYTES_HOPPER = 8_519_680, 32 * MIB
# The one estimate: what the allocator holds beyond what was asked for. Segments of large blocks grow by 20 MiB, those of small
# ones by 2, and requests are rounded to 512 bytes; a freed block is not always where the next one fits. So a share of what
# comes and goes, and two steps of growth.
SLACK_SHARE, SLACK_BYTES = 0.03, 40 * MIB

# of a streamed base; in main memory, but not locked there (``stream``; a tied one is the output head, which is)
PAGED = "embedding"


@dataclass(frozen=True)
class Setting:
    """What the plan decides, as far as memory depends on it (see ``plan.Plan``)."""

    tokens: int
    keep: tuple[Keep, ...]
    offload: int = 0
    stream: bool = False
    tile: int | None = None
    scratch: ScratchMode = "layer"
    together: bool = True


@dataclass(frozen=True)
class Device:
    """Where it runs.

    Attributes:
        backend: what computes attention.
        workspace: bytes that its matrix products keep.
        context: bytes that a process takes before its first tensor, where they are not measured away.
        slack: whether an allocator rounds.
    """

    backend: Backend = "flash"
    workspace: int = CUBLAS_BYTES
    context: int = 0
    slack: bool = True

    @classmethod
    def of(cls, capability: tuple[int, int], half: bool = True, *, context: int = CONTEXT_BYTES) -> Device:
        """A CUDA card by its compute capability; `half`: it computes in 16 bits."""
        return cls(
            "flash" if half and capability >= (8, 0) else "efficient",
            CUBLAS_BYTES_HOPPER if capability[0] == 9 else CUBLAS_BYTES,
            context,
        )


CPU = Device("cpu", 0, 0, slack=False)


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes by name.

    Attributes:
        resident: on the device from the first step to the last.
        passing: on the device where the peak is, beside that.
        at: where the peak is, in words.
        managed: optimizer states that CUDA moves between host and device; on the host where the device is full.
        host: in main memory, locked but for `PAGED`.
    """

    resident: dict[str, int]
    passing: dict[str, int]
    at: str
    managed: int = 0
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + sum(self.passing.values())

    def as_dict(self) -> dict[str, int]:
        return {**self.resident, **self.passing, "peak": self.peak}


# -- what lies there from the first step to the last -------------------------------------------------------------------


def stored_bytes(job: Workload, projection: str) -> list[int]:
    """The tensors of one frozen projection, as bitsandbytes stores them: packed values; scales; their code; and of nested
    scales their own scales, code and offset."""
    out, width = job.shape.matrices[projection]
    numbers = out * width
    if job.storage == "dense":
        return [numbers * job.dtype.itemsize]
    packed, scales, code = -(-numbers // 2), -(-numbers // NF4_BLOCK), 16 * 4
    if job.storage == "nf4":
        return [packed, 4 * scales, code]
    return [packed, scales, code, 4, 4 * -(-scales // NESTED_BLOCK), 256 * 4]


def slab_bytes(job: Workload) -> int:
    """A layer's projections in one block, each tensor aligned (``stream.slab_bytes``)."""
    if "slab" not in job.memo:
        aligned = (-(-n // ALIGNMENT) * ALIGNMENT for name in PROJECTIONS for n in stored_bytes(job, name))
        job.memo["slab"] = sum(aligned)
    return job.memo["slab"]


def base_bytes(job: Workload, *, stream: bool = False) -> dict[str, int]:
    """The frozen base on the device."""
    s, size = job.shape, job.dtype.itemsize
    biases = sum(s.matrices[name][0] for name in s.biases)
    small = {"norms": size * (s.layers * (2 * s.hidden + biases) + s.hidden)}
    if stream:
        return {"two layers' buffers": min(2, s.layers) * slab_bytes(job), **small}
    layers = s.layers * sum(sum(stored_bytes(job, name)) for name in PROJECTIONS)
    head = {} if s.tied else {"output head": size * s.head_weights}
    return {"decoder layers": layers, "embedding": size * s.head_weights, **head, **small}


def optimizer_bytes(optim: str, tensors: Sequence[int], *, cuda: bool = True) -> tuple[int, int]:
    """(on the device, managed) of the optimizer's state for tensors of so many float32 numbers.

    Two moments each, of 4 bytes, or of one with a scale for every 256 (bitsandbytes; under 4,096 numbers 4 bytes). Of the
    paged ones the states of tensors from 100,000 numbers on are managed memory. torch keeps a float32 step number.
    """
    if optim == "adamw_torch" or (optim == "paged_adamw_32bit" and not cuda):
        return sum(8 * n + 4 for n in tensors), 0
    device = managed = 0
    for n in tensors:
        small = optim == "paged_adamw_32bit" or n < 4096
        states = 8 * n if small else 2 * n
        device += 0 if small else 2 * 4 * -(-n // 256)
        if optim.startswith("paged") and n >= 100_000 and cuda:
            managed += states
        else:
            device += states
    if optim != "paged_adamw_32bit" and any(n >= 4096 for n in tensors):
        device += 2 * 4 * 256  # the two codes, shared by all
    return device, managed


def scratch_bytes(job: Workload, mode: ScratchMode) -> int:
    """Of dequantized weights (``memory.scratch_elements``)."""
    return 0 if job.storage == "dense" else job.dtype.itemsize * scratch_widths(job.shape, mode)


def scratch_widths(shape: Shape, mode: ScratchMode) -> int:
    """Numbers in it: q, k, v and o beside each other, and of gate, up and down all three or one."""
    attention = 2 * shape.hidden * (shape.queries + shape.keys)
    return attention + (3 if mode == "layer" else 1) * shape.hidden * shape.inner


# -- what comes and goes -----------------------------------------------------------------------------------------------


def layer_run(job: Workload, setting: Setting, device: Device, layer: int) -> Run:
    """A layer over one micro-batch."""
    tokens = setting.tokens
    segments = max(1, -(-tokens // (job.segment or tokens))) + (job.method == "dpo")
    keys = tokens if job.method == "sft" else round(tokens * job.keys)
    half = device.backend != "cpu"
    return Run(
        job.shape, sites_of(job, layer), tokens, keys, segments, job.dtype.itemsize, setting.tile, device.backend, half
    )


def input_bytes(job: Workload, tokens: int) -> int:
    """A micro-batch's ids, positions and streams; its rotary angles; rows and ids of its targets."""
    return tokens * (3 * 8 + 2 * job.shape.head_dim * job.dtype.itemsize) + round(tokens * job.targets) * 16


def head_phases(job: Workload, setting: Setting, *, cuda: bool = True) -> dict[str, dict[str, int]]:
    """The final norm and the head (``decoder``, ``token_logps``), phase by phase: bytes by name, beside what is kept."""
    size, wide = job.dtype.itemsize, max(4, job.dtype.itemsize)
    s, targets = job.shape, round(setting.tokens * job.targets)
    rows, x = targets * s.hidden * size, setting.tokens * s.hidden * size
    streams = 2 if job.live_reference and setting.together else 1
    chunk = max(1, min(targets, (4 * CHUNK_BYTES if cuda else CHUNK_BYTES) // (max(1, s.vocabulary) * wide)))
    if cuda and chunk < targets and chunk > 128:
        chunk -= chunk % 128
    head = {"output head, copied": s.head_weights * size} if setting.stream else {}
    # the graph's rows before the norm with their scales, and after it; the other stream's after it
    normed = {"target rows": streams * rows + rows + 4 * targets}
    logits = {
        "logits of a chunk": chunk * s.vocabulary * size,
        # a chunk's beside those of its targets, or of the chunk before
        "expected embeddings": 2 * chunk * s.hidden * size + 5 * wide * chunk,
    }
    numbers = {"log-probabilities": targets * (3 * wide + 1)}
    return {
        "final norm": {"hidden states": streams * x, "target rows": 2 * streams * rows + 4 * targets},
        "pass through the output head": {**normed, **head, **logits, **numbers, "slopes": rows},
        "backward pass of the output head": {"target rows": 3 * rows + 4 * targets, **numbers},
        "backward pass of the final norm": {
            "target rows": 2 * rows + 4 * targets,
            "hidden states": x,
            "sorting": 40 * targets,
        },
    }


def account(job: Workload, setting: Setting, device: Device, *, micro_batches: int = 2) -> MemoryBreakdown:
    """A run's memory under a setting.

    Args:
        micro_batches: of a step; from the second on all gradients are there while a layer goes backward.
    """
    s, cuda = job.shape, device.backend != "cpu"
    resident = _resident(job, setting, device)
    gradients = 4 * job.parameters
    inputs = input_bytes(job, setting.tokens)
    x = setting.tokens * s.hidden * job.dtype.itemsize
    together = job.live_reference and setting.together
    runs = _runs(job, setting, device)
    wanted = list(zip(job.kind_of, setting.keep))
    kept_of = {each: _kept_sum(job, setting, device, runs, *each) for each in set(wanted)}
    kept = [kept_of[w] for w in wanted]
    before = [*[0] * setting.offload, *accumulate(kept[setting.offload :], initial=0)]  # by earlier layers
    later = _later_gradients(job)
    all_there = gradients if micro_batches > 1 else 0

    best: tuple[int, str, dict[str, int]] = (0, "", {})

    def consider(at: str, **parts: int) -> None:
        nonlocal best
        if (total := sum(parts.values())) > best[0]:
            best = (total, at, parts)

    # among like layers what is there grows (or shrinks) evenly: the peak is near an end
    peaks = job.memo.setdefault(("peaks", setting.tokens, setting.tile, device), {})
    ends = {0, setting.offload, *(i for i in range(1, s.layers) if wanted[i] != wanted[i - 1])}
    for i in sorted({n for end in ends for n in range(end - 2, end + 2) if 0 <= n < s.layers} | {s.layers - 1}):
        kind, keep = wanted[i]
        there = before[i] + (kept[i - 1] if 0 < i <= setting.offload else 0)  # the layer before is on its way
        consider(
            f"forward pass of layer {i + 1}",
            gradients=all_there,
            kept=there,
            inputs=inputs + x,
            reference=x * together,
            layer=_layer_peak(peaks, runs, kind, keep),
        )
        if together:  # beside what the policy's layer has just left: what it keeps, and its output
            consider(
                f"reference's pass of layer {i + 1}",
                gradients=all_there,
                kept=before[i] + kept[i],
                inputs=inputs + x,
                reference=x,
                layer=_layer_peak(peaks, runs, kind, None),
            )
        # the gradients of later layers are there already
        consider(
            f"backward pass of layer {i + 1}",
            gradients=all_there or later[i + 1],
            kept=there,
            inputs=inputs + x,
            layer=_layer_peak(peaks, runs, kind, keep, i < setting.offload),
        )
    for at, head in _head_sums(job, setting, cuda).items():
        consider(at, gradients=all_there, kept=before[-1], inputs=inputs, head=head)
    consider("optimizer's step", gradients=gradients)
    _, at, parts = best
    passing = {NAMES[name]: n for name, n in parts.items() if n}
    if device.slack:
        share = SLACK_SHARE * sum(n for name, n in parts.items() if name != "gradients")
        passing["allocator's slack"] = round(share) + SLACK_BYTES
    host = {}
    if setting.offload:
        host["kept activations"] = sum(kept[: setting.offload])
    if setting.stream:
        head = s.head_weights * job.dtype.itemsize
        host["streamed base"] = s.layers * slab_bytes(job) + head
        if not s.tied:
            host[PAGED] = head
    return MemoryBreakdown(resident, passing, at, job.memo["managed"], host)


def _runs(job: Workload, setting: Setting, device: Device) -> dict[int, Run]:
    """Of each kind of layer."""
    key = ("runs", setting.tokens, setting.tile, device)
    if key not in job.memo:
        job.memo[key] = {kind: layer_run(job, setting, device, layer) for kind, layer in job.kinds.items()}
    return job.memo[key]


def _layer_peak(
    peaks: dict[tuple[int, Keep | None, bool | None], int],
    runs: dict[int, Run],
    kind: int,
    keep: Keep | None,
    away: bool | None = None,
) -> int:
    """Of a forward pass; with ``away``, of a backward one. ``peaks`` are those known of such runs."""
    key = (kind, keep, away)
    if key not in peaks:
        run = runs[kind]
        peaks[key] = forward_peak(run, keep) if away is None or keep is None else backward_peak(run, keep, away)
    return peaks[key]


def _later_gradients(job: Workload) -> list[int]:
    """Bytes of the gradients that are there while a layer goes backward, of each layer; last, before all of them."""
    if "later" not in job.memo:
        of_layers = accumulate(job.gradient_bytes[kind] for kind in job.kind_of)
        job.memo["later"] = [4 * job.parameters, *(4 * job.parameters - n for n in of_layers)]
    return job.memo["later"]


def _kept_sum(job: Workload, setting: Setting, device: Device, runs: dict[int, Run], kind: int, keep: Keep) -> int:
    key = ("kept", setting.tokens, setting.tile, device, kind, keep)
    if key not in job.memo:
        job.memo[key] = sum(runs[kind].kept(keep).values())
    return job.memo[key]


def _head_sums(job: Workload, setting: Setting, cuda: bool) -> dict[str, int]:
    key = ("head", setting.tokens, setting.stream, setting.together, cuda)
    if key not in job.memo:
        job.memo[key] = {at: sum(parts.values()) for at, parts in head_phases(job, setting, cuda=cuda).items()}
    return job.memo[key]


NAMES = {
    "gradients": "gradients",
    "kept": "kept activations",
    "inputs": "inputs",
    "reference": "reference's hidden states",
    "layer": "a layer at work",
    "head": "the head at work",
}


def _resident(job: Workload, setting: Setting, device: Device) -> dict[str, int]:
    key = (setting.stream, setting.scratch, device)
    if key not in job.memo:
        cuda = device.backend != "cpu"
        on_device, job.memo["managed"] = optimizer_bytes(job.optim, job.trained_tensors, cuda=cuda)
        found = {
            **base_bytes(job, stream=setting.stream),
            "dequantized weights": scratch_bytes(job, setting.scratch),
            "adapters": 4 * sum(sum(a.tensors(job.shape)) for a in job.adapters),
            "optimizer's state": on_device,
            # the forward pass has one, and the backward pass, which runs in autograd's thread, another
            "matrix products' workspace": 2 * device.workspace,
            "CUDA context" if cuda else "process": device.context,
        }
        job.memo[key] = {name: n for name, n in found.items() if n}
    return job.memo[key]


def in_words(size: int) -> str:
    """``3.35 GiB``; ``12.3 MiB`` where that says more."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def kept_widths(shape: Shape, keep: Keep, ranks: int) -> tuple[int, int]:
    """Numbers a token that a layer keeps: of the hidden states' dtype, and of at least 32 bits."""
    narrow = shape.hidden  # the layer's input
    if keep == "input":
        return narrow, 0
    narrow += shape.queries + shape.hidden  # the attention's output, and the residual after it
    if keep == "all":
        narrow += shape.queries + 2 * shape.keys + 2 * shape.inner + ranks
    return narrow, shape.heads  # its log-sum-exp


def kept_per_token(job: Workload, keep: Sequence[Keep]) -> int:
    """Bytes a token that all layers keep, wherever it lies."""
    size, total = job.dtype.itemsize, 0
    for index, policy in enumerate(keep):
        narrow, wide = kept_widths(job.shape, policy, job.ranks[index])
        total += narrow * size + wide * max(4, size)
    return total
