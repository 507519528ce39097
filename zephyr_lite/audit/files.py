"""What an adapter's files say by themselves: no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from ..io.text import shown
from ..model.chain import chain_of_run
from ..model.compose import compose
from ..model.overlap import (
    CARD,
    HELD,
    SAME_ORIGIN,
    held,
    held_share,
    holds,
    inner,
    origin_distance,
    same_name,
)
from ..model.peft_io import AdapterFile, LoraWeights
from .evidence import Evidence
from .verdict import Audit, Level

LN2 = math.log(2)
# of DPO's first logged loss from ln 2: bfloat16's noise, and what a few steps of warm-up change
FIRST_STEP, FIRST_STEPS = 0.02, 0.1


def check_weights(evidence: Evidence, audit: Audit) -> None:
    """Rank, scale, and whether it was trained at all."""
    modules = evidence.adapter.modules
    ranks, scales, untrained = set(), set(), 0
    for name in modules:
        weights = modules[name]
        ranks.add(weights.rank)
        scales.add(round(weights.scale, 6))
        untrained += not bool(weights.b.any())
    told = f"{len(modules)} modules, rank {_few(ranks)}, scale {_few(scales)}, sha256 {evidence.adapter.sha256[:12]}"
    if untrained == len(modules):
        audit.add(
            "weights",
            Level.wrong,
            "every B is zero: the adapter was never trained and changes nothing",
            told,
            advice="Take another checkpoint of it.",
        )
    elif untrained:
        audit.add("weights", Level.note, f"{untrained} of its modules have a B of zeros, and change nothing", told)
    else:
        audit.add("weights", Level.right, "a plain LoRA, every module of it trained", told)


def check_chain(evidence: Evidence, below: Sequence[AdapterFile], audit: Audit) -> None:
    """Which adapters have to lie below it, as far as files tell."""
    if evidence.stage is not None:
        _our_chain(evidence, below, audit)
        return
    base, tuned = evidence.base, evidence.tuned_from
    if tuned and base and not same_name(tuned, base):
        told = f"{CARD}: fine-tuned from {shown(tuned)}; adapter_config.json: base {shown(base)}"
        if any(same_name(tuned, str(adapter.path)) for adapter in below):
            audit.add("below", Level.right, f"{shown(tuned)} lies below it, as its card says", told)
        else:
            audit.add(
                "below",
                Level.doubtful,
                f"its card says that it was trained from {shown(tuned)}, which is not its base: on the bare base it is "
                "probably another, worse model",
                told,
                advice=f"Put that below it: --below {shown(tuned)}; and everywhere it is loaded.",
            )
    for adapter in below:
        twice, told = holds(evidence.adapter, adapter)
        distance = origin_distance(evidence.adapter, adapter)
        if twice:
            audit.add(
                "below",
                Level.wrong,
                f"it was trained on from {adapter.path}, so it holds that adapter already, which would count twice "
                "below it",
                told,
                advice=f"Give it as --start {adapter.path} instead of --below.",
            )
        else:
            seed = (
                ", though both were drawn with the same seed" if distance is not None and distance < SAME_ORIGIN else ""
            )
            audit.add("below", Level.right, f"it does not hold {adapter.path}{seed}: both can be on", told)


def check_start(evidence: Evidence, start: AdapterFile, audit: Audit) -> None:
    """Whether it was continued from another adapter, as is claimed."""
    if evidence.stage is not None and _in_chain(evidence, start):
        if evidence.is_delta():
            audit.add(
                "below",
                Level.wrong,
                f"a delta does not hold {start.path}, which lay below it in training",
                advice=f"Give it as --below {start.path}.",
            )
        else:
            audit.add("below", Level.right, f"it holds {start.path}, as its stage.json says")
        return
    distance = origin_distance(evidence.adapter, start)
    if distance is None:
        audit.add(
            "below",
            Level.wrong,
            f"it was not continued from {start.path}: other modules, or another rank",
            advice="If that one lay below it in training, give it as --below.",
        )
        return
    share = held_share(evidence.adapter, start)
    told = f"‖A − A'‖ / ‖A'‖ = {distance:.3f} (independent draws: 1.41); {held(share)}"
    if distance < SAME_ORIGIN and share >= HELD:
        audit.add("below", Level.right, f"it was continued from {start.path}, and holds it", told)
    else:
        why = "it was drawn anew with the same seed" if distance < SAME_ORIGIN else "its first values were others"
        audit.add(
            "below",
            Level.wrong,
            f"it was not continued from {start.path}: {why}",
            told,
            advice="If that one lay below it in training, give it as --below.",
        )


def check_log(evidence: Evidence, audit: Audit) -> None:
    """DPO starts at ln 2, for then policy and reference are one; what the log shows of it."""
    if evidence.method != "dpo":
        return
    first = next((r for r in evidence.log if _number(r.get("loss")) is not None), None)
    if first is None:
        audit.add("reference", Level.note, "its folder has no log of its training, so its first loss is unknown")
        return
    loss, step = float(first["loss"]), _number(first.get("step", first.get("current_steps")))
    if evidence.settings.get("loss_type", "sigmoid") != "sigmoid":
        return  # the others begin elsewhere
    allowed = FIRST_STEP if step is not None and step <= 1 else FIRST_STEPS
    at = f"step {step:g}" if step is not None else "the first record"
    told = f"loss at {at} of its log: {loss:.4f}; ln 2 = {LN2:.4f}"
    accuracy, margin = _number(first.get("rewards/accuracies")), _number(first.get("rewards/margins"))
    more = [] if margin is None else [f"rewards/margins {margin:.4g} there"]
    more += [] if accuracy is None else [f"rewards/accuracies {accuracy:.3f} there"]
    if abs(loss - LN2) <= allowed:
        audit.add(
            "reference", Level.right, "its log begins at ln 2: it was trained against what it started from", told, *more
        )
    else:
        audit.add(
            "reference",
            Level.wrong if allowed == FIRST_STEP else Level.doubtful,
            "its log does not begin at ln 2: the reference was not what the policy started from "
            "(often the bare base, with the SFT adapter in the policy alone)",
            told,
            *more,
            advice="Train it again against the right reference; --pairs FILE with --reference measures which it was.",
        )


def _in_chain(evidence: Evidence, adapter: AdapterFile) -> bool:
    return any(link.get("sha256") == adapter.sha256 for link in evidence.links())


def _our_chain(evidence: Evidence, below: Sequence[AdapterFile], audit: Audit) -> None:
    assert evidence.stage is not None
    for adapter in below:
        if not evidence.is_delta() and _in_chain(evidence, adapter):
            audit.add(
                "below",
                Level.wrong,
                f"it holds {adapter.path} already, which would count twice below it",
                advice="Leave --below out.",
            )
    stage, links = evidence.stage, evidence.links()
    names = [str(link.get("path")) for link in links]
    where = f"{stage.path}/stage.json: adapters {names or 'none'}"
    if evidence.is_delta():
        audit.add(
            "below",
            Level.note,
            f"a delta: right only with {' + '.join(names) or 'nothing'} below it",
            where,
            advice=f"Load {stage.adapter} instead, which holds the whole chain.",
        )
        return
    try:
        chain = chain_of_run(stage.run, stage=stage.path.name)
    except UserError as error:
        audit.add(
            "below",
            Level.doubtful,
            f"the chain that it was made of is not whole any more: {error.message}",
            where,
            advice=error.hint or "",
        )
        return
    distance = product_distance(evidence.adapter.modules, compose(chain.adapters))
    told = f"‖adapter − composed chain‖ / ‖composed chain‖ = {distance:.1e}"
    if distance < 1e-5:
        held = f"{' + '.join(names)} and its own part in one adapter" if names else "one adapter"
        audit.add("below", Level.right, f"{held}: it belongs on the bare base", where, told)
    else:
        audit.add(
            "below",
            Level.wrong,
            "it is not the chain that stage.json tells of",
            where,
            told,
            advice="Restore the stage, or make the adapter again: zephyr-lite merge --adapter-only.",
        )


def product_distance(one: Any, other: Any) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖ over all modules of two adapters, without forming a ΔW: through the r × r inner products."""
    apart = total = 0.0
    for name in {*one, *other}:
        x, y = (m.get(name) for m in (one, other))
        xx, yy = inner(x, x), inner(y, y)
        if x is not None and y is not None and x.a.shape == y.a.shape and torch.equal(x.a, y.a):
            # the same A: the difference is in B alone, where it can be taken before anything is squared
            d = LoraWeights(x.a, (x.b.double() * x.scale - y.b.double() * y.scale), 1.0)
            apart += inner(d, d)
        else:
            apart += max(0.0, xx - 2 * inner(x, y) + yy)
        total += yy
    return math.sqrt(apart / total) if total else math.inf


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _few(values: set[Any]) -> str:
    listed = sorted(values)
    return ", ".join(f"{value:g}" for value in listed[:4]) + (" …" if len(listed) > 4 else "")
