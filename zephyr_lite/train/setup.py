"""What a stage does before its first step: check, load, plan."""

from __future__ import annotations

import logging
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.load import Loaded, Method, RunConfig, dump_config
from ..data.batch import collate_conversations
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset, general_text
from ..data.templates import NO_THINKING
from ..errors import UserError
from ..io.atomic import write_text
from ..io.logging import RESULT
from ..io.run_dir import (
    FORMAT,
    StageDir,
    check_rendering,
    stages_of,
    text_sha256,
    tokenizer_sha256,
)
from ..io.text import counted
from ..memory.forecast import forecast_lines, needs_lines
from ..memory.machine import cap_allocator, keep_freed_pages, this_machine
from ..memory.plan import Plan, check_int8, plan_run
from ..memory.workload import make_workload
from ..model.adapters import AdapterStack, check_shapes, check_targets, resolve_frozen_names
from ..model.base import Base, compute_device, compute_dtype, fetch_base, load_base
from ..model.base_folder import check_fingerprint, check_length, check_weights, empty_model, read_model_config
from ..model.decoder import Decoder
from ..model.families import Shape
from ..model.peft_io import AdapterFile
from ..model.tokenizer import check_vocabulary
from ..ops.dispatch import check_kernels
from .below import adapters_below, check_paths, stage_of, template_of
from .distributed import world
from .optim import make_scheduler
from .resume import compare_config, compare_files, kept_plan, machine_now, other_rows_held_out, utc_now, versions
from .small_data import prepare_parts, row_sizes, settle
from .stage import Stage
from .steps import step_schedule

logger = logging.getLogger(__name__)
# a run of fewer is warned of
FEW_STEPS = 30
# int8 is calibrated on one passage of so many
CALIBRATION_EVERY = 8


def setup_stage(method: Method, loaded: Loaded, *, claim: bool = True) -> Stage:
    """Make a stage ready to train. Cheap checks come first. Every process of a run calls it, rank 0 before the others, which
    then resume what it has written to stage.json.

    Args:
        claim: make the stage's folder and write its configuration; False for a dry run.

    Raises:
        StageComplete: the stage is finished.
        UserError: a user's mistake.
    """
    writes = claim and world().is_main_process
    device = compute_device()
    dtype = compute_dtype(loaded.config.dtype, device)

    # what is on the disk; of a base on the hub the small files, its weights are downloaded last
    stage = StageDir(Path(loaded.config.output_dir) / loaded.config.stage)
    before, changed = compare_config(stage, loaded, method)
    config = loaded.config
    check_paths(config)
    _check_settings(config)
    for note in loaded.notes:
        logger.info(note)
    frozen = adapters_below(method, config, stage)
    if loaded.announce and world().is_main_process:
        for line in needs_lines(method, config):
            logger.info(line)
    folder = fetch_base(config.model_name_or_path, config.model_revision, weights=False)
    base_config = read_model_config(folder, any_family=config.engine != "fused")
    if config.engine == "fused":
        check_targets(config.lora_target_modules, base_config)
        for adapter in frozen:
            check_shapes(adapter, empty_model(folder, base_config))

    # tokenizer, template, rows
    template = template_of(config, folder, frozen, (before or {}).get("template_time"))
    check_vocabulary(template.tokenizer, base_config.vocab_size, Path(template.tokenizer.name_or_path))
    stages = [stage_of(adapter) for adapter in frozen]
    if config.chat_template == "auto" and stages and stages[-1] is not None:
        check_rendering(stages[-1], frozen[-1].path.parent, template.text, template.tokenizer)
    parts = prepare_parts(method, loaded, template)
    data, eval_data = parts[0], parts[1] if len(parts) > 1 else None
    chosen = settle(method, loaded, parts, base_config.hidden_size) if before is None else []
    config = loaded.config
    if config.engine == "fused":
        check_length(base_config, config.max_length, f"{folder}/config.json")
    _log_rows(parts, config, getattr(base_config, "max_position_embeddings", None))
    for line in chosen:
        logger.info(line)
    now: dict[str, Any] = {  # what stage.json has of it
        "adapters": [
            {"path": _relative_to_run(adapter.path, stage.run), "sha256": adapter.sha256} for adapter in frozen
        ],
        "data": {
            **data.report.as_dict(),
            "fingerprint": data.fingerprint,
            "template_sha256": text_sha256(template.text),
            "tokenizer_sha256": tokenizer_sha256(template.tokenizer),
        },
        "eval_data": None if eval_data is None else {"fingerprint": eval_data.fingerprint},
        "machine": machine_now(dtype),
        "versions": versions(),
    }
    if before is None and template.block_end is not None and not data.supervises(template.block_end):
        template.use(NO_THINKING + template.text)
        logger.info("no answer has reasoning: enable_thinking=false becomes the default of the saved chat template")

    # plan
    sizes = row_sizes(method, config, parts)
    workload = make_workload(config, method, base_config, dtype, frozen=frozen, **sizes)
    plan = None if before is None else kept_plan(before, changed, device.type)
    if plan is None:
        machine = this_machine(device, dtype, config.memory)
        workload, plan, reference = plan_run(workload, machine, config.memory, config)
        if method == "dpo":
            loaded.config = config = config.model_copy(update={"precompute_ref_log_probs": workload.cached_reference})
        for line in forecast_lines(workload, machine, plan, config, notes=[reference] if reference else []):
            logger.info(line, extra=None if claim else RESULT)  # a dry run has no other
    elif plan.int8:  # it may have begun on another card
        check_int8(workload, this_machine(device, dtype, config.memory, measure=False))
    torch.set_num_threads(plan.threads)

    # weights
    fetch_base(config.model_name_or_path, config.model_revision)
    check_weights(folder, base_config)
    for adapter, told in zip(frozen, stages):
        if told is not None:
            check_fingerprint(told["base"]["fingerprint"], folder, f"adapter {adapter.path}")
    if before is not None:
        lines = compare_files(stage, before, changed, folder, now)
        template.use(before.get("chat_template") or template.text)
    if writes:
        stage.claim()
    base, decoder = _load(config, plan, frozen, template)
    stack = decoder.stack
    per_epoch, total = step_schedule(config, len(data.rows))
    parameters = sum(map(torch.Tensor.numel, stack.parameters().values()))
    trained = f"; {parameters:,} parameters are trained" if parameters else ""
    an_epoch = f"{counted(per_epoch, 'step')} an epoch"
    logger.info(f"{counted(len(data.rows), 'row')}, {an_epoch}, {total:,} in all{trained}")
    if total < FEW_STEPS and config.max_steps is None and before is None:
        logger.warning(
            f"The model can learn little in so few steps: raise num_train_epochs (it is {config.num_train_epochs:g}) or lower "
            f"batch_size (it is {config.batch_size})."
        )

    # stage.json
    described = base.describe()
    if before is None:
        time = {"template_time": template.now.isoformat()} if template.reads_clock else {}
        method_of = {"method": method, "stage": config.stage, "status": "running", "engine": config.engine}
        info = {**method_of, "base": described, "chat_template": template.text, **time, **now, "created": utc_now()}
    else:
        step = max((int(path.name.split("-")[1]) for path in stage.checkpoints()), default=0)
        entry = {
            "step": step,
            "at": utc_now(),
            "machine": now["machine"],
            "versions": now["versions"],
            "changed": lines,
        }
        # the paths of base and adapters are those of now
        places = {key: described[key] for key in ("name_or_path", "revision")}
        below: dict[str, Any] = {"adapters": now["adapters"]}
        if (before.get("trl") or {}).get("continues"):  # engine trl lists the adapters that it trains on separately
            below = {"trl": {**before["trl"], "continues": now["adapters"]}}
        info = {**before, **below, "eval_data": now["eval_data"], "base": {**before["base"], **places}}
        info["resumed"] = [*(before.get("resumed") or []), entry]
    info |= {"format": FORMAT, "id": (before or {}).get("id") or _run_id(stage.run), "plan": plan.as_dict()}
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
        forget_best=before is not None and other_rows_held_out(before, now),
        writes=writes,
    )


def _check_settings(config: RunConfig) -> None:
    """Refuse values that can be known to be wrong before anything is read."""
    make_scheduler(config, torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate), 10)
    if config.report_to:
        from .callbacks import trackers

        trackers(config)
    if config.push_to_hub:
        try:
            validate_repo_id(config.push_to_hub)
        except HFValidationError as error:
            raise UserError(f"push_to_hub {config.push_to_hub}: {error}", "Set push_to_hub=OWNER/NAME.") from None


def _log_rows(parts: list[TokenizedDataset], config: RunConfig, context: int | None) -> None:
    """Print what was read, and warn of what was dropped and of rows beyond the base's ``context`` in tokens."""
    for part in parts:
        dropped = part.report.dropped_lines()
        for line in part.report.lines():
            logger.log(logging.WARNING if line in dropped else logging.INFO, line)
        # of a pair the length is that of both responses
        longer = 0 if context is None else int((np.minimum(part.lengths, config.max_length) > context).sum())
        if longer:
            logger.warning(
                f"{counted(longer, 'row')} {'is' if longer == 1 else 'are'} longer than the {context:,} tokens "
                "that the base was made for (max_position_embeddings). Lower max_length to cut them."
            )


def _load(config: RunConfig, plan: Plan, frozen: list[AdapterFile], template: ChatTemplate) -> tuple[Base, Decoder]:
    """Load the base, attach the adapters, and follow the plan."""
    logger.info(f"loading {config.model_name_or_path}" + (" in NF4" if config.load_in_4bit else ""))
    cap_allocator(compute_device(), config.memory)
    if config.engine == "unsloth":
        from ..engines.unsloth import load_unsloth

        base = load_unsloth(config)
    else:
        base = load_base(config, stream=plan.stream)
    stream = None
    if plan.stream:
        from ..model.weight_streaming import WeightStreamer

        stream = WeightStreamer(base.model, base.device)
    stack = AdapterStack(base.model, base.device)
    if config.engine == "fused":  # the other engines attach theirs, to any architecture
        for note in check_kernels(base.device, base.dtype, Shape.of(base.model.config).widths._replace(int8=plan.int8)):
            logger.info(note)
        for name, adapter in zip(resolve_frozen_names([a.path for a in frozen]), frozen):
            stack.add_frozen(name, adapter)
        stack.add_trainable(
            config.stage,
            r=config.lora_r,
            alpha=config.lora_alpha,
            targets=config.lora_target_modules,
            seed=config.seed,
            rslora=config.use_rslora,
        )
    if base.device.type == "cpu":
        keep_freed_pages()
    decoder = Decoder(stack, base.dtype, scratch=plan.scratch, stream=stream)
    decoder.follow(plan)
    if plan.int8:
        from ..model.int8 import calibrate

        text = general_text(template, CALIBRATION_EVERY)
        calibrate(decoder, collate_conversations(list(text.examples)).to(decoder.device))
    return base, decoder


def _run_id(run: Path) -> str:
    """The id that a run's stages share."""
    for stage in stages_of(run):
        with suppress(UserError):  # a broken stage.json of another stage
            if found := (stage.info() or {}).get("id"):
                return str(found)
    return uuid.uuid4().hex


def _relative_to_run(path: Path, run: Path) -> str:
    path, run = path.resolve(), run.resolve()
    return str(path.relative_to(run)) if path.is_relative_to(run) else str(path)
