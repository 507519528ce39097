"""What a finished stage leaves: its adapter, and the repository of ``push_to_hub``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi

from ..config.load import RunConfig
from ..errors import UserError
from ..io.run_dir import StageDir, folder_aside
from ..memory.machine import peak_memory
from ..model.compose import compose
from ..model.peft_io import LoraWeights, adapter_sha256, read_adapter, write_adapter
from ..model.tokenizer import save_tokenizer
from .resume import now
from .stage import Outcome, Stage

logger = logging.getLogger(__name__)


def save_stage(stage: Stage, outcome: Outcome, *, own: dict[str, LoraWeights] | None = None) -> None:
    """Write what people load: the stage's own adapter, the whole chain as one, the tokenizer; then mark it complete.

    Args:
        own: the trained adapter's weights, where another engine holds them; None: the stack's.
    """
    own = stage.stack.weights(stage.config.stage) if own is None else own
    options: dict[str, Any] = {
        "base_model_name": stage.config.model_name_or_path,
        "extra_config": {"revision": stage.config.model_revision},
    }
    chain: Mapping[str, LoraWeights] = own
    if stage.frozen:
        write_adapter(stage.dir.delta, own, **options)
        chain = compose([*stage.frozen, read_adapter(stage.dir.delta)])
    with folder_aside(stage.dir.adapter) as folder:
        write_adapter(folder, chain, **options)
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
        finished=now(),
    )
    stage.dir.write_info(stage.info)
    logger.info(f"{stage.dir.adapter} holds the adapter" + (" (the whole chain in one)" if stage.frozen else ""))
    push_adapter(stage.config, stage.dir, stage.info)


def push_adapter(config: RunConfig, stage: StageDir, info: dict[str, Any]) -> None:
    """``push_to_hub``: upload ``adapter/`` of a complete stage, unless this adapter was pushed there before.

    Args:
        info: the stage's stage.json, which records where it was pushed to.

    Raises:
        UserError: the upload failed; the stage stays complete, and the same command tries again.
    """
    pushed = {"repo": config.push_to_hub, "sha256": info.get("adapter_sha256")}
    if not config.push_to_hub or info.get("pushed") == pushed:
        return
    from httpx2 import HTTPError  # only an upload needs it

    api = HfApi()
    try:
        # a name without its owner, as in the handbook's recipes, is completed by the hub
        repo = api.create_repo(config.push_to_hub, private=config.hub_private_repo or None, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=stage.adapter)
    except (HTTPError, OSError, ValueError) as error:  # the hub's own errors are kinds of these
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub {config.push_to_hub}: {what}",
            f"The stage is complete, and its adapter is in {stage.adapter}. Log in (hf auth login) or check the connection; "
            "the same command then pushes it.",
        ) from None
    info["pushed"] = pushed
    stage.write_info(info)
    logger.info(f"pushed to {config.push_to_hub}")
