"""Retry after an out-of-memory error: the work runs again under the next smaller plan, which then stays.

The plan is made before the run, from predicted memory; the card may hold less. A step is then redone as a whole with the
same rows, normalization and dropout (a function of the step's number), so only the order of sums changes.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from ..data.dataset import TokenizedDataset
from ..errors import UserError
from ..memory.machine import this_machine
from ..memory.plan import Plan, smaller
from .distributed import world
from .steps import micro_batches

if TYPE_CHECKING:
    from .stage import Stage

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Messages of RuntimeErrors that mean out of memory: the driver, cuBLAS' workspaces, Triton loading a kernel, the CPU's
# allocator.
WORDS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",  # of segments that grow
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # its handle could not be allocated
    "Triton Error [CUDA]: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's memory ran out."""
    known = isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    return known or isinstance(error, torch.OutOfMemoryError)


class OomRetry:
    """Runs a stage's work under its plan, and again under a smaller one where memory runs out.

    Args:
        stage: its ``plan`` is replaced.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._recording = False
        self._lockable = True  # False once the system refused to lock main memory

    def follow(self, plan: Plan) -> None:
        """Compute under this plan from the next pass on."""
        self.stage.decoder.follow(plan)
        self.stage.plan = plan

    def record(self) -> None:
        """Write the plan into stage.json, now and whenever it changes, so that a resumed run begins with it."""
        self._recording = True
        stage = self.stage
        if stage.writes and stage.info.get("plan") != stage.plan.as_dict():
            stage.info["plan"] = stage.plan.as_dict()
            stage.dir.write_info(stage.info)

    def begin(self, data: TokenizedDataset, examples: Sequence[int], *, training: bool) -> None:
        """Note what runs next, because the next smaller plan depends on it.

        Args:
            data, examples: the rows, and which of them run at once.
            training: a backward pass follows, so that it matters what layers keep.
        """
        self._data, self._examples, self._training = data, examples, training

    def attempts(self) -> Iterator[AbstractContextManager[None]]:
        """Contexts for some work, until it has fit into memory: ``for attempt in oom.attempts(): with attempt: …``.

        Raises:
            UserError: a single example does not fit under any plan; the message names it.
        """
        self._done = False
        while not self._done:
            yield self._attempt()

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        try:
            yield
            self._done = True
            return
        except Exception as error:
            failure = self._failure(error)
        self._shrink(failure)  # after the error, and what it holds, is gone

    def groups(self, data: TokenizedDataset, compute: Callable[[list[int]], T]) -> Iterator[T]:
        """Call a function, without gradients, with groups of the plan's size that hold every example of this process's share
        once. A group that did not fit is split; those that did are not repeated."""
        left = world().shard(range(len(data.lengths)), data.lengths)
        while left:
            done: set[int] = set()
            failure = None
            for group in micro_batches(left, data.lengths, self.stage.plan.micro_tokens):
                self.begin(data, group, training=False)
                try:
                    found = compute(group)
                except Exception as error:
                    failure = self._failure(error)
                    break
                yield found
                done.update(group)
            if failure is not None:
                self._shrink(failure)
            left = [i for i in left if i not in done]

    def _failure(self, error: Exception) -> str:
        """The first line of an error that a smaller plan may cure: out of memory, or main memory that cannot be locked where
        that was not asked for. Any other is raised again.

        The error's traceback holds the frames of what failed, and those its graph: they are cleared, so that the memory is
        free before the next attempt.
        """
        from ..model.activation_offload import LockRefused

        if isinstance(error, LockRefused) and not self.stage.config.memory.offload:
            self._lockable = False
        elif isinstance(error, LockRefused) or not is_out_of_memory(error):
            raise error
        failure = str(error).strip().splitlines()[0]
        link: BaseException | None = error
        while link is not None:
            traceback.clear_frames(link.__traceback__)
            link = link.__cause__ or link.__context__
        return failure

    def _shrink(self, failure: str) -> None:
        """Free what can be freed, and follow the next smaller plan that can be followed."""
        stage, count, memory = self.stage, len(self._examples), self.stage.config.memory
        stage.decoder.release()
        gc.collect()  # an error that went through autograd may be part of a cycle
        tokens = sum(int(self._data.lengths[i]) for i in self._examples)
        failed = stage.plan
        while True:
            # main memory that may be locked: with what the current plan has locked
            machine = this_machine(stage.base.device, stage.base.dtype, memory, measure=False)
            locked, lockable = sum(stage.plan.host.values()), self._lockable
            if not lockable:
                failed = replace(failed, offload=0)
                machine = replace(machine, host=locked - stage.plan.host.get("kept activations", 0))
            elif memory.host is None:
                machine = replace(machine, host=machine.host + locked)
            plan = smaller(
                failed, stage.workload, machine, memory, tokens=tokens, several=count > 1, training=self._training
            )
            if plan is None:
                raise UserError(
                    f"{self._data.examples[self._examples[0]].where}: its {tokens:,} tokens do not fit into memory, alone and "
                    f"with everything that saves memory in use ({failure}).",
                    f"Lower max_length (it is {stage.config.max_length:,}) or lora_r (it is {stage.config.lora_r}), leave "
                    "memory.offload and memory.stream to the plan, or use a device with more memory. The last checkpoint is "
                    "intact.",
                )
            size = f"{count} example{'s' * (count > 1)}, {tokens:,} tokens"
            logger.warning(f"memory ran out for {size} ({failure}); the plan is now: {'; '.join(plan.lines())}")
            try:
                self.follow(plan)
                break
            except Exception as error:
                failure = self._failure(error)
            # without locked memory other plans come next, else ones that are smaller still
            failed = plan if self._lockable == lockable else stage.plan
        if stage.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._recording:
            self.record()
