"""Never out of memory: what did not fit runs again under a smaller plan, and from then on everything does.

A plan is made before the run, from what the memory should hold; the card may hold less (another program took some, or
the accounting missed something). Then a step is redone as a whole: the same rows, the same normalization and the same
dropout, which is a function of the step's number, so that nothing but the order of sums changes.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..memory.estimate import kept_widths
from ..memory.machine import HOST_SHARE, main_memory, parse_size
from ..memory.plan import Plan
from ..model.activation_offload import LockRefused
from ..model.layer_spec import Keep
from ..model.shape import Shape
from .distributed import world
from .steps import micro_batches

if TYPE_CHECKING:
    from .stage import Say, Stage

T = TypeVar("T")

# What says out of memory without being torch.OutOfMemoryError: the driver, cuBLAS' workspaces, Triton loading a kernel,
# and a CPU's own allocator. Main memory that cannot be locked for copies is another matter, and a UserError already.
WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",  # of segments that grow
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
# What cuBLAS says where it cannot make its handle: for lack of memory, if less than a handle takes is free; else it is a
# fault of the installation.
CUBLAS_UNINITIALIZED, CUBLAS_BYTES = "CUBLAS_STATUS_NOT_INITIALIZED", 512 * 2**20
# The MLP's slices, in tokens. The first is still long enough for matrix products at full speed.
TILES = (2048, 512)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory ran out, whoever noticed."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if CUBLAS_UNINITIALIZED in str(error):
        return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < CUBLAS_BYTES
    return any(words in str(error) for words in WORDS)


@dataclass(frozen=True)
class Running:
    """What runs, for the case that it does not fit.

    Attributes:
        data, examples: the rows, and which of them run at once.
        training: a backward pass follows, so that it matters what layers keep.
        together: policy and live reference run in one pass, where the plan says so.
    """

    data: TokenizedDataset
    examples: Sequence[int]
    training: bool
    together: bool

    @property
    def tokens(self) -> int:
        return sum(int(self.data.lengths[i]) for i in self.examples)


def smaller(plan: Plan, running: Running, *, quantized: bool, may_offload: bool, may_stream: bool) -> Plan | None:
    """The next plan for what did not fit; None where nothing is left to try.

    What costs least time comes first:

    1. Fewer tokens at once, half of what failed, down to the longest example of the data, which has to run anyway. The
       matrix products are the same; weights are dequantized more often.
    2. The MLP over 2048 tokens at a time: the same products, still large ones.
    3. A live reference in its own pass: weights are dequantized twice.
    4. The small scratch: gate and up are dequantized twice in a backward pass, and once a tile.
    5. ``keep`` from ``all`` to ``attention`` (most products of the forward pass run again, about a third more time),
       then to ``input`` (the attention does too).
    6. The MLP over 512 tokens at a time: products too small for a card's full speed.
    7. What is kept goes to the host: 8 KB a token and layer over PCIe, twice (of Mistral-7B's inputs).
    8. The base goes to the host for good: its bytes over PCIe twice a micro-batch, and as many bytes of main memory.
    9. Fewer tokens than the longest example has: where even that one fits alone, others need not run beside each other.

    Args:
        plan: under which it failed.
        running: what failed.
        quantized: the base is dequantized into the scratch.
        may_offload, may_stream: there is a host beside the device, and the user has not ruled it out.
    """
    tokens, several = running.tokens, len(running.examples) > 1
    longest = int(running.data.lengths.max())
    room = min(plan.micro_tokens, tokens)  # a step may have far fewer tokens than the plan would let it have
    if several and room > longest:
        return replace(plan, micro_tokens=max(longest, room // 2))
    if tokens > TILES[0] and (plan.tile is None or plan.tile > TILES[0]):
        return replace(plan, tile=TILES[0])
    if running.together and plan.reference == "together":
        return replace(plan, reference="own")
    if quantized and plan.scratch == "layer":
        return replace(plan, scratch="small")
    if running.training and "all" in plan.keep:
        return replace(plan, keep=tuple("attention" if keep == "all" else keep for keep in plan.keep))
    if running.training and "attention" in plan.keep:
        least: Keep = "input"
        return replace(plan, keep=(least,) * len(plan.keep))
    if tokens > TILES[1] and (plan.tile is None or plan.tile > TILES[1]):
        return replace(plan, tile=TILES[1])
    if running.training and may_offload and plan.offload < len(plan.keep):
        return replace(plan, offload=len(plan.keep))
    if may_stream and not plan.stream:
        return replace(plan, stream=True)
    if several and room > 1:
        return replace(plan, micro_tokens=room // 2)
    return None


def _unknown() -> dict[str, Any]:
    """In place of what was forecast for the plan before, and does not hold for this one."""
    return {"account": {}, "host": {}, "at": "", "seconds_per_step": 0.0, "tokens_per_second": 0.0}


def changes(old: Plan, new: Plan) -> str:
    """What is different, in words."""
    said = []
    if new.micro_tokens != old.micro_tokens:
        said.append(f"{new.micro_tokens:,} tokens at once instead of {old.micro_tokens:,}")
    if new.keep != old.keep:
        kept = "its input and the attention's output" if "attention" in new.keep else "its input"
        said.append(f"a layer keeps {kept} at most")
    if new.tile != old.tile:
        said.append(f"the MLP takes {new.tile:,} tokens at a time")
    if new.offload != old.offload:
        said.append("what layers keep lies in main memory between the passes")
    if new.stream != old.stream:
        said.append("the base lies in main memory and comes to the card one layer ahead")
    if new.scratch != old.scratch:
        said.append("weights are dequantized into the small scratch")
    if new.reference != old.reference:
        said.append("the reference has a pass of its own")
    return ", ".join(said)


class OomRetry:
    """Runs a stage's work under its plan, and what does not fit again under a smaller one.

    Args:
        stage: its ``plan`` is replaced.
        say: prints a line.
    """

    def __init__(self, stage: Stage, say: Say) -> None:
        self.stage = stage
        self.say = say
        self._running: Running | None = None
        self._recording = False
        self._lockable = True  # whether the system lends locked memory, as far as is known

    @property
    def plan(self) -> Plan:
        return self.stage.plan

    def follow(self, plan: Plan) -> None:
        """Work under this plan from here on."""
        self.stage.decoder.follow(plan)
        self.stage.plan = plan

    def record(self) -> None:
        """From here on stage.json has the plan, so that a resumed run begins with it. (A dry run never comes here.)"""
        self._recording = True
        if self.stage.writes and self.stage.info.get("plan") != self.plan.as_dict():
            self.stage.info["plan"] = self.plan.as_dict()
            self.stage.dir.write_info(self.stage.info)

    def begin(self, data: TokenizedDataset, examples: Sequence[int], *, training: bool, together: bool = False) -> None:
        """Say what runs next, before it does; see ``Running``."""
        self._running = Running(data, examples, training, together)

    def __call__(self, work: Callable[[], T], undo: Callable[[], None] = lambda: None) -> T:
        """Run it until it fits.

        Args:
            work: can be run again; calls ``begin``.
            undo: drops what a run that failed left behind.
        Raises:
            UserError: a single example does not fit, whatever the plan; it is named.
        """
        while True:
            result, failure = self._attempt(work)
            if failure is None:
                return result  # type: ignore[return-value]
            undo()
            self._shrink(failure)

    def over(self, data: TokenizedDataset, run: Callable[[list[int]], None], *, together: bool = False) -> None:
        """Every example of this process's share once, without gradients, in groups of the plan's size. What is done is not
        done again.

        Args:
            run: takes indices; what it adds to its results it adds at the end, when nothing can fail any more.
            together: see ``Running``.
        Raises:
            UserError: as ``__call__``.
        """
        left = world().share(range(len(data.lengths)), data.lengths)
        while left:
            done: set[int] = set()
            for group in micro_batches(left, data.lengths, self.plan.micro_tokens):
                self.begin(data, group, training=False, together=together)
                _, failure = self._attempt(lambda: run(group))  # noqa: B023 (called at once)
                if failure is not None:
                    self._shrink(failure)
                    break
                done.update(group)
            left = [i for i in left if i not in done]

    def _lends(self, count: int) -> bool:
        """Whether there is a host beside the device that can spare so many bytes."""
        if self.stage.base.device.type == "cpu" or not self._lockable:
            return False
        limit = self.stage.config.memory.host
        return count <= (int(main_memory() * HOST_SHARE) if limit is None else parse_size(limit, "memory.host"))

    def _attempt(self, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """The result, or what memory ran out for. An error's traceback holds the frames, and those the failed graph: both
        must be gone before the next attempt, and are when this has returned."""
        try:
            return work(), None
        except (RuntimeError, LockRefused) as error:  # torch.OutOfMemoryError is the former
            if isinstance(error, LockRefused):
                if self.stage.config.memory.offload:
                    raise
                self._lockable = False
            elif not is_out_of_memory(error):
                raise
            link: BaseException | None = error
            while link is not None:
                traceback.clear_frames(link.__traceback__)
                link = link.__cause__ or link.__context__
            return None, str(error).strip().splitlines()[0]

    def _shrink(self, failure: str) -> None:
        """Free what can be freed, and follow the next smaller plan."""
        running, stage, device = self._running, self.stage, self.stage.base.device
        if running is None:
            raise UserError(f"memory ran out before anything was computed: {failure}", "Use a device with more memory.")
        stage.decoder.release()
        gc.collect()  # an error that went through autograd may be part of a cycle
        size = f"{len(running.examples)} example{'s' * (len(running.examples) > 1)}, {running.tokens:,} tokens"
        what = f"memory ran out for {size} ({failure}); it is tried again"
        refused: str | None = failure
        while refused is not None:
            plan = self._next(running, refused)
            self.say(f"{what}, from here on with: {changes(self.plan, plan)}")
            adapted = replace(plan, bytes_per_token=_kept_per_token(stage, plan), **_unknown())
            lockable = self._lockable
            _, refused = self._attempt(lambda: self.follow(adapted))  # noqa: B023 (called at once)
            what = f"that could not be had ({refused}); it is tried"
            if refused is not None and not lockable:
                raise _does_not_fit(stage, running, refused)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if self._recording:
            self.record()

    def _next(self, running: Running, failure: str) -> Plan:
        """The next smaller plan.

        Raises:
            UserError: there is none.
        """
        stage = self.stage
        plan = smaller(
            self.plan if self._lockable else replace(self.plan, offload=0),
            running,
            quantized=stage.base.load_in_4bit,
            may_offload=stage.config.memory.offload is not False and self._lends(_inputs_bytes(stage, running)),
            may_stream=stage.config.memory.stream is not False and self._lends(_base_bytes(stage)),
        )
        if plan is None:
            raise _does_not_fit(stage, running, failure)
        return plan


def _inputs_bytes(stage: Stage, running: Running) -> int:
    """What all layers' inputs take."""
    shape = stage.stack.base.config
    return shape.num_hidden_layers * shape.hidden_size * stage.base.dtype.itemsize * running.tokens


def _base_bytes(stage: Stage) -> int:
    return sum(p.nbytes for p in stage.stack.base.parameters() if not p.requires_grad)


def _kept_per_token(stage: Stage, plan: Plan) -> int:
    """Bytes a token that all layers keep under this plan."""
    shape, size = Shape.of(stage.stack.base.config), stage.base.dtype.itemsize
    widths = [kept_widths(shape, keep, stage.stack.ranks_per_layer()) for keep in plan.keep]
    return sum(narrow * size + wide * max(4, size) for narrow, wide in widths)


def _does_not_fit(stage: Stage, running: Running, failure: str) -> UserError:
    index = running.examples[0]
    cures = [f"lower max_length (it is {stage.config.max_length:,})"]
    if running.training:
        cures.append(f"lower lora_r (it is {stage.config.lora_r})")
    if stage.base.device.type != "cpu":
        if not stage.plan.stream:
            cures.append("allow memory.stream, which leaves the base in main memory")
        if running.training and stage.config.memory.offload is False:
            cures.append("allow memory.offload")
        cures.append("or take a card with more memory")
    else:
        cures.append("or take a machine with more memory")
    return UserError(
        f"{running.data.examples[index].where}: its {running.tokens:,} tokens do not fit into memory, alone and with "
        f"everything that saves memory in use ({failure}).",
        f"To go on, {', '.join(cures)}. The last checkpoint is untouched.",
    )
