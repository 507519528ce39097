"""The schema of a run: every key with its type, default, limits and description.

``keys`` makes docs/configuration.md and ``zephyr-lite keys`` of the descriptions, which are Markdown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..io.text import counted, place

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
# the rows of the recipe
SFT_DATA = "HuggingFaceH4/ultrachat_200k"
DPO_DATA = "HuggingFaceH4/ultrafeedback_binarized"
# losses of preference pairs (``train.losses``), and of these the ones that read the policy alone and that read label_smoothing
_Compared = Literal["sigmoid", "ipo", "ipo_sum", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down", "bco_pair"]
_ReferenceFree = Literal["simpo", "orpo", "sft"]
PairLoss = Literal[_Compared, _ReferenceFree]
REFERENCE_FREE = set(get_args(_ReferenceFree))
SMOOTHED = {"sigmoid", "robust"}
# keys that only one stage reads
OWN_KEYS = {
    "sft": ("neftune_noise_alpha",),
    "dpo": (
        *("beta", "loss_type", "loss_weights", "label_smoothing", "simpo_gamma"),
        *("desirable_weight", "undesirable_weight", "precompute_ref_log_probs"),
    ),
}
Place = Annotated[str, AfterValidator(place)]  # a path or a hub id
# rows to hold out
ValSize = Annotated[float, Field(ge=0, lt=2**31)] | Literal["auto"]


class DatasetSpec(BaseModel):
    """A source of rows: a hub id, a local folder in the hub's layout, or a file (JSONL, JSON, CSV, Parquet)."""

    model_config = ConfigDict(extra="forbid")

    path: Place = Field(description="a hub id, a folder in the hub's layout, or a JSONL, JSON, CSV or Parquet file")
    name: str | None = Field(None, description="the configuration of a hub data set that has several")
    split: str | None = Field(None, description="the split, if there are several")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub's repository")
    weight: float = Field(
        1.0, gt=0, le=1000, description="share in a mixture: 0.5 takes half of the rows, 2 takes each twice"
    )
    limit: int | None = Field(None, ge=1, lt=2**63, description="at most this many rows, drawn with the seed")
    columns: dict[str, str] | list[str] = Field(
        {}, description="columns with other names: {ours: theirs}; or a list of the only columns to read"
    )
    test_size: float | None = Field(
        None, gt=0, lt=2**31, description="rows to hold out: a number, or a share below 1; the same rows for every seed"
    )
    part: Literal["train", "test"] = Field(
        "train", description="with test_size: train reads all other rows, test only the held-out ones"
    )
    val_size: ValSize | None = Field(
        None, description="set by the key val_size of the run, which part belongs to as well"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class MemorySpec(BaseModel):
    """Limits and choices that the planner makes by itself otherwise."""

    model_config = ConfigDict(extra="forbid")

    keep: Literal["input", "attention", "all"] | None = Field(
        None, description="activations that each layer keeps for its backward pass; the others are recomputed"
    )
    micro_tokens: int | None = Field(None, ge=1, lt=2**31, description="the most tokens in a micro-batch")
    vram: str | None = Field(None, description="the most GPU memory to use: 8GiB")
    host: str | None = Field(None, description="the most RAM to pin for offloading and streaming: 16GiB")
    offload: bool | None = Field(None, description="offload kept activations to RAM between the two passes")
    stream: bool | None = Field(
        None, description="keep the base's layers in RAM and copy each to the GPU just before it runs"
    )
    compute: Literal["auto", "16bit", "int8"] = Field(
        "auto",
        description="products with a 4-bit base: 16bit is the compute dtype; int8 is faster on cards by estimate, and "
        "[rounds more](numerics.md#int8); auto is 16bit",
    )

    @property
    def int8(self) -> bool:
        """``auto`` is 16bit until int8 has been measured on a card."""
        return self.compute == "int8"


class RunConfig(BaseModel):
    """The keys of one stage. Defaults are the published recipe's; ``dpo`` has some of its own (``DPO_DEFAULTS``)."""

    model_config = ConfigDict(extra="forbid", validate_default=False, allow_inf_nan=False)

    # the model and its folder
    model_name_or_path: Place = Field("mistralai/Mistral-7B-v0.1", description="the base: a hub id or a folder")
    model_revision: Place = Field("main", description="a branch, tag or commit of the hub's repository")
    output_dir: Place = Field(
        "runs/zephyr-7b", description="the run's folder; dpo: by default the newest run with a complete stage sft"
    )
    stage: str = Field(
        "sft",
        pattern=r"^[\w-]+$",
        description="the stage's name, one word, and its folder's in `output_dir`; in LLaMA-Factory's files the method: sft, "
        "dpo or kto",
    )
    engine: Literal["fused", "trl", "unsloth"] = Field(
        "fused",
        description="`fused` is this project's; `trl` TRL's own trainers; `unsloth` Unsloth's kernels under them",
    )
    seed: int = Field(
        42, ge=0, lt=2**31, description="random seed of the order of rows, the adapter's initial values and dropout"
    )
    # rows
    dataset: list[DatasetSpec] = Field(
        [DatasetSpec(path=SFT_DATA, split="train_sft")],
        description="a path, or the keys [of a data set](#a-data-set); or a list of these, which is a mixture",
    )
    eval_dataset: list[DatasetSpec] = Field(
        [DatasetSpec(path=SFT_DATA, split="test_sft")],
        description="held-out rows, written as `dataset` is; null: none. Setting `dataset` alone sets it to null",
    )
    val_size: ValSize = Field(
        0.0,
        description="rows of `dataset` to hold out where there is no eval_dataset: a share below 1, a number, 0 for none, or "
        "auto: 5 %, from 5 to 300 rows, at most a fifth. Equal rows, and pairs with one prompt, are never on both sides. auto "
        "is set for your own data without a configuration file",
    )
    chat_template: str = Field(
        "auto",
        description="auto (the base's own, or Zephyr's if it has none; dpo: that of the SFT adapter), zephyr, chatml, llama3, "
        "or a .jinja file",
    )
    system: str | None = Field(None, description="a system turn for rows without one")
    loss_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="sft: the tokens with a loss: the assistant's turns, the last of them only, or all (as in the "
        "published recipe)",
    )
    max_length: int = Field(
        2048, ge=2, le=2**24, description="tokens; sft: of a packed row; dpo: of prompt + one response"
    )
    max_prompt_length: int = Field(
        512, ge=1, le=2**24, description="dpo: the tokens that a prompt is cut to, on its left, if a pair is too long"
    )
    # the base and its adapters
    adapters: list[Place] | Literal["none"] = Field(
        [],
        description="frozen adapters below the trained one, from the bottom up: folders or hub ids; dpo: [] is the run's "
        "stage sft, `none` the bare base",
    )
    load_in_4bit: bool = Field(True, description="the base in NF4; false: in 16 or 32 bits")
    bnb_4bit_use_double_quant: bool = Field(True, description="NF4's scales in 8 bits")
    dtype: Dtype = Field(
        "auto",
        description="the compute dtype; auto: bfloat16 from compute capability 8.0, float16 below, float32 on a CPU",
    )
    lora_r: int = Field(16, ge=1, le=2**16, description="the adapter's rank")
    lora_alpha: float = Field(16, gt=0, le=2**20, description="the adapter's scale is lora_alpha / lora_r")
    use_rslora: bool = Field(False, description="rsLoRA: the adapter's scale is lora_alpha / √lora_r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout on the adapter's input")
    lora_target_modules: list[Annotated[str, Field(pattern=r"^[\w.]+$")]] | Literal["all-linear"] = Field(
        "all-linear",
        description="modules with an adapter: all projections of a layer, or a list: [q_proj, v_proj]",
    )
    # optimization
    batch_size: int = Field(
        8,
        ge=1,
        le=2**20,
        description="packed rows (sft) or pairs (dpo) in one optimizer step; the micro-batch size is chosen automatically",
    )
    num_train_epochs: float = Field(1, gt=0, le=10**6, description="passes over the rows; 0.5: half of the rows, once")
    max_steps: int | None = Field(None, ge=1, lt=2**31, description="the number of optimizer steps, instead of epochs")
    learning_rate: float = Field(2.0e-4, gt=0, le=1000, description="the highest one, reached after the warm-up")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: the learning rate of the adapter's B is learning_rate times this, such as 16"
    )
    lr_scheduler_type: str = Field(
        "cosine",
        description="also linear, constant, constant_with_warmup, cosine_with_restarts, cosine_with_min_lr, polynomial, "
        "inverse_sqrt",
    )
    lr_scheduler_kwargs: dict[str, Annotated[float | str, Field(union_mode="left_to_right")]] = Field(
        {}, description="options of the schedule: {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="the share of steps with a rising learning rate")
    warmup_steps: int | None = Field(None, ge=1, lt=2**31, description="their number, instead of their share")
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        "adamw_torch", description="8bit: a quarter of the optimizer's memory; paged: it may move to RAM"
    )
    weight_decay: float = Field(0.0, ge=0, le=1000, description="of AdamW")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the mean of the gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's decay of the mean of their squares")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: float = Field(
        1.0, ge=0, description="the norm that larger gradients are scaled to; 0: they are not scaled"
    )
    neftune_noise_alpha: float | None = Field(
        None,
        ge=0,
        description="sft: NEFTune: uniform noise on the embeddings in training, at most alpha / √(tokens of the example × "
        "hidden size); null: none",
    )
    # preference optimization
    beta: float = Field(
        0.01,
        gt=0,
        le=1000,
        description="dpo: KL strength; higher stays closer to the reference. By default 2 with simpo, 0.1 with orpo and kto",
    )
    loss_type: PairLoss | Annotated[list[PairLoss], Field(min_length=1)] | Literal["kto"] = Field(
        "sigmoid",
        description="dpo: [a loss](recipe.md#losses), or a list of several, which are added; sigmoid is DPO's own; sft (in a "
        "list only) is the chosen response's negative log-likelihood; kto (never in a list) also learns from single answers "
        "with a label",
    )
    loss_weights: list[Annotated[float, Field(gt=0, le=1000)]] | None = Field(
        None, description="dpo: the weight of each loss of the list; null: 1 each"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: the share of pairs assumed to be swapped")
    simpo_gamma: float = Field(1.0, ge=0, le=1000, description="dpo: the margin that simpo aims at")
    desirable_weight: float = Field(1.0, gt=0, le=1000, description="kto: the weight of answers with label true")
    undesirable_weight: float = Field(1.0, gt=0, le=1000, description="kto: the weight of answers with label false")
    precompute_ref_log_probs: bool | Literal["auto"] = Field(
        "auto",
        description="dpo: compute the reference once, before the first step, and cache it on disk; auto: where that makes the run "
        "shorter by the plan (with more than one epoch it does)",
    )
    # evaluation, checkpoints, trackers
    eval_steps: int | None = Field(100, ge=1, lt=2**31, description="steps between evaluations; null: at the end only")
    save_steps: int | None = Field(100, ge=1, lt=2**31, description="steps between checkpoints; null: at the end only")
    logging_steps: int = Field(1, ge=1, lt=2**31, description="steps between lines of metrics.jsonl")
    save_total_limit: int = Field(
        2, ge=1, lt=2**31, description="checkpoints to keep; the best and the last are always kept"
    )
    load_best_model_at_end: bool = Field(
        False, description="save the adapter with the lowest held-out loss, instead of the last one"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, lt=2**31, description="stop after this many evaluations without a new best"
    )
    samples: int = Field(
        1,
        ge=0,
        le=64,
        description="held-out prompts to answer at the start and at every evaluation, for the console and the report",
    )
    sample_tokens: int = Field(64, ge=1, le=2**20, description="the most tokens in such an answer")
    report_to: list[str] = Field([], description="trackers: tensorboard, wandb, trackio and the others of transformers")
    push_to_hub: Place | None = Field(None, description="OWNER/NAME: upload the finished adapter")
    hub_private_repo: bool = Field(False, description="make the repository of push_to_hub private")
    sync: Place | None = Field(
        None,
        description="a folder, or hub:OWNER/NAME, to copy complete checkpoints to; another machine can resume from it",
    )
    memory: MemorySpec = Field(
        MemorySpec(),
        description="auto: the plan decides; or any of [these keys](#memory), and the plan decides the rest",
    )

    @property
    def losses(self) -> dict[str, float]:
        """The losses of dpo with their weights."""
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        return dict(zip(names, self.loss_weights or [1.0] * len(names)))

    @property
    def needs_reference(self) -> bool:
        """Whether a loss of dpo compares the policy with the reference."""
        return not self.losses.keys() <= REFERENCE_FREE

    @field_validator("dataset", "eval_dataset", "adapters", "lora_target_modules", "report_to", mode="before")
    @classmethod
    def _listed(cls, value: Any, info: ValidationInfo) -> Any:
        """One entry in place of a list, and null in place of an empty one."""
        if value is None:
            return []
        is_word = (info.field_name, value) in (("adapters", "none"), ("lora_target_modules", "all-linear"))
        return value if is_word or isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _together(self) -> RunConfig:
        names = [self.loss_type] if isinstance(self.loss_type, str) else self.loss_type
        losses, loss = self.losses, " + ".join(names)
        planned = [key for key in ("vram", "host", "offload", "stream") if getattr(self.memory, key) is not None]
        not_fused = f"engine {self.engine}" if self.engine != "fused" else ""
        size = self.val_size or None
        named = [spec for spec in self.eval_dataset if spec.val_size is None]
        for is_wrong, what in (
            (len(set(names)) < len(names), "loss_type: expected a loss, or several different ones"),
            (
                len(self.loss_weights or names) != len(names),
                f"loss_weights: expected {counted(len(names), 'number')}, one for each loss of loss_type",
            ),
            (
                "robust" in losses and self.label_smoothing == 0,
                "loss_type robust needs label_smoothing above 0: the share of pairs assumed to be swapped",
            ),
            (
                self.label_smoothing and not losses.keys() & SMOOTHED,
                f"label_smoothing has no effect on loss_type {loss}; set it to 0",
            ),
            (
                self.precompute_ref_log_probs is True and not self.needs_reference,
                f"precompute_ref_log_probs has no effect on loss_type {loss}, which has no reference",
            ),
            (
                self.dtype == "float64" and self.load_in_4bit,
                "dtype float64 with load_in_4bit: 4-bit weights are not computed in 64 bits; set one of them",
            ),
            (
                not_fused and planned,
                f"no effect with {not_fused}: memory.{', memory.'.join(planned)}; only memory.keep and "
                "memory.micro_tokens have one",
            ),
            (
                self.memory.int8 and (not_fused or not self.load_in_4bit),
                f"memory.compute int8 is for engine fused and a 4-bit base, not for {not_fused or 'load_in_4bit false'}; "
                "set it to 16bit",
            ),
            (not self.lora_target_modules, "lora_target_modules is empty; name modules, or set all-linear"),
            (not self.dataset, "dataset is empty; give a hub id, a folder or a file"),
            (
                size and (named or any(spec.test_size for spec in self.dataset)),
                "val_size does not go together with eval_dataset or test_size; set one of them",
            ),
        ):
            if is_wrong:
                raise ValueError(what)
        if size or len(named) < len(self.eval_dataset):  # the specs follow from val_size
            own = {"val_size": size, **({"part": "train"} if size else {})}
            self.dataset = [spec.model_copy(update=own) for spec in self.dataset]
            held_out = self.eval_dataset or self.dataset
            rest = {"val_size": size, "part": "test"}
            self.eval_dataset = [spec.model_copy(update=rest) for spec in held_out] if size else named
        return self

    def row_kind(self, method: Literal["sft", "dpo"]) -> Literal["sft", "dpo", "kto"]:
        """The kind of rows that a stage reads: kto's are labelled answers or pairs."""
        return "kto" if method == "dpo" and self.loss_type == "kto" else method


# differences of the published DPO QLoRA recipe from the SFT recipe
DPO_DEFAULTS: dict[str, Any] = {
    "stage": "dpo",
    "dataset": {"path": DPO_DATA, "split": "train_prefs"},
    "eval_dataset": {"path": DPO_DATA, "split": "test_prefs"},
    "lora_r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "max_length": 1024,
    "batch_size": 16,
    "learning_rate": 5.0e-6,
    "optim": "paged_adamw_32bit",
}
# and what some losses need instead, by default: SimPO's values for Mistral (its README), its rate being about DPO's; ORPO's
# (Mistral-ORPO-β), its rate times ten for LoRA; KTO's paper's
LOSS_DEFAULTS: dict[str, dict[str, Any]] = {
    "simpo": {"beta": 2.0},
    "orpo": {"beta": 0.1, "learning_rate": 5.0e-5},
    "kto": {"beta": 0.1},
}
