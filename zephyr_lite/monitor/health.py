"""Health check of a run: against the published runs if it is their recipe, otherwise by the trend of its own metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .progress import RECENT, Progress
from .reference_ranges import Published, Range

LN2 = math.log(2)
EARLY = 2 * RECENT  # steps below which a trend is noise
RISEN = 0.05  # nats by which a loss has risen, and not fluctuated
OVERFIT = 0.005  # nats above the lowest held-out loss, at two evaluations in a row


@dataclass(frozen=True)
class Verdict:
    """``good``, ``bad``, or ``open`` if it is too early to tell, with a reason."""

    kind: Literal["good", "bad", "open"]
    text: str


TOO_EARLY = Verdict("open", "too early to say")


def judge(progress: Progress, published: Published | None) -> Verdict:
    """The verdict on the metrics so far.

    Args:
        published: ranges of the published runs; None if this is another recipe.
    """
    loss = progress.last.get("loss")
    if isinstance(loss, str) or (loss is not None and not math.isfinite(loss)):
        return Verdict("bad", "the last loss is not a finite number")
    pairs = progress.unit == "pairs"
    # policy and reference are the same function before the first step
    starts_at_ln2 = pairs and progress.stage.config.loss_type in ("sigmoid", "robust") and progress.start is not None
    if starts_at_ln2 and abs(progress.start - LN2) >= 5e-3:  # type: ignore[operator]
        return Verdict(
            "bad", f"the first loss was {progress.start:.4f} instead of ln 2 = 0.6931: the reference is not the policy"
        )
    if (found := _held_out(progress)) is not None:
        return found
    if published is not None and (found := _compared(progress, published)) is not None:
        return found
    if progress.step < min(EARLY, max(1, progress.total // 2)) or len(progress.recent) < 2:
        if starts_at_ln2:
            return Verdict("good", f"healthy: the first loss is ln 2 ({progress.start:.4f})")
        return TOO_EARLY
    return _preferences(progress) if pairs else _loss(progress)


def _held_out(progress: Progress) -> Verdict | None:
    losses = [float(e["eval_loss"]) for e in progress.evaluations]
    if losses and not math.isfinite(losses[-1]):
        return Verdict("bad", "the last held-out loss is not a finite number")
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if len(losses) >= 3 and min(losses[-2:]) > min(losses) + OVERFIT and losses[-1] > losses[-2]:
        where = progress.evaluations[losses.index(min(losses))]["step"]
        return Verdict("bad", f"the held-out loss rises; its lowest was {min(losses):.4f} at step {where:,}")
    return None


def _compared(progress: Progress, published: Published) -> Verdict | None:
    if not progress.evaluations:
        if progress.at_100 is None or published.at_100 is None:
            return None
        said = f"the loss around step 100 was {progress.at_100:.3f}; published runs had {_range(published.at_100)}"
        return Verdict("good" if progress.at_100 <= published.at_100[1] else "open", said)
    last = progress.evaluations[-1]
    loss = float(last["eval_loss"])
    if progress.step < progress.total:
        fell = loss <= float(progress.evaluations[0]["eval_loss"])
        said = f"held-out loss {loss:.3f} so far; published runs ended at {_range(published.loss)}"
        return Verdict("good" if fell else "open", said)
    said = f"held-out loss {loss:.3f}; published runs ended at {_range(published.loss)}"
    if published.accuracy is not None and "eval_rewards/accuracies" in last:
        said += f", accuracy {float(last['eval_rewards/accuracies']):.3f} ({_range(published.accuracy)})"
    return Verdict("good" if loss <= published.loss[1] else "bad", said)


def _loss(progress: Progress) -> Verdict:
    now = progress.mean("loss")
    if now is None or len(progress.first) < 2:
        return TOO_EARLY
    start = sum(progress.first) / len(progress.first)
    if now > start + RISEN:
        return Verdict("bad", f"the loss rose from {start:.3f} to {now:.3f}: a lower learning_rate may help")
    if now < start:
        return Verdict("good", f"healthy: the loss fell from {start:.3f} to {now:.3f}")
    return Verdict("open", f"the loss has not fallen yet: {start:.3f} at the start, {now:.3f} now")


def _preferences(progress: Progress) -> Verdict:
    accuracy, margin = progress.mean("rewards/accuracies"), progress.mean("rewards/margins")
    if accuracy is None or margin is None:
        return TOO_EARLY
    said = f"preference accuracy {accuracy:.0%}, margin {margin:.3f}"
    pairs = sum(float(m.get("num_pairs", 0.0)) for m in progress.recent)
    chance = 1 / math.sqrt(max(pairs, 1.0))  # two standard errors of as many fair coin tosses
    if accuracy > 0.5 + chance and margin > 0:
        return Verdict("good", f"healthy: {said}")
    if accuracy < 0.5 - chance or (progress.step > progress.total / 2 and margin <= 0):
        return Verdict("bad", f"no preference is learned: {said}")
    return Verdict("open", f"not distinguishable from chance yet: {said}")


def _range(bounds: Range) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}"
