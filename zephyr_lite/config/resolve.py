"""The configuration of a stage on top of what is on disk: the newest run, the stage below, the place of ``sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..io.run_dir import StageDir, newest_run
from .load import NOT_HELD_OUT, Loaded, Method, load_config
from .schema import DPO_DATA, SFT_DATA, RunConfig
from .strict_yaml import read_yaml

# keys that a stage takes from the one below it, unless the user set them
INHERITED = (
    "model_name_or_path",
    "model_revision",
    "load_in_4bit",
    "bnb_4bit_use_double_quant",
    "dtype",
    "system",
    "sync",
)
# keys that the rows decide where a user's own data is trained on without a configuration file
AUTOMATIC = {
    "val_size",
    "batch_size",
    "max_length",
    "num_train_epochs",
    "learning_rate",
    "warmup_ratio",
    "eval_steps",
    "save_steps",
}


def resolve_run(
    method: Method,
    file: str | None,
    overrides: list[str],
    *,
    loaded: Loaded | None = None,
    runs_root: Path | None = Path("runs"),
    fetch: bool = False,
) -> Loaded:
    """The configuration of a stage: the recipe's where no file is named, on top of the stage before.

    ``dpo`` without an output_dir continues the newest run whose stage ``sft`` is complete.

    Args:
        file: of the configuration.
        overrides: ``key=value`` words.
        loaded: what ``load_config`` made of these, if it was called before; it is changed.
        runs_root: the folder of the runs; None: only a run that the file or the words name is looked at.
        fetch: first copy what ``sync`` has of the run (see ``sync.restore``).
    """
    loaded = loaded or load_config(method, file or f"zephyr-7b/{method}", overrides)
    if file is None and not {spec.path for spec in loaded.config.dataset} & {SFT_DATA, DPO_DATA}:
        loaded.automatic = AUTOMATIC - loaded.typed
        if "eval_dataset" in loaded.typed or any(spec.test_size for spec in loaded.config.dataset):
            loaded.automatic.discard("val_size")
        elif "val_size" in loaded.automatic:
            _set(loaded, val_size="auto")
            loaded.notes.remove(NOT_HELD_OUT)
    if method == "dpo" and "output_dir" not in loaded.given and runs_root is not None:
        run = newest_run(runs_root, stage="sft", option="output_dir=")
        if run is None and fetch and loaded.config.sync is not None:
            from ..io.sync import newest_there

            name = newest_there(loaded.config.sync, runs_root)
            run = runs_root / name if name else None
            if run is not None:
                loaded.notes.append(f"continuing {run}, the newest run in {loaded.config.sync}")
        if run is not None:
            _set(loaded, output_dir=str(run))
            loaded.given.add("output_dir")
    if fetch and loaded.config.sync is not None:
        from ..io.sync import restore

        restore(loaded.config.sync, StageDir(Path(loaded.config.output_dir) / loaded.config.stage))
    if method == "sft" or loaded.config.adapters != []:
        return loaded
    below = StageDir(Path(loaded.config.output_dir) / "sft")
    if "output_dir" in loaded.given and below.complete():
        inherited = read_yaml(below.config)  # the defaults would be another base
        # without a file the recipe's values are no choice of the user
        own = loaded.given if file else loaded.typed
        _set(loaded, **{key: inherited[key] for key in INHERITED if key in inherited and key not in own})
    elif file or "model_name_or_path" in loaded.typed:
        _adapter_as_model(loaded)
        if loaded.tool and "model_name_or_path" in loaded.given and loaded.config.adapters == []:
            _set(loaded, adapters="none")
            loaded.notes.append(
                f"adapters: none, as with {loaded.tool} the stage begins from the model itself; name an SFT adapter to begin "
                "from that"
            )
    return loaded


def _set(loaded: Loaded, **values: Any) -> None:
    loaded.config = RunConfig.model_validate({**loaded.config.model_dump(), **values})


def _adapter_as_model(loaded: Loaded) -> None:
    """A model that is an adapter, as in the handbook's QLoRA recipes, becomes ``adapters`` on its base."""
    name = loaded.config.model_name_or_path
    try:
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    except ValueError:  # PEFT's error for what is no adapter, or cannot be reached
        return
    if base is not None and loaded.config.model_revision == "main":  # a revision would be the adapter's
        _set(loaded, model_name_or_path=base, adapters=[name])
        loaded.notes.append(f"{name} is an adapter: it is in adapters, and model_name_or_path is its base, {base}")
