"""What a stage does before its first step and after its last: check, load, plan; write what people load."""

from __future__ import annotations

import datetime
import logging
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..config.load import Loaded, Method, RunConfig, dump_config
from ..data.chat_template import ChatTemplate, Example, PairExample, resolve_template
from ..data.dataset import TokenizedDataset, prepare
from ..errors import UserError
from ..io.atomic import folder_aside, write_text
from ..io.run_dir import FORMAT, STAGE_FILE, StageDir, check_rendering, checked, stages_of
from ..io.sync import open_mirror
from ..memory.machine import cap_allocator, keep_freed_pages, peak_memory
from ..memory.plan import Plan
from ..model.adapters import AdapterStack, check_targets, resolve_frozen_names
from ..model.base import (
    Base,
    check_weights,
    compute_device,
    compute_dtype,
    fetch_base,
    is_fingerprint_of,
    load_base,
    load_tokenizer,
    read_model_config,
)
from ..model.chain import chain_of_run, check_stack
from ..model.compose import compose
from ..model.decoder import Decoder
from ..model.families import Shape
from ..model.peft_io import CARD, AdapterFile, LoraWeights, adapter_sha256, fetch_adapter, read_adapter, write_adapter
from ..model.tokenizer import check_vocabulary, save_tokenizer
from ..model.weight_streaming import WeightStreamer
from ..ops.dispatch import check_kernels
from .callbacks import trackers
from .distributed import world
from .objective import Outcome
from .optim import check_schedule
from .planning import plan_stage, stage_workload
from .publish import check_repo_name, push_adapter
from .resume import (
    adapters_difference,
    base_difference,
    data_difference,
    data_info,
    judged_on_other_rows,
    machine_now,
    report_changes,
    resumed_info,
    resumed_plan,
    stage_complete,
    started_before,
    versions,
)
from .stage import Stage
from .steps import step_schedule

logger = logging.getLogger(__name__)


def setup_stage(method: Method, loaded: Loaded, *, claim: bool = True) -> Stage:
    """Make a stage ready to train. Cheap checks come first. Every process of a run calls it, the one that writes before the
    others, which then resume what it has written to stage.json.

    Args:
        claim: make the stage's folder and write its configuration; False for a dry run.

    Raises:
        StageComplete: the stage is finished.
        UserError: a user's mistake.
    """
    config, writes = loaded.config, claim and world().writes
    for note in loaded.notes:
        logger.info(note)

    # what is on the disk
    stage = StageDir(Path(config.output_dir) / config.stage)
    before, changes = started_before(stage, config, method)
    if before is not None and changes.complete and not (changes.refused or changes.places):
        if writes:
            if (mirror := open_mirror(config.sync, stage)) is not None:
                mirror.finish()  # the network may have been away at the stage's end
            push_adapter(config, stage, before)
        raise stage_complete(stage, before)

    # settings, adapters below, base
    check_settings(config)
    frozen = adapters_below(method, config, stage)
    folder = fetch_base(config.model_name_or_path, config.model_revision)
    base_config = read_model_config(folder, any_family=config.engine != "fused")
    check_weights(folder, base_config)
    check_base_of(frozen, folder)
    if before is not None:
        changes.settle("base", base_difference(before, folder))
        changes.settle("adapters", adapters_difference(before, frozen))
        changes.refuse(stage)

    # tokenizer, template, rows
    template = template_of(config, folder, frozen, (before or {}).get("template_time"))
    check_vocabulary(template.tokenizer, base_config.vocab_size, Path(template.tokenizer.name_or_path))
    if config.chat_template == "auto":
        check_template_of(frozen, template)
    data = prepare(config.dataset, method, config, template, what="training")
    _report_rows(data, base_config)
    eval_data = prepare(config.eval_dataset, method, config, template, what="held-out") if config.eval_dataset else None
    if eval_data is not None:
        _report_rows(eval_data, base_config)
    told = data_info(data, template)
    machine, libraries = machine_now(compute_dtype(config.dtype, compute_device())), versions()
    forget_best = False
    if before is not None:
        changes.settle("data", data_difference(before, told))
        changes.refuse(stage)
        if changes.complete:
            raise stage_complete(stage, before)
        forget_best = judged_on_other_rows(before, config, stage, eval_data)
        report_changes(changes, before, libraries, machine, config.engine, forget_best)

    # plan
    workload = stage_workload(method, config, base_config, folder, frozen, data, eval_data)
    plan = resumed_plan(stage, before, config, machine, base_config.num_hidden_layers) if before else None
    plan = plan or plan_stage(workload, config)
    torch.set_num_threads(plan.threads)

    # base, adapters
    if writes:
        stage.claim()
    base, stack, decoder = _load(config, plan, frozen)
    per_epoch, total = step_schedule(config, len(data.rows))
    parameters = sum(p.numel() for p in stack.parameters().values())
    trained = f"; {parameters:,} parameters are trained" if parameters else ""
    logger.info(f"{len(data.rows):,} rows, {per_epoch:,} steps an epoch, {total:,} in all{trained}")

    # stage.json
    links = [{"path": _relative_to_run(a.path, stage.run), "sha256": a.sha256} for a in frozen]
    if before is None:
        info = _new_info(method, stage, config, base, template) | {"adapters": links, "data": told}
        info |= {"versions": libraries, "machine": machine, "created": _now()}
    else:
        resumed = {"at": _now(), "machine": machine, "versions": libraries, "changed": changes.allowed}
        info = {"id": _run_id(stage.run), **resumed_info(before, stage, base.describe(), links, resumed)}
    info["plan"] = plan.as_dict()
    info["eval_data"] = {"fingerprint": eval_data.fingerprint} if eval_data is not None else None
    if writes:
        stage.write_info(info)  # first: config.yaml tells a resumed run that ``memory`` was changed
        write_text(stage.config, dump_config(config))
    return Stage(
        method=method,
        config=config,
        dir=stage,
        base=base,
        template=template,
        stack=stack,
        decoder=decoder,
        data=data,
        eval_data=eval_data,
        workload=workload,
        plan=plan,
        frozen=frozen,
        info=info,
        mirror=open_mirror(config.sync, stage) if writes else None,
        forget_best=forget_best,
        writes=writes,
    )


def _new_info(method: Method, stage: StageDir, config: RunConfig, base: Base, template: ChatTemplate) -> dict[str, Any]:
    """What stage.json says of a new stage, but for its rows, adapters, machine and plan."""
    return {
        "format": FORMAT,
        "id": _run_id(stage.run),
        "method": method,
        "stage": config.stage,
        "status": "running",
        "engine": config.engine,
        "base": base.describe(),
        "chat_template": template.text,
        **({"template_time": template.now.isoformat()} if template.reads_clock else {}),
    }


def check_settings(config: RunConfig) -> None:
    """Check settings before anything is loaded.

    Raises:
        UserError: no such projection, schedule, tracker or repository name.
    """
    if config.engine == "fused":
        check_targets(config.lora_target_modules)
    check_schedule(config)
    trackers(config)
    check_repo_name(config)


def _load(config: RunConfig, plan: Plan, frozen: list[AdapterFile]) -> tuple[Base, AdapterStack, Decoder]:
    """The base with its adapters, and the decoder that runs them under the plan."""
    logger.info(f"loading {config.model_name_or_path}" + (" in NF4" if config.load_in_4bit else ""))
    cap_allocator(compute_device(), config.memory)
    if config.engine == "unsloth":
        from ..engines.unsloth import load_unsloth

        base = load_unsloth(config)
    else:
        base = load_base(config, stream=plan.stream)
    if config.engine == "fused":
        for note in check_kernels(base.device, base.dtype, Shape.of(base.model.config).widths):
            logger.info(note)
    stream = WeightStreamer(base.model, base.device) if base.streamed else None
    stack = AdapterStack(base.model, base.device)
    if config.engine == "fused":  # the other engines attach theirs, to any architecture
        for name, adapter in zip(resolve_frozen_names([a.path for a in frozen]), frozen):
            stack.add_frozen(name, adapter)
        stack.add_trainable(
            config.stage, r=config.lora_r, alpha=config.lora_alpha, targets=config.lora_target_modules, seed=config.seed
        )
    if base.device.type == "cpu":
        keep_freed_pages()
    decoder = Decoder(stack, base.dtype, scratch=plan.scratch, stream=stream)
    decoder.follow(plan)
    return base, stack, decoder


def adapters_below(method: Method, config: RunConfig, stage: StageDir) -> list[AdapterFile]:
    """The adapters below this stage, read and verified: those of the key ``adapters``, or dpo's stage sft."""
    if config.adapters == "none":
        return []
    if config.adapters:
        adapters = [read_adapter(fetch_adapter(name, beside=[CARD])) for name in config.adapters]
        for note in check_stack(adapters, config.model_name_or_path):
            logger.info(note)
        return adapters
    if method == "sft":
        return []
    info = StageDir(stage.run / "sft").info()
    if info is None or info.get("status") != "complete":
        state = "has no stage sft" if info is None else "has a stage sft that is not finished"
        raise UserError(
            f"{stage.run}: {state}, so there is nothing for dpo to start from.",
            "Run `zephyr-lite sft` first, name an SFT adapter (adapters=[FOLDER]), or set adapters=none to train on the "
            "base itself.",
        )
    adapters = chain_of_run(stage.run, stage="sft").adapters
    logger.info(f"the reference is the base with {', '.join(str(a.path) for a in adapters)}")
    return adapters


def _stage_of(adapter: AdapterFile) -> tuple[StageDir, dict[str, Any] | None]:
    """The stage that wrote an adapter, and its stage.json; None for an adapter of another tool."""
    stage = StageDir(adapter.path.parent)
    return stage, stage.info() if adapter.path.name in ("adapter", "delta") else None


def check_base_of(frozen: list[AdapterFile], folder: Path) -> None:
    """Raises:
    UserError: a stage's adapter was trained on another base.
    """
    for adapter in frozen:
        stage, info = _stage_of(adapter)
        if info is None:
            continue
        checked(info, stage.path / STAGE_FILE, needs=("base.fingerprint", "base.name_or_path"))
        if not is_fingerprint_of(info["base"]["fingerprint"], folder):
            raise UserError(
                f"adapter {adapter.path}: was trained on {info['base']['name_or_path']}, and {folder} is another model "
                "(other weights, or another architecture).",
                "Give the folder of the model that it was trained on: model_name_or_path=FOLDER.",
            )


def check_template_of(frozen: list[AdapterFile], template: ChatTemplate) -> None:
    """Raises:
    UserError: the stage below was trained with another template or tokenizer.
    """
    if frozen:
        stage, info = _stage_of(frozen[-1])
        if info is not None:
            check_rendering(info, stage.path, template.text, template.tokenizer)


def template_of(config: RunConfig, folder: Path, frozen: list[AdapterFile], time: str | None = None) -> ChatTemplate:
    """The chat template of a run. ``auto`` is that of the adapter below if it was saved with one, else the base's.

    Args:
        time: when the stage began, for a template that writes the date; None: now.
    """
    now = datetime.datetime.fromisoformat(time) if time else None
    if config.chat_template == "auto":
        for adapter in reversed(frozen):
            # a stage keeps its tokenizer in adapter/, beside delta/
            for candidate in (adapter.path, adapter.path.parent / "adapter"):
                if (candidate / "tokenizer_config.json").is_file():
                    return resolve_template("auto", load_tokenizer(candidate), now)
    return resolve_template(config.chat_template, load_tokenizer(folder), now)


def save_stage(stage: Stage, outcome: Outcome, *, own: dict[str, LoraWeights] | None = None) -> None:
    """Write what people load: the stage's own adapter, the whole chain as one, the tokenizer; then mark it complete.

    Args:
        own: the trained adapter's weights, where another engine holds them; None: the stack's.
    """
    own = stage.stack.weights(stage.config.stage) if own is None else own
    shared = {"base_model_name": stage.config.model_name_or_path}
    extra = {"revision": stage.config.model_revision}
    if stage.frozen:
        write_adapter(stage.dir.delta, own, **shared, extra_config=extra)
        chain = compose([*stage.frozen, read_adapter(stage.dir.delta)])
    else:
        chain = own
    with folder_aside(stage.dir.adapter) as folder:
        write_adapter(folder, chain, **shared, extra_config=extra)
        save_tokenizer(stage.template.tokenizer, folder)
    stage.info.update(
        status="complete",
        own={"path": stage.dir.own.name, "sha256": adapter_sha256(stage.dir.own)},
        adapter_sha256=adapter_sha256(stage.dir.adapter),
        result={
            "steps": outcome.step,
            "metrics": outcome.metrics,
            "evaluations": outcome.evaluations,
            "best": outcome.best,
            "seconds": round(outcome.seconds, 2),
            "steps_left_out": outcome.skipped,
            "warnings": outcome.warnings,
            "peak_memory_bytes": peak_memory(stage.base.device),
        },
        finished=_now(),
    )
    stage.dir.write_info(stage.info)
    logger.info(f"{stage.dir.adapter} holds the adapter" + (" (the whole chain in one)" if stage.frozen else ""))
    push_adapter(stage.config, stage.dir, stage.info)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _run_id(run: Path) -> str:
    """The id that a run's stages share."""
    for stage in stages_of(run):
        with suppress(UserError):  # a broken stage.json of another stage
            found = (stage.info() or {}).get("id")
            if isinstance(found, str) and found:
                return found
    return uuid.uuid4().hex


def _relative_to_run(path: Path, run: Path) -> str:
    path, run = path.resolve(), run.resolve()
    return str(path.relative_to(run)) if path.is_relative_to(run) else str(path)


def _report_rows(data: TokenizedDataset, base_config: Any) -> None:
    for line in data.report.lines():
        (logger.warning if line.startswith("left out") else logger.info)(line)
    context = getattr(base_config, "max_position_embeddings", None)
    if context is None:
        return
    long = (data.lengths > context).nonzero()[0].tolist()  # of a pair: of both responses
    if longer := [data.examples[i].where for i in long if _positions(data.examples[i]) > context]:
        logger.warning(
            f"warning: {len(longer):,} rows are longer than the {context:,} tokens that the base was made for "
            f"(max_position_embeddings), {longer[0]} first. Lower max_length to cut them."
        )


def _positions(row: Example | PairExample) -> int:
    if isinstance(row, Example):
        return len(row.ids)
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
