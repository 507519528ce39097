"""Other tools' YAML files, translated to this project's keys by the tables of ``foreign_keys``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from typing import Any

from ..io.text import comma_list, short
from .foreign_keys import ACCEPTED, ALIASES, DATASETS, REFUSED, SFT_WEIGHTS, TOOLS, TRANSLATED
from .schema import MemorySpec, RunConfig

# Axolotl's formats of rows that are found by their columns here
_FORMATS = ("chat_template", "sharegpt", "alpaca", "completion", "chatml", "llama3", "zephyr")
_TURNS = (("role", "role"), ("role", "from"), ("content", "content"), ("content", "value"))
# the types of the values that ``rename`` translates
_TYPES = {
    dict: ("keys and values", "model_init_kwargs dataset_kwargs special_tokens dataset_mixer dataset_mixture"),
    list: ("a list", "dataset_splits dataset_configs datasets test_datasets"),
    int: ("a whole number", "max_samples"),
    str: ("a text", "dataset_name dataset_config dataset_train_split dataset_test_split dataset_text_field"),
    bool: ("true or false", "assistant_only_loss completion_only_loss disable_dropout lora_target_linear"),
}
# values that have another name here, alone or as a list's only entry
_VALUES: dict[str, dict[Any, Any]] = {
    "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", None: "auto"},
    "optim": {"adamw_torch_fused": "adamw_torch", "adamw_hf": "adamw_torch", "adamw_bnb_8bit": "adamw_8bit"}
    | {"paged_adamw": "paged_adamw_32bit"},
    "chat_template": {"tokenizer_default": "auto"},
    "max_steps": {-1: None, 0: None},  # transformers' "not set"
    "lora_target_modules": {"all": "all-linear", "all-linear": "all-linear"},
    "loss_type": {},
    "report_to": {"none": []},
    "memory": {"auto": {}, None: {}},
    "lr_scheduler_kwargs": {None: {}},
    "push_to_hub": {False: None},
}
# null is TRL's "not set" of these
_UNSET = (
    *("model_revision", "chat_template", "lora_target_modules", "use_rslora", "warmup_ratio", "save_total_limit"),
    *("hub_private_repo", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
_LISTS = ("dataset", "eval_dataset", "adapters", "lora_target_modules", "loss_type", "loss_weights", "report_to")
# the micro-batch's two names, and the accumulation steps
BATCH_PARTS = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")


def rename(
    values: dict[str, Any], notes: list[str], faults: list[str], *, file: bool = False, dpo: bool = False
) -> dict[str, Any]:
    """Other tools' keys as this project's; combinations first (micro-batch × accumulation, data-set mixtures).

    Args:
        values: keys and values of a file or of the command line.
        notes: a line with the renamed keys, one with those without effect, and what the user should check are added.
        faults: one line is added for each key that is unknown or refused, or has a value that cannot be translated;
            these keys are left out of the result.
        file: the values are a whole file, so TRL's defaults for missing keys count too.
        dpo: the stage is dpo.
    """
    own = RunConfig.model_fields
    taken = {key: comma_list(value) if ALIASES.get(key, key) in _LISTS else value for key, value in values.items()}
    for kind, (what, keys) in _TYPES.items():
        for key in keys.split():
            if not isinstance(values.get(key), (kind, type(None))):
                faults.append(f"{key}: {short(taken.pop(key))} is not {what}.")
    for key in ("model_init_kwargs", "dataset_kwargs", "special_tokens"):
        taken = {**(taken.pop(key, None) or {}), **taken}
    tool = tool_of(taken)
    renamed: list[str] = []
    unused: list[str] = []
    if file and tool == "LLaMA-Factory" and (stage := taken.get("stage")):
        renamed.append(f"stage → {'loss_type=kto' if stage == 'kto' else f'the command zephyr-lite {stage}'}")
        if stage == "kto":
            taken |= {"stage": "dpo", "loss_type": "kto", "pref_loss": None}
        elif stage not in ("sft", "dpo"):
            faults.append(
                f"stage: {short(stage)}: sft, dpo and kto are trained here; pre-training (pt) is sft on rows with a column text."
            )
    for key, ours in (ALIASES | TRANSLATED).items():
        if key in taken or key in values:
            renamed.append(f"{key} → {ours}")
        if key in ALIASES and key in taken and ours in taken:
            one, other = taken.pop(key), taken[ours]
            if None not in (one, other) and one != other:
                faults.append(f"{key}: {short(one)}, but {ours}: {short(other)}: two names of one key. Keep one.")
            taken[ours] = one if other is None else other
    result: dict[str, Any] = {}
    _batch_size(taken, result, faults, tool)
    strategy = taken.pop("evaluation_strategy", None)  # until transformers 4.41
    strategy = taken.pop("eval_strategy", strategy)
    if not taken.keys().isdisjoint(DATASETS):
        _datasets(taken, result, faults, notes, evaluates=strategy in ("steps", "epoch"))
    if strategy in ("no", False):
        taken["eval_dataset"] = result["eval_dataset"] = None
    elif strategy == "epoch":
        taken["eval_steps"] = None
    elif strategy not in (None, "steps"):
        faults.append(f"eval_strategy: {short(strategy)} is none of no, steps and epoch.")
    assistant, completion = taken.pop("assistant_only_loss", None), taken.pop("completion_only_loss", None)
    if assistant is not None or completion is not None:
        taken.setdefault("loss_on", "last" if completion else "assistant" if assistant else "all")
    if not dpo and taken.get("loss_type") in ("nll", "chunked_nll", ["nll"]):
        del taken["loss_type"]
    for key in ("rl", "pref_loss"):  # Axolotl's and LLaMA-Factory's
        if (loss := taken.pop(key, None)) is not None:
            taken["loss_type"] = "sigmoid" if loss == "dpo" else loss
    for key in SFT_WEIGHTS:
        if weight := taken.pop(key, None):
            losses = taken.get("loss_type") or "sigmoid"
            losses = losses if isinstance(losses, list) else [losses]
            taken["loss_weights"] = [*(taken.get("loss_weights") or [1.0] * len(losses)), weight]
            taken["loss_type"] = [*losses, "sft"]
    hub_id = taken.pop("hub_model_id", None)
    if taken.get("push_to_hub") is True:  # transformers has a switch and a name
        if not hub_id:
            faults.append("push_to_hub: true needs a repository. Set push_to_hub=OWNER/NAME.")
        taken["push_to_hub"] = hub_id
    warmup = number(taken.get("warmup_steps"))
    if warmup is not None and warmup < 1:  # transformers: a share of the steps
        del taken["warmup_steps"]
        if warmup or taken.get("warmup_ratio") is None:
            taken["warmup_ratio"] = warmup
    if taken.pop("lora_target_linear", None):
        taken["lora_target_modules"] = "all-linear"
    no_dropout = taken.pop("disable_dropout", None)
    for key, value in taken.items():
        if key in own or key in ALIASES:
            result[ALIASES.get(key, key)] = value
        elif key in ACCEPTED:
            unused.append(key)
        elif key in REFUSED:
            harmless, why = REFUSED[key]
            if not (value is None or value in harmless or number(value) in harmless):
                instead = f", or set it to {harmless[0]!r}" if harmless and harmless[0] not in ("", {}, []) else ""
                faults.append(f"{key}: {short(value)}: {why}. Remove the key{instead}.")
        else:
            faults.append(unknown_key(key, own))
    for key, table in _VALUES.items():
        value = result.get(key, [])
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if key in result and isinstance(value, str | int | None):
            result[key] = table.get(value, value)
    for key in _UNSET:
        if result.get(key, key) is None:
            del result[key]
    # TRL's DPO disables every dropout by default, so the handbook's lora_dropout has no effect there
    if no_dropout or (no_dropout is None and dpo and file and tool == "TRL" and result.get("lora_dropout")):
        notes.append("lora_dropout is 0 here: disable_dropout is on, TRL's default for DPO")
        result["lora_dropout"] = 0
    if renamed:
        notes.append(f"keys with another name here: {', '.join(renamed)}")
    if unused:
        notes.append(f"keys without effect here (`zephyr-lite keys KEY` says why): {', '.join(unused)}")
    if file and tool:
        notes.append(f"keys that are not in the file have the defaults of `zephyr-lite keys`, not {tool}'s")
        lora = {"TRL": ("use_peft",), "Axolotl": ("adapter", "lora_r"), "LLaMA-Factory": ()}[tool]
        if lora and not any(map(values.get, lora)):
            notes.append(
                f"the file is for full fine-tuning (no {lora[0]}); a LoRA adapter is trained here, which usually takes ten "
                "times the learning rate"
            )
    return result


def tool_of(values: dict[str, Any]) -> str | None:
    """The tool that a file is for, by its keys; TRL also stands for transformers and the handbook."""
    others = {**TOOLS, "TRL": TRANSLATED | ACCEPTED | REFUSED}
    return next((tool for tool, keys in others.items() if not values.keys().isdisjoint(keys)), None)


def _batch_size(values: dict[str, Any], result: dict[str, Any], faults: list[str], tool: str | None) -> None:
    """Multiply the micro-batch with the accumulation steps; null is not set."""
    parts = {key: value for key in BATCH_PARTS if (value := values.pop(key, None)) is not None}
    own = sorted(values.keys() & {"batch_size", "train_batch_size"})
    sizes = [number(value) or math.nan for value in parts.values()]
    if not all(size.is_integer() for size in sizes):
        faults.append(f"{', '.join(parts)}: must be whole numbers.")
    elif parts and (own or parts.keys() >= set(BATCH_PARTS[:2])):
        faults.append(f"{', '.join([*own, *parts])}: the batch size is set twice. Keep one.")
    elif list(parts) == [BATCH_PARTS[2]]:
        micro = BATCH_PARTS[tool == "Axolotl"]
        default = " (TRL's default is 8)" if tool == "TRL" else ""
        faults.append(f"{BATCH_PARTS[2]} needs {micro} too{default}. Or set batch_size alone.")
    elif parts:
        result["batch_size"] = int(math.prod(sizes))


def _datasets(
    values: dict[str, Any], result: dict[str, Any], faults: list[str], notes: list[str], evaluates: bool
) -> None:
    """Translate TRL's ``dataset_name`` and ``datasets``, the handbook's ``dataset_mixer`` {path: share} and
    ``dataset_mixture``; then the held-out rows and the text column."""
    given = [k for k in ("dataset", "dataset_name", "datasets", "dataset_mixer", "dataset_mixture") if values.get(k)]
    if len(given) > 1:
        faults.append(f"{', '.join(given)}: the data sets are named more than once. Keep one.")
    result |= {key: values.pop(key) for key in ("dataset", "eval_dataset") if key in values}
    theirs = {key: values.pop(key, None) for key in DATASETS}
    mixer, splits, configs = theirs["dataset_mixer"], theirs["dataset_splits"], theirs["dataset_configs"]
    train, test, column = (theirs[f"dataset_{key}"] for key in ("train_split", "test_split", "text_field"))
    entries, size = theirs["datasets"], theirs["test_split_size"]
    if mixture := theirs["dataset_mixture"]:
        # rows are drawn with the run's seed
        for key in sorted(map(str, mixture.keys() - {"datasets", "test_split_size", "seed"})):
            faults.append(f"there is no key 'dataset_mixture.{key}'.")
        entries, size = mixture.get("datasets"), mixture.get("test_split_size", size)
    if entries:
        result["dataset"] = [spec for entry in entries for spec in _entry(entry, faults)]
    elif mixer or theirs["dataset_name"] is not None:
        specs = [{"path": theirs["dataset_name"], "name": theirs["dataset_config"]}]
        if mixer:
            train, test = (next((s for s in splits or ["train"] if kind in s), None) for kind in ("train", "test"))
            if splits and (train is None or set(splits) - {train, test}):
                faults.append(
                    f"dataset_splits: {short(splits)} is not one split of training and one of test. Write dataset."
                )
            if configs and len(configs) != len(mixer):
                faults.append(f"dataset_configs: {len(configs)} names for {len(mixer)} data sets.")
            names = zip(mixer.items(), configs or [None] * len(mixer))
            specs = [{"path": path, "name": each, "weight": weight} for (path, weight), each in names]
        elif test is None and evaluates:
            test = "test"  # TRL's default
        result["dataset"] = [{**spec, "split": train or "train"} for spec in specs]
        if test:
            result["eval_dataset"] = [{**spec, "split": test, "weight": 1.0} for spec in specs]
    if tests := theirs["test_datasets"]:
        result["eval_dataset"] = [spec for entry in tests for spec in _entry(entry, faults)]
    limit = theirs["max_samples"]
    column = None if column in ("text", "messages", "conversations") else column  # these are found without a name
    about = {"max_samples": limit, "test_split_size": size, "dataset_text_field": column}
    belongs = ", ".join(key for key, value in about.items() if value is not None)
    if belongs and not _specs(result.get("dataset")):
        faults.append(f"{belongs}: about the rows of dataset, which is not there. Name both.")
    if limit is not None:
        for key in ("dataset", "eval_dataset"):
            if specs := _specs(result.get(key)):
                result[key] = [{"limit": limit, **spec} for spec in specs]
    if size is not None:
        _hold_out(size, result, faults, notes)
    if column is not None:
        for key in ("dataset", "eval_dataset"):
            if specs := _specs(result.get(key)):
                named = {"columns": {"text": column}}
                result[key] = [s if isinstance(s.get("columns"), dict) else {**s, **named} for s in specs]


def _specs(value: Any) -> list[dict[str, Any]]:
    """Data sets as keys and values; [] for values that the schema will refuse."""
    entries = [{"path": e} if isinstance(e, str) else e for e in (value if isinstance(value, list) else [value])]
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _entry(entry: Any, faults: list[str]) -> list[dict[str, Any]]:
    """A data set of a mixture in this project's keys, once for each of its files."""
    if not isinstance(entry, dict):
        faults.append(f"datasets: {short(entry)} is not keys and values such as {{path: a/b, split: train}}.")
        return []
    names = {"id": "path", "config": "name"}  # the handbook's -> ours
    spec = {"split": "train", **{names.get(key, str(key)): value for key, value in entry.items() if value is not None}}
    faults += [
        f"datasets: columns: {column} is given to no chat template here."
        for column in ("tools", "chat_template_kwargs")
        if column in (spec.get("columns") or [])
    ]
    # Axolotl's keys; a format is found by the columns, and a file's kind by its name
    kind, _, turns = (spec.pop(key, None) for key in ("type", "ds_type", "message_property_mappings"))
    if kind is not None and str(kind).partition(".")[0] not in _FORMATS:
        faults.append(
            f"datasets: type: {short(kind)} is none of {', '.join(_FORMATS)}, which are found by the columns."
        )
    if not all(turn in _TURNS for turn in (turns or {}).items()):
        faults.append("datasets: message_property_mappings: a turn has role and content here, or from and value.")
    fields = {ours: spec.pop(f"field_{ours}", None) for ours in ("messages", "chosen", "rejected")}
    if named := {ours: column for ours, column in fields.items() if column not in (None, ours)}:
        spec["columns"] = named
    files = spec.pop("data_files", None)
    if not files:
        return [spec]
    files = [files] if isinstance(files, str) else files
    if spec.get("path") not in ("json", "csv", "parquet") or not isinstance(files, list):
        faults.append("datasets: data_files are read as path: json, csv or parquet, and a file or a list of files.")
        return []
    return [{**spec, "path": file} for file in files]


def _hold_out(size: Any, result: dict[str, Any], faults: list[str], notes: list[str]) -> None:
    """``test_split_size`` rows of the mixture (a share, below 1) become ``eval_dataset``."""
    rows, specs = number(size), _specs(result.get("dataset"))
    if rows is None or not 0 < rows < math.inf or (rows >= 1 and rows != int(rows)):
        faults.append(f"test_split_size: {short(size)} is neither a share below 1 nor a number of rows.")
    elif specs:
        share = rows if rows < 1 else math.ceil(rows / len(specs))
        result["dataset"] = [{**spec, "test_size": share} for spec in specs]
        # a number of held-out rows does not scale with the data set's weight
        own = {} if rows < 1 else {"weight": 1.0}
        result["eval_dataset"] = [{**spec, **own, "part": "test"} for spec in result["dataset"]]
        if rows >= 1 and len(specs) > 1:
            notes.append(f"test_split_size {size}: {share:,} of each data set")


def number(value: Any) -> float | None:
    """A number, also one that YAML reads as a text (1e-8); None for anything else."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def unknown_key(key: str, own: Collection[str]) -> str:
    """The message for an unknown key, with the nearest known one."""
    options = {"dryrun": "--dry-run", "config": "--config", "verbose": "--verbose"}
    near = [options[name] for name in difflib.get_close_matches(key[:100].replace("_", ""), options, n=1, cutoff=0.75)]
    if key in MemorySpec.model_fields:
        near = [f"'memory.{key}'"]
    if not near:
        known = [*own, *([] if "." in key else [*ALIASES, *TRANSLATED])]
        near = [repr(name) for name in difflib.get_close_matches(key[:100], known, n=1, cutoff=0.65)]
    return f"there is no key {short(key)}.{f' Did you mean {near[0]}?' if near else ''}"
