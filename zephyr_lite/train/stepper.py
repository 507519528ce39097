"""One step of an adapter's training: micro-batches forward and backward, clipping, the update, the schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..config.load import RunConfig
from ..errors import UserError
from ..memory.plan import Plan
from ..model.adapters import AdapterStack, total_norm
from .distributed import world
from .objective import Metrics, Objective
from .oom import is_out_of_memory
from .optim import make_optimizer, make_scheduler
from .steps import largest_micro_batches, micro_batches, rows_of_step, step_schedule, tokens_of_largest_step


class Stepper:
    """Makes the steps of a run, each by its number.

    Args:
        config: the stage's configuration.
        stack: the live model.
        task: the stage's losses and rows.
        plan: how a step is split and computed; the task follows it, and where memory runs out a smaller one.
        fp16: scale the loss, as float16 gradients need it.
    """

    def __init__(
        self, config: RunConfig, stack: AdapterStack, task: Objective, plan: Plan, *, fp16: bool = False
    ) -> None:
        self.config, self.stack, self.task = config, stack, task
        if plan != task.guard.plan:
            task.follow(plan)
        self.parameters = stack.parameters()
        self.optimizer = make_optimizer(config, self.parameters)
        self.rows = task.rows()
        self.per_epoch, self.total = step_schedule(config, len(self.rows))
        self.scheduler = make_scheduler(config, self.optimizer, self.total)
        self.device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self._unscaled = False  # whether the scaler has seen this step's gradients
        self.world = world()
        # with several processes all gradients lie in one tensor, which is summed over them without a copy
        self._gradients: Tensor | None = None

    @property
    def plan(self) -> Plan:
        return self.task.guard.plan

    def examples_of_step(self, step: int) -> list[int]:
        return [i for row in rows_of_step(self.config, len(self.rows), step) for i in self.rows[row]]

    def gradients(self, step: int) -> tuple[Metrics, int]:
        """Forward and backward of this process's share of a step, all its micro-batches; gradients are left on the
        parameters, scaled by the loss scaler. Returns the summed metrics of the share and the count of the whole step.
        Where memory runs out it fails: see ``prepare``."""
        examples = self.examples_of_step(step)
        total = self.task.count(examples)
        lengths = self.task.lengths()
        sums: dict[str, Any] = {}
        for group in micro_batches(self.world.share(examples, lengths), lengths, self.plan.micro_tokens):
            loss, parts = self.task.loss(group, step, total)
            self.scaler.scale(loss).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                sums[name] = sums.get(name, 0.0) + (value.double() if isinstance(value, Tensor) else value)
            del loss  # and with it what all layers' nodes hold
        return {name: float(value) for name, value in sums.items()}, total

    def prepare(self, step: int) -> tuple[Metrics, bool, bool]:
        """Everything of a step that comes before its update: unscaled and clipped gradients are left on the parameters.
        Where memory runs out the whole of it is done again, under a smaller plan.

        Returns:
            the step's metrics, whether its update is to be applied, and whether its loss was finite.
        """

        self._no_gradients()
        self._unscaled = False
        if self.world.size == 1:
            return self.task.guard(lambda: self._finish(*self.gradients(step)), self._undo)
        count = 0

        def share() -> Metrics:
            nonlocal count
            sums, count = self.task.guard(lambda: self.gradients(step), self._undo)
            return sums

        sums = self.world.sums(share)
        assert self._gradients is not None
        self.world.add(self._gradients)
        return self._finish(sums, count)

    def _finish(self, sums: Metrics, total: int) -> tuple[Metrics, bool, bool]:
        """Metrics of the whole step; unscaled and clipped gradients."""
        metrics = self.task.summarize(sums, total)
        self._unscaled = True
        self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = total_norm(grads)
        finite = math.isfinite(metrics["loss"])
        metrics["grad_norm"] = norm.item()
        metrics["learning_rate"] = self.scheduler.get_last_lr()[0]
        applied = finite and math.isfinite(metrics["grad_norm"])
        if applied:
            torch._foreach_mul_(grads, torch.clamp(self.config.max_grad_norm / (norm + 1e-6), max=1.0))
        return metrics, applied, finite

    def _no_gradients(self) -> None:
        """Before a step. Alone, parameters have none; among others each has its place in one tensor, and zeros there."""
        if self.world.size == 1:
            self.optimizer.zero_grad(set_to_none=True)
            return
        if self._gradients is None:
            first = next(iter(self.parameters.values()))
            count = sum(p.numel() for p in self.parameters.values())
            self._gradients = torch.zeros(count, dtype=first.dtype, device=first.device)
        self._gradients.zero_()
        start = 0
        for parameter in self.parameters.values():
            end = start + parameter.numel()
            parameter.grad = self._gradients[start:end].view_as(parameter)
            start = end

    def rehearse(self) -> list[list[int]]:
        """Forward and backward of as large micro-batches as there can be, that of the longest example and the one of most
        tokens, and keep nothing of them: what does not fit on the card shows before the first step, not hours later, and
        the plan adapts to it. Where steps have several micro-batches the gradients of those before lie there too. Returns
        their examples."""
        lengths = self.task.lengths()

        def work() -> list[list[int]]:
            groups = largest_micro_batches(lengths, self.plan.micro_tokens)
            if self.world.size > 1:
                self._no_gradients()
            elif tokens_of_largest_step(self.config, self.rows, lengths) > self.plan.micro_tokens:
                for parameter in self.parameters.values():
                    parameter.grad = torch.zeros_like(parameter)
            for group in groups:
                # the number of no step: it decides nothing but dropout
                loss, _ = self.task.loss(group, self.total, self.task.count(group))
                self.scaler.scale(loss).backward()
                del loss
            return groups

        groups = self.task.guard(work, self._undo)
        self._undo()
        return groups

    def _undo(self) -> None:
        """Forget the gradients, and that the scaler has seen them."""
        self._no_gradients()
        if self._unscaled and self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # the same scale; gradients may be unscaled once an update
        self._unscaled = False

    def _step(self, step: int) -> tuple[Metrics, bool, bool]:
        """One optimizer step; returns its metrics, whether it was applied, and whether its loss was finite."""
        metrics, applied, finite = self.prepare(step)
        if applied:
            self._update(step)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._unscaled = False
        # the schedule follows the rows, not the updates: a step left out is over all the same
        self.scheduler.step()
        return metrics, applied, finite

    def _update(self, step: int) -> None:
        """Change the adapter. This cannot be redone: what was changed already would change twice. The fused AdamW and
        bitsandbytes' kernels for GPUs allocate nothing, their state lies there since before the first step; bitsandbytes
        on a CPU does allocate.

        Raises:
            UserError: memory ran out.
        """
        try:
            self.optimizer.step()  # the gradients are unscaled and finite already, so the scaler has no say in it
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"step {step + 1}: memory ran out while the adapter was being changed ({str(error).splitlines()[0]}).",
                "The last checkpoint is untouched: start the same command again, and the run goes on from it.",
            ) from None
