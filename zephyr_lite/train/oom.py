"""Retry after an out-of-memory error: the work runs again under the next smaller plan, which then stays.

The plan is made before the run, from predicted memory; the card may hold less. A step is then redone as a whole with the
same rows, normalization and dropout (a function of the step's number), so only the order of sums changes.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..memory.account import kept_widths
from ..memory.machine import HOST_SHARE, main_memory, parse_size
from ..memory.plan import Plan
from ..memory.workload import Shape
from ..model.activation_offload import LockRefused
from ..model.layer_spec import Keep
from .distributed import world
from .steps import micro_batches

if TYPE_CHECKING:
    from .stage import Say, Stage

# Messages of RuntimeErrors that mean out of memory: the driver, cuBLAS' workspaces, Triton loading a kernel, the CPU's
# allocator.
WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",  # of segments that grow
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
# cuBLAS could not create its handle: out of memory if less than a handle takes is free, else a broken installation.
CUBLAS_UNINITIALIZED, CUBLAS_BYTES = "CUBLAS_STATUS_NOT_INITIALIZED", 512 * 2**20
# The MLP's slices, in tokens. The first is still long enough for matrix products at full speed.
TILES = (2048, 512)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's memory ran out."""
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


class Attempt:
    """One attempt of ``OomRetry``: a context that catches an out-of-memory error and keeps its first line.

    The error's traceback holds the frames of what failed, and those its graph. They are cleared here, so that the memory is
    free before the next attempt.
    """

    def __init__(self, oom: OomRetry) -> None:
        self.oom = oom
        self.failure: str | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not self.oom.catches(error):
            return False
        self.failure = str(error).strip().splitlines()[0]
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        return True


class OomRetry:
    """Runs a stage's work under its plan, and again under a smaller one where memory runs out.

        for attempt in oom.attempts(undo):
            with attempt:
                ...

    Args:
        stage: its ``plan`` is replaced.
        say: prints a line.
    """

    def __init__(self, stage: Stage, say: Say) -> None:
        self.stage = stage
        self.say = say
        self._running: Running | None = None
        self._recording = False
        self._lockable = True  # False once the system refused to lock main memory

    @property
    def plan(self) -> Plan:
        return self.stage.plan

    def follow(self, plan: Plan) -> None:
        """Compute under this plan from the next pass on."""
        self.stage.decoder.follow(plan)
        self.stage.plan = plan

    def record(self) -> None:
        """Write the plan into stage.json, now and whenever it changes, so that a resumed run begins with it."""
        self._recording = True
        if self.stage.writes and self.stage.info.get("plan") != self.plan.as_dict():
            self.stage.info["plan"] = self.plan.as_dict()
            self.stage.dir.write_info(self.stage.info)

    def begin(self, data: TokenizedDataset, examples: Sequence[int], *, training: bool, together: bool = False) -> None:
        """Note what runs next (see ``Running``): the next smaller plan depends on it."""
        self._running = Running(data, examples, training, together)

    def attempts(self, undo: Callable[[], None] = lambda: None) -> Iterator[Attempt]:
        """Contexts for the same work, until it has fit into memory once.

        Args:
            undo: drops what a failed attempt left behind.

        Raises:
            UserError: a single example does not fit under any plan; the message names it.
        """
        while True:
            attempt = Attempt(self)
            yield attempt
            if attempt.failure is None:
                return
            undo()
            self._shrink(attempt.failure)

    def groups(self, data: TokenizedDataset, *, together: bool = False) -> Iterator[tuple[Attempt, list[int]]]:
        """Every example of this process's share once, for passes without gradients, in groups of the plan's size, each with
        the context to compute it in. A group that did not fit comes again, split; those that did are not repeated.

        Args:
            together: see ``Running``.

        Raises:
            UserError: as ``attempts``.
        """
        left = world().share(range(len(data.lengths)), data.lengths)
        while left:
            done: set[int] = set()
            for group in micro_batches(left, data.lengths, self.plan.micro_tokens):
                self.begin(data, group, training=False, together=together)
                attempt = Attempt(self)
                yield attempt, group
                if attempt.failure is not None:
                    self._shrink(attempt.failure)
                    break
                done.update(group)
            left = [i for i in left if i not in done]

    def catches(self, error: BaseException) -> bool:
        """Whether a smaller plan may help: out of memory, or main memory that cannot be locked and was not asked for."""
        if isinstance(error, LockRefused) and not self.stage.config.memory.offload:
            self._lockable = False
            return True
        return not isinstance(error, LockRefused) and is_out_of_memory(error)

    def _lends(self, count: int) -> bool:
        """Whether the host can lend the device ``count`` bytes of locked memory."""
        if self.stage.base.device.type == "cpu" or not self._lockable:
            return False
        limit = self.stage.config.memory.host
        return count <= (int(main_memory() * HOST_SHARE) if limit is None else parse_size(limit, "memory.host"))

    def _shrink(self, failure: str) -> None:
        """Free what can be freed, and follow the next smaller plan."""
        running, stage = self._running, self.stage
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
            # the forecast of the plan before does not hold for this one
            forecast = {"account": {}, "host": {}, "at": "", "seconds_per_step": 0.0, "tokens_per_second": 0.0}
            adapted = replace(plan, bytes_per_token=_kept_per_token(stage, plan), **forecast)
            lockable = self._lockable
            with Attempt(self) as attempt:
                self.follow(adapted)
            refused = attempt.failure
            what = f"that could not be had ({refused}); it is tried"
            if refused is not None and not lockable:
                raise _does_not_fit(stage, running, refused)
        if stage.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._recording:
            self.record()

    def _next(self, running: Running, failure: str) -> Plan:
        """The next smaller plan.

        Raises:
            UserError: there is none.
        """
        stage, shape = self.stage, self.stage.stack.base.config
        inputs = shape.num_hidden_layers * shape.hidden_size * stage.base.dtype.itemsize * running.tokens
        base = sum(p.nbytes for p in stage.stack.base.parameters() if not p.requires_grad)
        plan = smaller(
            self.plan if self._lockable else replace(self.plan, offload=0),
            running,
            quantized=stage.base.load_in_4bit,
            may_offload=stage.config.memory.offload is not False and self._lends(inputs),
            may_stream=stage.config.memory.stream is not False and self._lends(base),
        )
        if plan is None:
            raise _does_not_fit(stage, running, failure)
        return plan


def _kept_per_token(stage: Stage, plan: Plan) -> int:
    """Bytes per token that all layers keep under this plan."""
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
