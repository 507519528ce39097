"""Retry after an out-of-memory error: the work runs again under the next smaller plan, which then stays.

The plan is made before the run, from predicted memory; the card may hold less. A step is then redone as a whole with the
same rows, normalization and dropout (a function of the step's number), so only the order of sums changes.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..memory.machine import this_machine
from ..memory.plan import Limits, Plan, smaller
from ..model.activation_offload import LockRefused
from .distributed import world
from .steps import micro_batches

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from .stage import Stage

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
    """

    data: TokenizedDataset
    examples: Sequence[int]
    training: bool

    @property
    def tokens(self) -> int:
        return sum(int(self.data.lengths[i]) for i in self.examples)


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
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
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

    def begin(self, data: TokenizedDataset, examples: Sequence[int], *, training: bool) -> None:
        """Note what runs next (see ``Running``): the next smaller plan depends on it."""
        self._running = Running(data, examples, training)

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

    def groups(self, data: TokenizedDataset) -> Iterator[tuple[Attempt, list[int]]]:
        """Every example of this process's share once, for passes without gradients, in groups of the plan's size, each with
        the context to compute it in. A group that did not fit comes again, split; those that did are not repeated.

        Raises:
            UserError: as ``attempts``.
        """
        left = world().share(range(len(data.lengths)), data.lengths)
        while left:
            done: set[int] = set()
            for group in micro_batches(left, data.lengths, self.plan.micro_tokens):
                self.begin(data, group, training=False)
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

    def _limits(self) -> Limits:
        """The device's memory, and the main memory that may be locked, with what the current plan has locked."""
        stage, memory = self.stage, self.stage.config.memory
        machine = this_machine(stage.base.device, stage.base.dtype, memory, measure=False)
        limits = Limits.of(stage.workload, machine, memory)
        locked = sum(self.plan.host.values())
        if not self._lockable:
            return replace(limits, host=locked - self.plan.host.get("kept activations", 0))
        return limits if memory.host is not None else replace(limits, host=limits.host + locked)

    def _shrink(self, failure: str) -> None:
        """Free what can be freed, and follow the next smaller plan."""
        running, stage = self._running, self.stage
        if running is None:
            raise UserError(f"memory ran out before anything was computed: {failure}", "Use a device with more memory.")
        stage.decoder.release()
        gc.collect()  # an error that went through autograd may be part of a cycle
        size = f"{len(running.examples)} example{'s' * (len(running.examples) > 1)}, {running.tokens:,} tokens"
        failed = self.plan
        while True:
            lockable = self._lockable
            plan = smaller(
                failed if lockable else replace(failed, offload=0),
                stage.workload,
                self._limits(),
                stage.config.memory,
                tokens=running.tokens,
                several=len(running.examples) > 1,
                training=running.training,
            )
            if plan is None:
                raise _does_not_fit(stage, running, failure)
            logger.info(f"memory ran out for {size} ({failure}); the plan is now: {'; '.join(plan.lines())}")
            with Attempt(self) as attempt:
                self.follow(plan)
            if attempt.failure is None:
                break
            # without locked memory other plans come next, else ones that are smaller still
            failed = plan if self._lockable == lockable else self.plan
            failure = attempt.failure
        if stage.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._recording:
            self.record()


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
        f"To continue, {', '.join(cures)}. The last checkpoint is intact.",
    )
