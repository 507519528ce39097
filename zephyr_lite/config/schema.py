"""The schema of a run: every key with its type, its default, its limits, and what it means.

The descriptions are the only ones: ``docs/configuration.md`` is made of them (``config_doc``). They are Markdown.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..io.reading import place


class DatasetSpec(BaseModel):
    """Where rows come from: a hub id, a local folder in the hub's layout, or a file (JSONL, JSON, CSV, Parquet)."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="a hub id, a folder in the hub's layout, or a JSONL, JSON, CSV or Parquet file")
    name: str | None = Field(None, description="the hub's configuration of the data set, where it has several")
    split: str | None = Field(None, description="the split, where there are several")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub's repository")
    weight: float = Field(
        1.0, gt=0, le=1000, description="share in a mixture: 0.5 takes half of the rows, 2 takes each twice"
    )
    limit: int | None = Field(None, ge=1, lt=2**63, description="so many rows, drawn with the seed")
    columns: dict[str, str] | list[str] = Field(
        {}, description="columns of other names: {ours: theirs}; or a list: no others are read"
    )
    test_size: float | None = Field(
        None, gt=0, lt=2**31, description="rows that are held out: so many, or a share below 1; the same for every seed"
    )
    part: Literal["train", "test"] = Field(
        "train", description="with test_size: train leaves the held-out rows out, test reads only them"
    )

    @field_validator("path")
    @classmethod
    def _is_a_place(cls, value: str) -> str:
        return place(value)


class MemorySpec(BaseModel):
    """What the planner would otherwise decide by itself."""

    model_config = ConfigDict(extra="forbid")

    keep: Literal["input", "attention", "all"] | None = Field(
        None, description="what each layer keeps for its backward pass; the rest is computed again"
    )
    micro_tokens: int | None = Field(None, ge=1, lt=2**31, description="tokens that run at once, at most")
    vram: str | None = Field(None, description="use so much of the card at most: 8GiB")
    host: str | None = Field(
        None, description="lock so much of the main memory at most, for what is offloaded or streamed: 16GiB"
    )
    offload: bool | None = Field(None, description="whether what layers keep lies in main memory between the passes")
    stream: bool | None = Field(
        None, description="whether the base's layers lie in main memory and come to the card one ahead"
    )


class RunConfig(BaseModel):
    """The keys of one stage. Defaults are the published recipe's; ``dpo`` changes some (see ``DPO_DEFAULTS``)."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

    # what is trained, and where it goes
    model_name_or_path: str = Field("mistralai/Mistral-7B-v0.1", description="the base: a hub id or a folder")
    model_revision: str = Field("main", description="a branch, tag or commit of the hub's repository")
    output_dir: str = Field(
        "runs/zephyr-7b", description="the run's folder; dpo: the newest run whose stage sft is complete, unless named"
    )
    stage: str = Field("sft", description="the stage's folder in it, any word")
    engine: Literal["fused", "trl", "unsloth"] = Field(
        "fused",
        description="`fused` is this project's; `trl` TRL's own trainers; `unsloth` Unsloth's kernels under them",
    )
    seed: int = Field(42, ge=0, lt=2**31, description="of the rows' order, the adapter's first values and dropout")
    # rows
    dataset: list[DatasetSpec] = Field(
        [DatasetSpec(path="HuggingFaceH4/ultrachat_200k", split="train_sft")],
        description="a path, or the keys [of a data set](#a-data-set); or a list of these, which is a mixture",
    )
    eval_dataset: list[DatasetSpec] = Field(
        [DatasetSpec(path="HuggingFaceH4/ultrachat_200k", split="test_sft")],
        description="what is held out, written as `dataset` is; null: nothing. Another `dataset` alone sets it to null",
    )
    chat_template: str = Field(
        "auto",
        description="auto (the base's own, Zephyr's where it has none; dpo: the one below), zephyr, chatml, llama3, or a "
        ".jinja file",
    )
    system: str | None = Field(None, description="a system turn for rows that have none")
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="sft: the tokens that are learned: the assistant's turns, the last one only, or all (as the "
        "published recipe)",
    )
    max_length: int = Field(
        2048, ge=2, le=2**24, description="tokens; sft: of a packed row; dpo: of prompt + one response"
    )
    max_prompt_length: int = Field(
        512, ge=1, le=2**24, description="dpo: a prompt that must be cut is cut to so many tokens, on its left"
    )
    # the base and what stands on it
    adapters: list[str] | Literal["none"] = Field(
        [],
        description="frozen adapters below the one that is trained, from the bottom up: folders or hub ids; dpo: [] is "
        "the run's stage sft, `none` the bare base",
    )
    load_in_4bit: bool = Field(True, description="the base in NF4; false: in 16 or 32 bits")
    bnb_4bit_use_double_quant: bool = Field(True, description="NF4's scales in 8 bits")
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] = Field(
        "auto",
        description="of the computation; auto: bfloat16 from compute capability 8.0, float16 below, float32 on a CPU",
    )
    lora_r: int = Field(16, ge=1, le=2**16, description="the adapter's rank")
    lora_alpha: float = Field(16, gt=0, le=2**20, description="the adapter's scale is lora_alpha / lora_r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="on the adapter's input")
    lora_target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="what gets an adapter: all seven projections of a layer, or a list: [q_proj, v_proj]"
    )
    # optimization
    batch_size: int = Field(
        8,
        ge=1,
        le=2**20,
        description="packed rows (sft) or pairs (dpo) in one optimizer step; how many run at once is planned",
    )
    num_train_epochs: float = Field(
        1, gt=0, le=10**6, description="how often every row is seen; 0.5: half of the rows, once"
    )
    max_steps: int | None = Field(None, ge=1, lt=2**31, description="so many optimizer steps, instead of epochs")
    learning_rate: float = Field(2.0e-4, gt=0, le=1000, description="after the warm-up")
    lr_scheduler_type: str = Field(
        "cosine",
        description="also linear, constant, constant_with_warmup, cosine_with_restarts, polynomial, inverse_sqrt",
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="the share of the steps in which the learning rate rises")
    warmup_steps: int | None = Field(
        None, ge=1, lt=2**31, description="the number of these steps, instead of their share"
    )
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw_torch", description="8bit: its state in a quarter of the room; paged: it may move to main memory"
    )
    weight_decay: float = Field(0.0, ge=0, le=1000, description="AdamW's")
    max_grad_norm: float = Field(1.0, gt=0, description="a longer gradient is scaled to this length")
    # preference optimization
    beta: float = Field(0.01, gt=0, le=1000, description="dpo: the price of leaving the reference")
    loss_type: Literal["sigmoid", "ipo", "ipo_sum", "hinge", "robust"] = Field(
        "sigmoid",
        description="dpo: sigmoid is DPO's own; ipo takes the mean over tokens, as TRL does, ipo_sum the sum, as its paper",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: the share of pairs that are taken to be swapped"
    )
    precompute_ref_log_probs: bool = Field(
        False, description="dpo: compute the reference once, before the first step, and keep it on disk"
    )
    # evaluation, checkpoints, trackers
    eval_steps: int | None = Field(
        100, ge=1, lt=2**31, description="evaluate every so many steps, and at the end; null: at the end only"
    )
    save_steps: int | None = Field(
        100, ge=1, lt=2**31, description="a checkpoint every so many steps; null: at the end only"
    )
    logging_steps: int = Field(1, ge=1, lt=2**31, description="a line of metrics.jsonl every so many steps")
    save_total_limit: int = Field(
        2, ge=1, lt=2**31, description="checkpoints that stay; the best and the last are never among the deleted"
    )
    load_best_model_at_end: bool = Field(
        False, description="the finished adapter is the one of the lowest held-out loss, instead of the last"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, lt=2**31, description="stop after so many evaluations without a new best"
    )
    samples: int = Field(
        1,
        ge=0,
        le=64,
        description="held-out prompts that the model answers at the start and at every evaluation, for the console and the "
        "report",
    )
    sample_tokens: int = Field(64, ge=1, le=2**20, description="how long such an answer may get")
    report_to: list[str] = Field(
        [], description="trackers: tensorboard, wandb, trackio and the others that transformers knows"
    )
    push_to_hub: str | None = Field(None, description="OWNER/NAME: upload the finished adapter")
    hub_private_repo: bool = Field(False, description="a repository that push_to_hub makes is private")
    sync: str | None = Field(
        None,
        description="a folder, or hub:OWNER/NAME, that complete checkpoints are copied to; another machine goes on from "
        "there",
    )
    memory: MemorySpec = Field(
        MemorySpec(),
        description="auto: the plan decides; or any of [these keys](#memory), and the plan decides the rest",
    )

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

# the first key of each part of the schema → what the part is called
PARTS = {
    "model_name_or_path": "What is trained, and where it goes",
    "dataset": "Rows",
    "adapters": "The base, and what stands on it",
    "batch_size": "Optimization",
    "beta": "Preference optimization (dpo)",
    "eval_steps": "Evaluation, checkpoints, trackers, memory",
}
