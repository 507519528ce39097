"""What both stages do before the first step and after the last: resolve, load, stack, plan; write what people load."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peft import PeftConfig

from .. import __version__
from ..config.load import Loaded, Method, RunConfig, dump_config, load_config
from ..data.chat_template import ChatTemplate, Example, PairExample, resolve_template
from ..data.dataset import TokenizedDataset, prepare
from ..io.run_dir import StageDir, folder_aside, newest_run, write_text
from ..io.stage_info import FORMAT
from ..io.sync import newest_there, open_mirror, restore
from ..memory.machine import cap_allocator, keep_freed_pages, peak_memory
from ..memory.plan import Plan
from ..model.adapters import AdapterStack, check_targets, resolve_frozen_names
from ..model.base import (
    Base,
    compute_device,
    compute_dtype,
    fetch_base,
    fingerprint,
    load_base,
    load_tokenizer,
    read_model_config,
)
from ..model.check_weights import check_weights
from ..model.compose import compose
from ..model.decoder import Decoder
from ..model.peft_io import AdapterFile, LoraWeights, adapter_sha256, read_adapter, write_adapter
from ..model.shape import Shape
from ..model.tokenizer import save_tokenizer
from ..model.weight_streaming import WeightStreamer
from ..ops.dispatch import check_kernels
from .callbacks import trackers
from .ground import (
    adapters_below,
    finished,
    may_go_on,
    plan_then,
    relative_to_run,
    run_id,
    same_base,
    same_template,
    vocabulary_fits,
)
from .leader import Leader
from .objective import Outcome
from .optim import check_schedule
from .planning import plan_stage, said_again, set_threads, stage_workload
from .publish import check_repo_name, push_adapter
from .resume import (
    Changes,
    adapters_difference,
    base_difference,
    config_then,
    cores,
    data_difference,
    data_prints,
    judged_on_other_rows,
    machine_now,
    memory_then,
    moved,
    resumed,
    roundings,
    same_device,
)
from .stage import Say, Stage
from .steps import step_schedule

# what a stage takes over from the one below it, unless the user says otherwise
INHERITED = (
    "model_name_or_path",
    "model_revision",
    "load_in_4bit",
    "bnb_4bit_use_double_quant",
    "dtype",
    "system",
    "sync",
)
DEFAULT_CONFIG = {"sft": "zephyr-7b/sft", "dpo": "zephyr-7b/dpo"}


def resolve_run(
    method: Method,
    file: str | None,
    overrides: list[str],
    *,
    runs_root: Path = Path("runs"),
    say: Say = print,
    fetch: bool = False,
) -> Loaded:
    """The configuration of a stage: the shipped recipe where none is named, on top of the stage before.

    ``dpo`` without an output_dir continues the newest run whose stage ``sft`` is complete.

    Args:
        fetch: bring what ``sync`` has of the run first (see ``sync.restore``); not for what only reads.
    """
    loaded = load_config(method, file or DEFAULT_CONFIG[method], overrides)
    extra: list[str] = []
    if method == "dpo" and not (file and "output_dir" in loaded.given) and not _names(overrides, "output_dir"):
        run, where = newest_run(runs_root, stage_complete="sft"), ""
        if run is None and fetch and loaded.config.sync:
            name = newest_there(loaded.config.sync, runs_root / "new", stage_complete="sft")
            run, where = (runs_root / name if name else None), f" in {loaded.config.sync}"
        if run is not None:
            overrides = [*overrides, f"output_dir={run}"]
            extra.append(f"continuing {run}, the newest run{where} whose stage sft is complete")
        loaded = load_config(method, file or DEFAULT_CONFIG[method], overrides)
    if fetch:
        restore(loaded.config.sync, StageDir(Path(loaded.config.output_dir) / loaded.config.stage), say)
    below = StageDir(Path(loaded.config.output_dir) / "sft")
    if method == "dpo" and loaded.config.adapters == [] and below.complete():
        inherited = config_then(below)  # with defaults in its place dpo would train on another base
        # a shipped file spells its base out; only the user's own words count against the stage below
        own = loaded.given if file else {k for k in loaded.given if _names(overrides, k)}
        taken = {k: inherited[k] for k in INHERITED if k in inherited and k not in own}
        loaded.config = RunConfig.model_validate({**loaded.config.model_dump(), **taken})
    elif method == "dpo" and loaded.config.adapters == [] and (file or _names(overrides, "model_name_or_path")):
        extra += _adapter_as_model(loaded)
        if loaded.foreign and "model_name_or_path" in loaded.given and loaded.config.adapters == []:
            loaded.config = loaded.config.model_copy(update={"adapters": "none"})
            extra.append(
                "adapters: none, as TRL's DPO begins from the model itself; name an SFT adapter to begin from that"
            )
    loaded.notes = [*loaded.notes, *extra]
    return loaded


def _adapter_as_model(loaded: Loaded) -> list[str]:
    """A model that is an adapter, as in the handbook's QLoRA recipes, goes into ``adapters``; returns the note."""
    name = loaded.config.model_name_or_path
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except ValueError:  # PEFT's answer to anything that is no adapter, or is out of reach
        return []
    if base is None or loaded.config.model_revision != "main":  # whose revision would that be
        return []
    moved = {"model_name_or_path": base, "adapters": [name]}
    loaded.config = RunConfig.model_validate({**loaded.config.model_dump(), **moved})
    return [f"{name} is an adapter: it is in adapters, and model_name_or_path is its base, {base}"]


def _names(overrides: list[str], key: str) -> bool:
    heads = [word.lstrip("-").split("=")[0].split(".")[0].replace("-", "_") for word in overrides]
    return key in heads


def setup_stage(
    method: Method, loaded: Loaded, *, say: Say = print, claim: bool = True, leader: Leader | None = None
) -> Stage:
    """Check, prepare the rows, load the base, stack the adapters, plan. What is cheap and can fail comes first.

    Args:
        claim: make the stage's folder and write its configuration; False for a dry run.
        leader: what the process that writes has found: this one follows it, and writes nothing.

    Raises:
        StageComplete: the stage is finished.
        UserError: anything of the user's that does not fit.
    """
    config = loaded.config
    for note in loaded.notes:
        say(note)
    stage = StageDir(Path(config.output_dir) / config.stage)
    before, changes = may_go_on(stage, config, method, say, claim=claim) if leader is None else (None, Changes())
    if config.engine == "fused":
        check_targets(config.lora_target_modules)
    check_schedule(config)
    trackers(config)
    check_repo_name(config)
    frozen = adapters_below(method, config, stage, say)
    folder = fetch_base(config.model_name_or_path, config.model_revision)
    base_config = read_model_config(folder, any_family=config.engine != "fused")
    check_weights(folder, base_config)
    print_of_base = fingerprint(folder)
    same_base(frozen, folder)
    complete = before is not None and before.get("status") == "complete"
    if before is not None:
        changes.settle("base", base_difference(before, folder))
        changes.settle("adapters", adapters_difference(before, frozen))
        changes.refuse(stage, complete=complete)
    begun = before or (leader.info if leader is not None else {})
    template = template_of(config, folder, frozen, begun.get("template_time"))
    vocabulary_fits(template.tokenizer, base_config)
    if config.chat_template == "auto":
        same_template(frozen, template)
    data = prepare(config.dataset, method, config, template, what="training")
    _tell(data, base_config, say)
    eval_data = prepare(config.eval_dataset, method, config, template, what="held-out") if config.eval_dataset else None
    if eval_data is not None:
        _tell(eval_data, base_config, say)
    machine = machine_now(compute_dtype(config.dtype, compute_device()))
    now = versions()
    forget_best = False
    if before is not None:
        changes.settle("data", data_difference(before, data, template))
        changes.refuse(stage, complete=complete)
        if complete:
            raise finished(stage, before)
        forget_best = judged_on_other_rows(before, config, stage, eval_data)
        _tell_changes(before, changes, now, machine, config, forget_best, say)
    if leader is not None:
        leader.agrees(print_of_base, data, machine)
        plan, said = plan_then(stage, leader.info, base_config.num_hidden_layers), []
    elif (
        before is not None
        and memory_then(stage) == config.memory.model_dump(mode="json")
        and same_device(before, machine)
    ):
        plan = plan_then(stage, before, base_config.num_hidden_layers)  # another split would change bits
        said = said_again(plan)
        if cores() < plan.threads:
            said.append(
                f"it computes with {plan.threads} threads, and there are {cores()} cores here: it will be slower"
            )
    else:
        plan, said = plan_stage(stage_workload(method, config, base_config, folder, frozen, data, eval_data), config)
        if before is not None:
            why = "memory was changed" if same_device(before, machine) else "this is another kind of device"
            say(f"{why}: from here on sums are split otherwise, and round otherwise")
            before["plan"] = plan.as_dict()
    for line in said:
        say(line)
    set_threads(plan)
    if claim:
        stage.claim()
    say(f"loading {config.model_name_or_path}" + (" in NF4" if config.load_in_4bit else ""))
    cap_allocator(compute_device(), config.memory)
    base = _load(config, plan, say)
    if config.engine == "fused":
        for note in check_kernels(base.device, base.dtype, Shape.of(base.model.config).widths):
            say(note)
    stream = WeightStreamer(base.model, base.device) if base.streamed else None
    stack = AdapterStack(base.model, base.device)
    if config.engine == "fused":  # the baselines attach theirs by themselves, to any architecture
        for name, adapter in zip(resolve_frozen_names([a.path for a in frozen]), frozen):
            stack.add_frozen(name, adapter)
        stack.add_trainable(
            config.stage, r=config.lora_r, alpha=config.lora_alpha, targets=config.lora_target_modules, seed=config.seed
        )
    if base.device.type == "cpu":
        keep_freed_pages()
    per_epoch, total = step_schedule(config, len(data.rows))
    parameters = sum(p.numel() for p in stack.parameters().values())
    trained = f"; {parameters:,} parameters are trained" if parameters else ""
    say(f"{len(data.rows):,} rows, {per_epoch:,} steps an epoch, {total:,} in all{trained}")
    info = (
        leader.info
        if leader is not None
        else before
        or {
            "format": FORMAT,
            "id": run_id(stage.run),
            "method": method,
            "stage": config.stage,
            "status": "running",
            "engine": config.engine,
            "base": base.describe(),
            "adapters": [{"path": relative_to_run(a.path, stage.run), "sha256": a.sha256} for a in frozen],
            "chat_template": template.text,
            **({"template_time": template.now.isoformat()} if template.reads_clock else {}),
            "versions": now,
            "machine": machine,
            "plan": plan.as_dict(),
            "data": {**data.report.as_dict(), **data_prints(data, template)},
            "created": _now(),
        }
    )
    if before is not None:
        info.setdefault("id", run_id(stage.run))
        info["format"] = FORMAT
        moved(info, base.describe(), frozen, lambda path: relative_to_run(path, stage.run))
        info.setdefault("resumed", []).append(resumed(stage, changes, now, machine, at=_now()))
    if leader is None:
        info["eval_data"] = {"fingerprint": eval_data.fingerprint} if eval_data is not None else None
    if claim:
        stage.write_info(info)  # first: a changed ``memory`` is told by the configuration that the file has
        write_text(stage.config, dump_config(config))
    decoder = Decoder(stack, base.dtype, scratch=plan.scratch, stream=stream)
    decoder.follow(plan)
    mirror = open_mirror(config.sync, stage, say) if claim else None
    return Stage(
        method,
        config,
        stage,
        base,
        template,
        stack,
        decoder,
        data,
        eval_data,
        plan,
        frozen,
        info,
        mirror,
        forget_best if leader is None else leader.forget_best,
        claim,
    )


def _tell_changes(
    before: dict[str, Any],
    changes: Changes,
    now: dict[str, str],
    machine: dict[str, Any],
    config: RunConfig,
    forget_best: bool,
    say: Say,
) -> None:
    """Say what is not as it was when the stage was last worked on, and note it among what goes on."""
    if changes.said:
        say(f"changed since this stage was last worked on: {'; '.join(changes.said)}")
    if forget_best:
        line = "the held-out rows are others than before: evaluations of before do not count for the best checkpoint"
        say(line)
        changes.said.append(line)
    if rounding := roundings(before, now, machine, config.engine):
        say(
            f"{'; '.join(rounding)}: sums may round otherwise, so the end is not bit for bit that of an undisturbed run"
        )
        changes.said += rounding


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _load(config: RunConfig, plan: Plan, say: Say) -> Base:
    if config.engine == "unsloth":
        from ..engines.unsloth import load_unsloth

        return load_unsloth(config)
    return load_base(config, stream=plan.stream, say=say)


def save_stage(stage: Stage, outcome: Outcome, *, say: Say = print, own: dict[str, LoraWeights] | None = None) -> None:
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
    say(f"{stage.dir.adapter} holds the adapter" + (" (the whole chain in one)" if stage.frozen else ""))
    push_adapter(stage.config, stage.dir, stage.info, say)


def versions() -> dict[str, str]:
    result = {"zephyr-lite": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "datasets", "trl", "triton", "unsloth"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return result


def template_of(config: RunConfig, folder: Path, frozen: list[AdapterFile], time: str | None = None) -> ChatTemplate:
    """``auto`` takes the template of the adapter below, where that was saved with one; then the base's own.

    Args:
        time: when the stage began, for a template that writes the date; None: now.
    """
    source, now = folder, datetime.datetime.fromisoformat(time) if time else None
    if config.chat_template == "auto":
        for adapter in reversed(frozen):
            # delta/ lies beside adapter/, which is where a stage keeps its tokenizer
            for candidate in (adapter.path, adapter.path.parent / "adapter"):
                if (candidate / "tokenizer_config.json").is_file():
                    return resolve_template("auto", load_tokenizer(candidate), now)
    return resolve_template(config.chat_template, load_tokenizer(source), now)


def _tell(data: TokenizedDataset, base_config: Any, say: Say) -> None:
    for line in data.report.lines():
        say(line)
    context = getattr(base_config, "max_position_embeddings", None)
    if context is None:
        return
    long = (data.lengths > context).nonzero()[0].tolist()  # of a pair both responses
    if longer := [data.examples[i].where for i in long if _positions(data.examples[i]) > context]:
        say(
            f"warning: {len(longer):,} rows are longer than the {context:,} tokens that the base was made for "
            f"(max_position_embeddings), {longer[0]} first. Lower max_length to cut them."
        )


def _positions(row: Example | PairExample) -> int:
    if isinstance(row, Example):
        return len(row.ids)
    return len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids))
