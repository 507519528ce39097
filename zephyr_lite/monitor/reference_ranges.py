"""Results of published runs of the recipe, and the check that a run is comparable.

From the model cards of public runs of the QLoRA recipe (zephyr-7b-sft-qlora and zephyr-7b-dpo-qlora of the alignment
handbook, and reruns of them on the hub):

* SFT, loss over all tokens, on ``test_sft``: held-out loss 0.944 to 0.952 over six runs.
* DPO, 16 pairs a step, on the 2,000 pairs of ``test_prefs``: loss 0.475 to 0.490, accuracy 0.74 to 0.755, margin
  1.09 to 1.30 (in units of β 0.01); training loss around step 100: 0.681 to 0.688.

The default SFT recipe here has only the assistant's tokens in its loss, so it is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..train.stage import Stage

Range = tuple[float, float]
BASE = "mistralai/Mistral-7B-v0.1"
_SHARED = {
    "model_name_or_path": BASE,
    "load_in_4bit": True,
    "lora_target_modules": "all-linear",
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1.0,
    "max_steps": None,
}
_SFT = {
    **_SHARED,
    "loss_on": "all",
    "max_length": 2048,
    "batch_size": 8,
    "learning_rate": 2e-4,
    "lora_r": 16,
    "lora_alpha": 16.0,
}
_DPO = {
    **_SHARED,
    "loss_type": "sigmoid",
    "label_smoothing": 0.0,
    "beta": 0.01,
    "max_length": 1024,
    "max_prompt_length": 512,
    "batch_size": 16,
    "learning_rate": 5e-6,
    "lora_r": 128,
    "lora_alpha": 128.0,
    "lora_dropout": 0.0,
}


@dataclass(frozen=True)
class Published:
    """Final held-out metrics of published runs, and ``at_100``, their training loss around step 100."""

    loss: Range
    accuracy: Range | None = None
    margin: Range | None = None
    at_100: Range | None = None


SFT = Published(loss=(0.944, 0.952))
DPO = Published(loss=(0.475, 0.490), accuracy=(0.74, 0.755), margin=(1.09, 1.30), at_100=(0.681, 0.688))


def published_of(stage: Stage) -> Published | None:
    """The results to compare a stage with; None if base, data, held-out data or a relevant key differs."""
    config = stage.config
    keys = _SFT if stage.method == "sft" else _DPO
    if any(getattr(config, name) != value for name, value in keys.items()):
        return None
    if stage.method == "sft":
        same = _whole(config.dataset, "ultrachat_200k", "train_sft")
        same = same and _whole(config.eval_dataset, "ultrachat_200k", "test_sft") and not stage.frozen
        return SFT if same else None
    same = _whole(config.dataset, "ultrafeedback_binarized", "train_prefs")
    same = same and _whole(config.eval_dataset, "ultrafeedback_binarized", "test_prefs") and len(stage.frozen) == 1
    return DPO if same else None


def _whole(specs: Any, name: str, split: str) -> bool:
    """Whether the specs are exactly this split of the data set."""
    return (
        len(specs or []) == 1
        and specs[0].path == f"HuggingFaceH4/{name}"
        and specs[0].split == split
        and specs[0].limit is None
        and specs[0].test_size is None
    )
