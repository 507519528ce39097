"""The schema of a run: one flat set of keys for both stages, YAML files, and ``key=value`` overrides.

Names are those that TRL, PEFT and transformers use. A YAML file written for TRL or for the alignment handbook
runs as it is (``foreign_keys``). Every unknown key is refused, with the nearest known one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import UserError
from .foreign_keys import ALIASES, rename, unknown_key
from .reading import place
from .redact import refuse_secrets
from .shipped import find_config
from .strict_yaml import WORD, dump_yaml, read_word, read_yaml
from .words import short

Method = Literal["sft", "dpo"]


class DatasetSpec(BaseModel):
    """Where rows come from: a hub id, a local folder in the hub's layout, or a file (JSONL, JSON, CSV, Parquet)."""

    model_config = ConfigDict(extra="forbid")

    path: str
    name: str | None = None  # the hub's configuration of the data set, where it has several
    split: str | None = None
    revision: str | None = None
    weight: float = Field(1.0, gt=0, le=1000)  # share in a mixture: 0.5 takes half of the rows, 2 takes each twice
    limit: int | None = Field(None, ge=1, lt=2**63)  # the first N rows after a seeded shuffle
    columns: dict[str, str] = {}  # {ours: theirs}

    @field_validator("path")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        return place(value)


class MemorySpec(BaseModel):
    """What the planner would otherwise decide by itself."""

    model_config = ConfigDict(extra="forbid")

    keep: Literal["input", "attention", "all"] | None = None  # what each layer keeps for its backward pass
    micro_tokens: int | None = Field(None, ge=1, lt=2**31)  # tokens that run at once
    vram: str | None = None  # use so much of the card at most: 8GiB
    host: str | None = None  # take so much of the main memory at most, for what is offloaded or streamed: 16GiB
    offload: bool | None = None  # what layers keep lies in main memory between the passes
    stream: bool | None = None  # the base's layers lie in main memory and come to the card one ahead


class RunConfig(BaseModel):
    """The keys of one stage. Defaults are the published recipe's; ``dpo`` changes some (see ``DPO_DEFAULTS``)."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

    # what is trained, and where it goes
    model_name_or_path: str = "mistralai/Mistral-7B-v0.1"
    model_revision: str = "main"
    output_dir: str = "runs/zephyr-7b"
    stage: str = "sft"
    engine: Literal["fused", "trl", "unsloth"] = "fused"
    seed: int = Field(42, ge=0, lt=2**31)
    # rows
    dataset: list[DatasetSpec] = [DatasetSpec(path="HuggingFaceH4/ultrachat_200k", split="train_sft")]
    eval_dataset: list[DatasetSpec] = [DatasetSpec(path="HuggingFaceH4/ultrachat_200k", split="test_sft")]
    chat_template: str = "auto"
    system: str | None = None
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    max_length: int = Field(2048, ge=2, le=2**24)
    max_prompt_length: int = Field(512, ge=1, le=2**24)
    # the base and what stands on it
    adapters: list[str] | Literal["none"] = []
    load_in_4bit: bool = True
    bnb_4bit_use_double_quant: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = "auto"
    lora_r: int = Field(16, ge=1, le=2**16)
    lora_alpha: float = Field(16, gt=0, le=2**20)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    lora_target_modules: list[str] | Literal["all-linear"] = "all-linear"
    # optimization
    batch_size: int = Field(8, ge=1, le=2**20)
    num_train_epochs: float = Field(1, gt=0, le=10**6)
    max_steps: int | None = Field(None, ge=1, lt=2**31)
    learning_rate: float = Field(2.0e-4, gt=0, le=1000)
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = "adamw_torch"
    weight_decay: float = Field(0.0, ge=0, le=1000)
    max_grad_norm: float = Field(1.0, gt=0)
    # preference optimization
    beta: float = Field(0.01, gt=0, le=1000)
    loss_type: Literal["sigmoid", "ipo", "ipo_sum", "hinge", "robust"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    precompute_ref_log_probs: bool = False
    # evaluation, checkpoints, trackers
    eval_steps: int | None = Field(100, ge=1, lt=2**31)
    save_steps: int | None = Field(100, ge=1, lt=2**31)
    logging_steps: int = Field(1, ge=1, lt=2**31)
    save_total_limit: int = Field(2, ge=1, lt=2**31)
    load_best_model_at_end: bool = False
    early_stopping_patience: int | None = Field(None, ge=1, lt=2**31)
    samples: int = Field(1, ge=0, le=64)  # held-out prompts that are answered at the start and at every evaluation
    sample_tokens: int = Field(64, ge=1, le=2**20)
    report_to: list[str] = []
    push_to_hub: str | None = None
    sync: str | None = None  # a folder or hub:OWNER/NAME that complete checkpoints are copied to
    memory: MemorySpec = MemorySpec()

    @field_validator("dataset", "eval_dataset", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is None:
            return []
        entries = value if isinstance(value, list) else [value]
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapter_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) and value != "none" else value

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        if value in (None, "none", ["none"]):  # the last is how the alignment handbook writes it
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("push_to_hub", mode="before")
    @classmethod
    def _no_push(cls, value: Any) -> Any:
        return None if value is False else value

    @field_validator("memory", mode="before")
    @classmethod
    def _memory_auto(cls, value: Any) -> Any:
        return {} if value in (None, "auto") else value

    @field_validator("lora_target_modules", mode="before")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) and value != "all-linear" else value

    @field_validator("lora_target_modules")
    @classmethod
    def _are_names(cls, value: Any) -> Any:
        for name in [] if isinstance(value, str) else value:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise ValueError(
                    "a module is named by its plain name, such as q_proj; regular expressions are not read"
                )
        return value

    @field_validator("stage")
    @classmethod
    def _stage_is_a_word(cls, value: str) -> str:
        if not value.replace("-", "").replace("_", "").isalnum():
            raise ValueError("a stage's name is one word of letters, digits, '-' and '_'; it becomes a folder's name")
        return value

    @field_validator("model_name_or_path", "model_revision", "output_dir", "push_to_hub", "sync")
    @classmethod
    def _is_a_place(cls, value: str | None) -> str | None:
        return value if value is None else place(value)

    @field_validator("adapters")
    @classmethod
    def _are_places(cls, value: Any) -> Any:
        return value if isinstance(value, str) else [place(each) for each in value]

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        if self.loss_type == "robust" and self.label_smoothing == 0:
            raise ValueError(
                "loss_type robust needs label_smoothing above 0: the share of pairs believed to be swapped"
            )
        if self.loss_type in ("ipo", "ipo_sum", "hinge") and self.label_smoothing:
            raise ValueError(f"label_smoothing means nothing for loss_type {self.loss_type}; set it to 0")
        if self.dtype == "float64" and self.load_in_4bit:
            raise ValueError(
                "dtype float64 with load_in_4bit: 4-bit weights are not computed in 64 bits; set one of them"
            )
        idle = [key for key in ("vram", "host", "offload", "stream") if getattr(self.memory, key) is not None]
        if self.engine != "fused" and idle:
            raise ValueError(
                f"memory.{idle[0]} means nothing to engine {self.engine}; only memory.keep and memory.micro_tokens do"
            )
        if not self.lora_target_modules:
            raise ValueError("lora_target_modules is empty; name modules, or take all-linear")
        if not self.dataset:
            raise ValueError("dataset is empty; give a hub id, a folder or a file")
        return self


# The published DPO QLoRA recipe, where it differs from SFT's.
DPO_DEFAULTS: dict[str, Any] = {
    "stage": "dpo",
    "dataset": {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"},
    "eval_dataset": {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "test_prefs"},
    "lora_r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "max_length": 1024,
    "batch_size": 16,
    "learning_rate": 5.0e-6,
    "optim": "paged_adamw_32bit",
}


@dataclass
class Loaded:
    """A resolved configuration, which keys somebody set, and what was said on the way.

    Attributes:
        config: the validated keys.
        given: the keys that the file or the command line set (the others are defaults).
        notes: one line for each key that was renamed or that changes nothing here.
        source: the YAML file, or None.
    """

    config: RunConfig
    given: set[str]
    notes: list[str] = field(default_factory=list)
    source: Path | None = None


def load_config(
    method: Method, file: str | None = None, overrides: list[str] | None = None, base: dict[str, Any] | None = None
) -> Loaded:
    """Resolve defaults, then ``base`` (inherited settings), then the YAML file, then the overrides.

    Args:
        method: which stage's defaults to start from.
        file: a YAML file or a shipped configuration's name.
        overrides: ``key=value``, ``nested.key=value``, ``--key value`` or ``--key=value`` words.
        base: settings inherited from the stage before; they do not count as given.

    Raises:
        UserError: a file that cannot be read, an unknown key, or a value that does not fit.
    """
    path = find_config(file) if file else None
    notes: list[str] = []
    given: dict[str, Any] = {}
    defaults = {**(DPO_DEFAULTS if method == "dpo" else {}), **(base or {})}
    if path is not None:
        given = rename(read_yaml(path), str(path), RunConfig.model_fields, notes)
        _no_stranger_held_out(set(given), given, notes)
        if given.get("stage") == ("dpo" if method == "sft" else "sft"):
            raise UserError(
                f"{path}: stage: {given['stage']}: this file is for zephyr-lite {given['stage']}, and not for {method}.",
                "Give the other command, or another file.",
            )
    words = _parse_overrides(overrides or [])
    said = rename(
        {key: value for key, value in words if "." not in key}, "the command line", RunConfig.model_fields, notes
    )
    nested = [word for word in words if "." in word[0]]
    _no_stranger_held_out({*said, *(key.removesuffix(".path") for key, _ in nested)}, said, notes)
    given.update(said)
    # a path begins a data set anew, so it comes before what is said about the data set, whatever the order of words
    for key, value in sorted(nested, key=lambda word: not word[0].endswith(".path")):
        _set_nested(given, key, value, defaults)
    values = {**defaults, **given}
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        keys = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
        typed = {*said, *(key.split(".")[0] for key, _ in nested)}
        # a rule over several keys belongs to no place: whoever typed one of those it names is told
        keys = keys or {key for key in typed if key in str(error)}
        by_words = path is None or (keys and keys <= typed)
        raise UserError(_explain(error, "the command line" if by_words else str(path), values)) from None
    typed = {*said, *(key.split(".")[0] for key, _ in nested)}
    for key, value in config.model_dump(mode="json").items():
        refuse_secrets({key: value}, "the command line" if path is None or key in typed else str(path))
    return Loaded(config, set(given), notes, path)


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to the same values."""
    return dump_yaml(config.model_dump(mode="json"))


def read_dumped(path: Path) -> dict[str, Any]:
    """The keys that ``dump_config`` wrote.

    Raises:
        UserError: the file is gone or broken.
    """
    return read_yaml(path)


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, str]] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if "=" in word:
            key, text = word.split("=", 1)
        elif word.startswith("--"):
            if position == len(words) or words[position].startswith("--"):
                raise UserError(f"{word} needs a value.", f"Write {word}=true, for instance.")
            key, text = word, words[position]
            position += 1
        elif word.endswith((".yaml", ".yml")):
            raise UserError(f"{short(word)} is neither key=value nor --key value.", f"Write --config {short(word)}.")
        else:
            raise UserError(
                f"{short(word)} is neither key=value nor --key value.",
                "No space stands around the =, and a value with spaces in it stands in quotes: system='Be brief.'",
            )
        pairs.append((key.lstrip("-").replace("-", "_"), text))
    result = []
    for key, text in pairs:
        if len(text) > WORD:
            raise UserError(
                f"the command line: {short(key)}: a value of {len(text):,} letters; at most {WORD:,} are read.",
                "Put it into a file, and name that with --config.",
            )
        value = read_word(text)
        if ALIASES.get(key, key) in _TEXTS and not isinstance(value, bool | str | None):
            value = text  # a folder called 2024, a revision called 0012345
        result.append((key, value))
    return result


def _no_stranger_held_out(keys: set[str], given: dict[str, Any], notes: list[str]) -> None:
    """Rows of one's own are not evaluated on the recipe's held-out ones, which would be fetched for it."""
    if "dataset" in keys and not any(key.startswith("eval_dataset") for key in keys):
        given["eval_dataset"] = None
        notes.append("no eval_dataset was named with this dataset, so nothing is held out")


def _set_nested(target: dict[str, Any], key: str, value: Any, defaults: dict[str, Any]) -> None:
    """``dataset.path=X`` reaches into one data set, ``dataset.columns.prompt=question`` into its map."""
    head, _, rest = key.partition(".")
    if head not in ("dataset", "eval_dataset", "memory"):
        raise UserError(f"the command line: {unknown_key(key, RunConfig.model_fields)}")
    current = target.get(head, defaults.get(head))
    if head not in target and head not in defaults and head != "memory":
        current = [spec.model_dump(exclude_defaults=True) for spec in RunConfig.model_fields[head].default]
    if isinstance(current, list):
        if len(current) > 1:
            raise UserError(f"the command line: {key}: {head} has {len(current)} entries; change them in the file.")
        current = current[0] if current else {}
    if isinstance(current, str):
        current = {"path": current} if head != "memory" else {}
    current = dict(current or {})
    if rest == "path":
        current = {"path": value}  # another path's split, limit and columns are not this one's
    elif rest.startswith("columns."):
        current["columns"] = {**current.get("columns", {}), rest.removeprefix("columns."): value}
    else:
        current[rest] = value
    target[head] = current


_TEXTS = {key for key, field in RunConfig.model_fields.items() if field.annotation in (str, str | None)}
# what pydantic says in its own terms
_PLAIN_WORDS = {
    "string_type": "Input should be a text; one that reads as something else stands in quotes, as in \"'2024'\"",
    "int_parsing": "Input should be a whole number, without a unit",
    "int_from_float": "Input should be a whole number",
    "bool_parsing": "Input should be true or false",
    "model_type": "Input should be a path, or keys and values such as {path: rows.jsonl, split: train}",
}


def _explain(error: ValidationError, where: str, values: dict[str, Any]) -> str:
    lines = []
    for item in error.errors():
        parts = [part for part in item["loc"] if not (isinstance(part, str) and "[" in part)]
        several = values.get(str(parts[0])) if parts else None
        if parts[1:2] == [0] and not (isinstance(several, list) and len(several) > 1):
            del parts[1]  # the only entry of a list, which perhaps nobody wrote as one
        place = ".".join(map(str, parts))
        message = _PLAIN_WORDS.get(item["type"], item["msg"].removeprefix("Value error, "))
        if place in ("memory.vram", "memory.host"):
            message = "Input should be a size with its unit, such as 8GiB"
        elif place == "memory":
            message = "Input should be auto, or some of its keys: memory.vram=8GiB, in a file {vram: 8GiB}"
        if item["type"] == "extra_forbidden":
            inner = MemorySpec if parts[0] == "memory" else DatasetSpec
            known = (
                RunConfig.model_fields
                if len(parts) == 1
                else [".".join(map(str, [*parts[:-1], key])) for key in inner.model_fields]
            )
            lines.append(unknown_key(place, known))
        else:
            found = "" if item["type"] == "missing" or not place else f" (found {short(item['input'])})"
            lines.append(f"{place + ': ' if place else ''}{message}{found}.")
    return f"{where}: " + "\n".join(dict.fromkeys(lines))
