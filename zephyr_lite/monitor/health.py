"""Health check of a run: against the published runs if it is their recipe, otherwise by the trend of its own metrics."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..config.load import load_config
from ..train.losses import initial_loss
from ..train.stage import Sample, Stage
from .console import is_evaluation
from .records import json_lines

RECENT = 20  # steps of a recent mean
FIRST = 10  # first steps that it is compared with
RISEN = 0.05  # nats by which a loss has risen, and not fluctuated
OVERFIT = 0.005  # nats above the lowest held-out loss, at two evaluations in a row


@dataclass(frozen=True)
class Published:
    """Ranges of published runs' final held-out metrics, and of their training loss around step 100."""

    loss: tuple[float, float]
    accuracy: tuple[float, float] | None = None
    at_100: tuple[float, float] | None = None


# From the model cards of public runs of the QLoRA recipe (zephyr-7b-sft-qlora and zephyr-7b-dpo-qlora of the alignment
# handbook, and reruns of them on the hub): SFT with the loss over all tokens, on test_sft, six runs; DPO with 16 pairs a
# step, on the 2,000 pairs of test_prefs. The default SFT recipe here has only the assistant's tokens in its loss, and fewer
# held-out rows, so it is not compared.
SFT = Published(loss=(0.944, 0.952))
DPO = Published(loss=(0.475, 0.490), accuracy=(0.74, 0.755), at_100=(0.681, 0.688))
# keys that must be the recipe's
_KEYS = (
    *("model_name_or_path", "load_in_4bit", "dataset", "eval_dataset", "max_length", "max_prompt_length", "batch_size"),
    *("num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "loss_on", "loss_type", "loss_weights"),
    *("lr_scheduler_kwargs", "beta", "lora_r", "lora_alpha", "use_rslora", "lora_dropout", "lora_target_modules"),
    *("loraplus_lr_ratio", "neftune_noise_alpha", "label_smoothing"),
)


def published_of(stage: Stage) -> Published | None:
    """The results to compare a stage with; None if base, data, held-out data or a relevant key differs."""
    recipe = load_config(stage.method, f"zephyr-7b/{stage.method}").config
    recipe.eval_dataset[0].limit = None
    if stage.method == "sft":
        recipe.loss_on = "all"
    same = all(getattr(stage.config, key) == getattr(recipe, key) for key in _KEYS)
    if not same or len(stage.frozen) != (stage.method == "dpo"):
        return None
    return SFT if stage.method == "sft" else DPO


class Progress:
    """Metrics of a stage so far, those logged by earlier processes of the run included.

    Attributes:
        stage: the stage; unit: its objective's; total: number of steps; step: steps done.
        steps, evaluations: their metrics, with ``step``; a value that is not finite may be a word.
        sample: the last sample, or None.
        general_loss: of the ``Outcome``, at the end.
        begun: when this process began (time.monotonic()).
    """

    def __init__(self, stage: Stage, unit: str, total: int, step: int) -> None:
        self.stage, self.unit, self.total, self.step = stage, unit, total, step
        self.steps: list[Mapping[str, Any]] = []
        self.evaluations: list[Mapping[str, Any]] = []
        self.sample: Sample | None = None
        self.general_loss: dict[str, Any] | None = None
        self.begun, self._first_step = time.monotonic(), step
        for record in json_lines(stage.dir.metrics) if step else []:
            if record["step"] <= step:
                self.add(record["step"], record)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add a step or an evaluation."""
        if is_evaluation(metrics):
            self.evaluations.append({**metrics, "step": step})
        else:
            self.steps.append({**metrics, "step": step})
            self.step = max(self.step, step)

    def seconds_left(self) -> float | None:
        """Seconds of the remaining steps at this process's speed, evaluations included; None if unknown."""
        done, left = self.step - self._first_step, self.total - self.step
        return (time.monotonic() - self.begun) / done * left if done and left > 0 else None


def mean(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric's finite values; None without any."""
    values = [value for metrics in steps if math.isfinite(value := float(metrics.get(name, math.nan)))]
    return statistics.fmean(values) if values else None


def moved(steps: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The steps of DPO after the first update: before it every margin is 0, which would count as a wrong preference."""
    return [metrics for metrics in steps if metrics.get("rewards/margins")]


class Verdict(NamedTuple):
    """``good``, ``bad``, or ``open`` if it is too early to tell, with a reason."""

    kind: Literal["good", "bad", "open"]
    text: str


def judge(progress: Progress, published: Published | None) -> Verdict:
    """The verdict on the metrics so far.

    Args:
        published: ranges of the published runs; None if this is another recipe.
    """
    steps, evaluations, pairs = progress.steps, progress.evaluations, progress.unit != "tokens"
    if steps and not math.isfinite(float(steps[-1]["loss"])):
        return Verdict("bad", "the last loss is not a finite number")
    # policy and reference are the same function before the first step
    config = progress.stage.config
    known = initial_loss(config) if pairs else None
    start = float(steps[0]["loss"]) if steps and steps[0]["step"] == 1 else None
    # a cached reference ran in other micro-batches, where 16 bits round in another way
    allowed = 5e-2 if config.precompute_ref_log_probs is True else 5e-3
    if known is not None and start is not None and abs(start - known[0]) >= allowed * max(1, known[0]):
        return Verdict("bad", f"the first loss was {start:.4f} instead of {known[1]}: the reference is not the policy")
    losses = [float(evaluation["eval_loss"]) for evaluation in evaluations]
    if losses and not math.isfinite(losses[-1]):
        return Verdict("bad", "the last held-out loss is not a finite number")
    lowest = min(filter(math.isfinite, losses), default=math.inf)
    if len(losses) >= 3 and min(losses[-2:]) > lowest + OVERFIT and losses[-1] > losses[-2]:
        where = evaluations[losses.index(lowest)]["step"]
        text = f"the held-out loss rises; its lowest was {lowest:.4f} at step {where:,}: fewer epochs or more rows may help"
        return Verdict("bad", text)
    if published is not None and losses:
        text = f"held-out loss {losses[-1]:.3f}"
        if progress.step < progress.total:
            text += f" so far; published runs ended at {_range(published.loss)}"
            return Verdict("good" if losses[-1] <= losses[0] else "open", text)
        text += f"; published runs ended at {_range(published.loss)}"
        if published.accuracy is not None:
            accuracy = float(evaluations[-1]["eval_rewards/accuracies"])
            text += f", accuracy {accuracy:.3f} ({_range(published.accuracy)})"
        return Verdict("good" if losses[-1] <= published.loss[1] else "bad", text)
    around_100 = mean([metrics for metrics in steps if 100 - RECENT < metrics["step"] <= 100], "loss")
    if published is not None and published.at_100 is not None and around_100 is not None and progress.step >= 100:
        text = f"the loss around step 100 was {around_100:.3f}; published runs had {_range(published.at_100)}"
        return Verdict("good" if around_100 <= published.at_100[1] else "open", text)
    recent = steps[-RECENT:]
    now = mean(recent, "loss")
    too_early = progress.step < min(2 * RECENT, max(1, progress.total // 2)) or len(recent) < 2
    if too_early and known is not None and start is not None:
        return Verdict("good", f"healthy: the first loss is {known[1]} ({start:.4f})")
    first = mean(steps[:FIRST], "loss")
    if too_early or now is None or first is None:
        return Verdict("open", "too early to say")
    if not pairs:
        if now > first + RISEN:
            return Verdict("bad", f"the loss rose from {first:.3f} to {now:.3f}: a lower learning_rate may help")
        if now < first:
            return Verdict("good", f"healthy: the loss fell from {first:.3f} to {now:.3f}")
        return Verdict("open", f"the loss has not fallen yet: {first:.3f} at the start, {now:.3f} now")
    recent, level, above, began = moved(recent), 0.5, 0.0, ""
    if not config.needs_reference:  # the rewards are log-probabilities, which differ from the start
        level, above = (mean(steps[:FIRST], f"rewards/{name}") or 0.0 for name in ("accuracies", "margins"))
        began = f" ({level:.0%} and {above:.3f} at the start)"
    accuracy, margin = mean(recent, "rewards/accuracies") or 0.0, mean(recent, "rewards/margins") or 0.0
    text = f"preference accuracy {accuracy:.0%}, margin {margin:.3f}{began}"
    count = sum(float(metrics.get(f"num_{progress.unit}", 0.0)) for metrics in recent)
    chance = 1 / math.sqrt(max(count, 1.0))  # two standard errors of as many fair coin tosses
    if evaluations:
        held_out = float(evaluations[-1]["eval_rewards/accuracies"])
        text += f"; held-out accuracy {held_out:.0%}"
        if accuracy > level and held_out <= level:
            return Verdict("open", f"the preference does not extend to held-out {progress.unit} yet: {text}")
    if accuracy > level + chance and margin > above:
        return Verdict("good", f"healthy: {text}")
    if accuracy < level - chance or (progress.step > progress.total / 2 and margin <= above):
        return Verdict("bad", f"no preference is learned: {text}")
    return Verdict("open", f"not distinguishable from chance yet: {text}")


def _range(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"
