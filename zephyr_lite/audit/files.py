"""Checks of an adapter's files, without a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import UserError
from ..io.text import shown
from ..model.chain import chain_of_run
from ..model.compose import compose
from ..model.overlap import inner, overlap, same_name
from ..model.peft_io import CARD, AdapterFile, LoraWeights
from .evidence import Evidence
from .verdict import Audit, Level

LN2 = math.log(2)
# distance of DPO's first logged loss from ln 2: noise of bfloat16, and the change in a few steps of warm-up
FIRST_STEP, FIRST_STEPS = 0.02, 0.1


def check_weights(evidence: Evidence, audit: Audit) -> None:
    """Rank, scale, and whether the adapter was trained."""
    modules = [evidence.adapter.modules[name] for name in evidence.adapter.modules]
    untrained = sum(not bool(weights.b.any()) for weights in modules)
    ranks = _few({weights.rank for weights in modules})
    scales = _few({round(weights.scale, 6) for weights in modules})
    facts = f"{len(modules)} modules, rank {ranks}, scale {scales}, sha256 {evidence.adapter.sha256[:12]}"
    if untrained == len(modules):
        text = "every B is zero: the adapter was never trained and changes nothing"
        audit.wrong("weights", text, facts, advice="Take another checkpoint of it.")
    elif untrained:
        audit.note("weights", f"{untrained} of its modules have a B of zeros and change nothing", facts)
    else:
        audit.right("weights", "a plain LoRA, every module of it trained", facts)


def check_below(evidence: Evidence, below: Sequence[AdapterFile], audit: Audit) -> None:
    """Which adapters have to be below it, as far as files tell."""
    if evidence.stage is not None:
        _check_chain(evidence, below, audit)
        return
    base, tuned = evidence.base, evidence.tuned_from
    if tuned and base and not same_name(tuned, base):
        facts = f"{CARD}: fine-tuned from {shown(tuned)}; adapter_config.json: base {shown(base)}"
        if any(same_name(tuned, str(adapter.path)) for adapter in below):
            audit.right("below", f"{shown(tuned)} is below it, as its card says", facts)
        else:
            text = (
                f"its card says that it was trained from {shown(tuned)}, which is not its base: on the bare base it is "
            )
            advice = f"Put that below it: --below {shown(tuned)}; and wherever it is loaded."
            audit.doubtful("below", text + "probably another, worse model", facts, advice=advice)
    for adapter in below:
        found = overlap(evidence.adapter, adapter)
        if found.contains:
            audit.wrong(
                "below",
                f"it was continued from {adapter.path} and contains it already; below it, that adapter would count twice",
                found.evidence,
                advice=f"Give it as --start {adapter.path} instead of --below.",
            )
        else:
            seed = ", though both were drawn with the same seed" if found.same_draw else ""
            audit.right("below", f"it does not contain {adapter.path}{seed}: both can be on", found.evidence)


def check_start(evidence: Evidence, start: AdapterFile, audit: Audit) -> None:
    """Whether it was continued from another adapter, as is claimed."""
    if evidence.holds(start):
        if evidence.is_delta:
            text = f"a delta does not contain {start.path}, which was below it in training"
            audit.wrong("below", text, advice=f"Give it as --below {start.path}.")
        else:
            audit.right("below", f"it contains {start.path}, as its stage.json says")
        return
    advice = "If that one was below it in training, give it as --below."
    found = overlap(evidence.adapter, start)
    if found.same_draw is None:
        text = f"it was not continued from {start.path}: other modules, or another rank"
        audit.wrong("below", text, advice=advice)
    elif found.contains:
        audit.right("below", f"it was continued from {start.path}, and contains it", found.evidence)
    else:
        why = "it was drawn with the same seed" if found.same_draw else "it has another initialization"
        audit.wrong("below", f"it was not continued from {start.path}: {why}", found.evidence, advice=advice)


def check_log(evidence: Evidence, audit: Audit) -> None:
    """Whether the logged loss of DPO starts at ln 2, as it does if the policy starts from the reference."""
    if evidence.method != "dpo" or evidence.settings.get("loss_type", "sigmoid") != "sigmoid":
        return
    first = next((record for record in evidence.log if _is_number(record.get("loss"))), None)
    if first is None:
        audit.note("reference", "its folder has no training log, so its first loss is unknown")
        return
    loss, step = float(first["loss"]), first.get("step", first.get("current_steps"))
    at_first = step is not None and _is_number(step) and step <= 1
    allowed = FIRST_STEP if at_first else FIRST_STEPS
    at = f"step {step:g}" if _is_number(step) else "the first record"
    facts = [f"loss at {at} of its log: {loss:.4f}; ln 2 = {LN2:.4f}"]
    for key, form in (("rewards/margins", ".4g"), ("rewards/accuracies", ".3f")):
        if _is_number(first.get(key)):
            facts.append(f"{key} {first[key]:{form}} there")
    if abs(loss - LN2) <= allowed:
        audit.right("reference", "its log starts at ln 2: its reference is what it started from", *facts)
    else:
        audit.add(
            Level.wrong if at_first else Level.doubtful,
            "reference",
            "its log does not start at ln 2: the reference was not what the policy started from (often the bare base, with "
            "the SFT adapter only in the policy)",
            *facts,
            advice="Train it again against the right reference; --pairs FILE with --reference measures which it was.",
        )


def _check_chain(evidence: Evidence, below: Sequence[AdapterFile], audit: Audit) -> None:
    """Whether the adapter of a stage is the chain that its stage.json names."""
    assert evidence.stage is not None
    stage, names = evidence.stage, [str(link.get("path")) for link in evidence.links]
    where = f"{stage.path}/stage.json: adapters {names or 'none'}"
    if evidence.is_delta:
        text = f"a delta: right only with {' + '.join(names) or 'nothing'} below it"
        audit.note("below", text, where, advice=f"Load {stage.adapter} instead, which is the whole chain.")
        return
    for adapter in below:
        if evidence.holds(adapter):
            text = f"it contains {adapter.path} already; below it, that adapter would count twice"
            audit.wrong("below", text, advice="Leave --below out.")
    try:
        chain = chain_of_run(stage.run, stage=stage.path.name)
    except UserError as error:
        text = f"the chain that it was made of is not complete any more: {error.message}"
        audit.doubtful("below", text, where, advice=error.hint)
        return
    distance = product_distance(evidence.adapter.modules, compose(chain.adapters))
    facts = f"‖adapter − composed chain‖ / ‖composed chain‖ = {distance:.1e}"
    if distance < 1e-5:
        parts = f"{' + '.join(names)} and its own part in one adapter" if names else "one adapter"
        audit.right("below", f"{parts}: it belongs on the bare base", where, facts)
    else:
        audit.wrong(
            "below",
            "it is not the chain that its stage.json names",
            where,
            facts,
            advice="Restore the stage, or make the adapter again: zephyr-lite merge --adapter-only.",
        )


def product_distance(one: Mapping[str, LoraWeights], other: Mapping[str, LoraWeights]) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW'‖ over all modules of two adapters, through r × r inner products."""
    apart = total = 0.0
    for name in {*one, *other}:
        x, y = one.get(name), other.get(name)
        if x is not None and y is not None and x.a.shape == y.a.shape and torch.equal(x.a, y.a):
            # with the same A the difference of B is exact
            d = LoraWeights(x.a, (x.b.double() * x.scale - y.b.double() * y.scale), 1.0)
            apart += inner(d, d)
        else:
            apart += max(0.0, inner(x, x) - 2 * inner(x, y) + inner(y, y))
        total += inner(y, y)
    return math.sqrt(apart / total) if total else math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _few(values: set[Any]) -> str:
    listed = sorted(values)
    return ", ".join(f"{value:g}" for value in listed[:4]) + (" …" if len(listed) > 4 else "")
