"""Whether a run goes as it should: by the published runs where it is their recipe, else by what holds of any run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .progress import FIRST, RECENT, Progress
from .reference_ranges import Published, Range

LN2 = math.log(2)
# Below so many steps a trend is noise.
EARLY = 2 * RECENT
# So much above its start (a mean of RECENT steps against one of FIRST) a loss has risen, and not merely wavered; in nats.
RISEN = 0.05
# A held-out loss so much above the lowest, at two evaluations in a row, rises.
OVERFIT = 0.005


@dataclass(frozen=True)
class Verdict:
    """What is thought of a run: ``good``, ``bad``, or ``open`` where nothing can be said yet."""

    kind: Literal["good", "bad", "open"]
    text: str


def judge(progress: Progress, published: Published | None) -> Verdict:
    """What the numbers so far say. Never more than they do: a run that is not the published recipe is not compared."""
    loss = progress.last.get("loss")
    if isinstance(loss, str) or (loss is not None and not math.isfinite(loss)):
        return Verdict("bad", "the last loss is not a finite number")
    pairs = progress.unit == "pairs"
    if pairs and (found := _start(progress)) is not None:
        return found
    if (found := _held_out(progress)) is not None:
        return found
    if published is not None and (found := _compared(progress, published)) is not None:
        return found
    if progress.step < min(EARLY, max(1, progress.total // 2)) or len(progress.recent) < 2:
        if pairs and progress.start is not None and _starts_at_ln2(progress):
            return Verdict("good", f"as it should: it started at ln 2 ({progress.start:.4f})")
        return Verdict("open", "too early to say")
    return _preferences(progress) if pairs else _loss(progress)


def _starts_at_ln2(progress: Progress) -> bool:
    return progress.stage.config.loss_type in ("sigmoid", "robust")


def _start(progress: Progress) -> Verdict | None:
    """DPO's first loss is ln 2, for then policy and reference are one function."""
    start = progress.start
    if start is None or not _starts_at_ln2(progress) or abs(start - LN2) < 5e-3:
        return None
    return Verdict("bad", f"the first loss was {start:.4f} and not ln 2 = 0.6931: the reference is not the policy")


def _held_out(progress: Progress) -> Verdict | None:
    losses = [float(e["eval_loss"]) for e in progress.evaluations]
    if losses and not math.isfinite(losses[-1]):
        return Verdict("bad", "the last held-out loss is not a finite number")
    losses = [loss if math.isfinite(loss) else math.inf for loss in losses]
    if len(losses) < 3:
        return None
    lowest = min(losses)
    if min(losses[-2:]) > lowest + OVERFIT and losses[-1] > losses[-2]:
        where = progress.evaluations[losses.index(lowest)]["step"]
        return Verdict("bad", f"the held-out loss rises; its lowest was {lowest:.4f} at step {where:,}")
    return None


def _compared(progress: Progress, published: Published) -> Verdict | None:
    last = progress.evaluations[-1] if progress.evaluations else {}
    if progress.step >= progress.total and last:
        found = float(last["eval_loss"])
        said = f"held-out loss {found:.3f}; published runs ended at {_range(published.loss, 3)}"
        if published.accuracy is not None and "eval_rewards/accuracies" in last:
            accuracy = float(last["eval_rewards/accuracies"])
            said += f", accuracy {accuracy:.3f} ({_range(published.accuracy, 3)})"
        return Verdict("good" if found <= published.loss[1] else "bad", said)
    if progress.at_100 is not None and published.at_100 is not None and not last:
        said = f"about step 100 the loss was {progress.at_100:.3f}; published runs had {_range(published.at_100, 3)}"
        return Verdict("good" if progress.at_100 <= published.at_100[1] else "open", said)
    if last:
        fell = float(last["eval_loss"]) <= float(progress.evaluations[0]["eval_loss"])
        goal = f"published runs end at a held-out loss of {_range(published.loss, 3)}"
        return Verdict("good" if fell else "open", f"now {float(last['eval_loss']):.3f}; {goal}")
    return None


def _loss(progress: Progress) -> Verdict:
    now = progress.mean("loss")
    if now is None or len(progress.first) < min(FIRST, 2):
        return Verdict("open", "too early to say")
    start = sum(progress.first) / len(progress.first)
    if now > start + RISEN:
        return Verdict("bad", f"the loss rose from {start:.3f} to {now:.3f}: a lower learning_rate may help")
    if now < start:
        return Verdict("good", f"as it should: the loss fell from {start:.3f} to {now:.3f}")
    return Verdict("open", f"the loss has not fallen yet: {start:.3f} at first, {now:.3f} now")


def _preferences(progress: Progress) -> Verdict:
    accuracy, margin = progress.mean("rewards/accuracies"), progress.mean("rewards/margins")
    if accuracy is None or margin is None:
        return Verdict("open", "too early to say")
    said = f"the better answer is likelier in {accuracy:.0%} of pairs, margin {margin:.3f}"
    pairs = sum(float(m.get("num_pairs", 0.0)) for m in progress.recent)
    chance = 1 / math.sqrt(max(pairs, 1.0))  # two standard errors of a coin thrown so often
    if accuracy > 0.5 + chance and margin > 0:
        return Verdict("good", f"as it should: {said}")
    if accuracy < 0.5 - chance or (progress.step > progress.total / 2 and margin <= 0):
        return Verdict("bad", f"no preference is learned: {said}")
    return Verdict("open", f"not yet told from chance: {said}")


def _range(bounds: Range, digits: int) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"
