"""``push_to_hub``: the finished adapter in a repository of the hub."""

from __future__ import annotations

import logging
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.load import RunConfig
from ..errors import UserError
from ..io.run_dir import StageDir

logger = logging.getLogger(__name__)


def check_repo_name(config: RunConfig) -> None:
    """Refuse a repository name that the hub does not allow, before anything is trained."""
    if config.push_to_hub:
        try:
            validate_repo_id(config.push_to_hub)
        except HFValidationError as error:
            raise UserError(f"push_to_hub {config.push_to_hub}: {error}", "Set push_to_hub=OWNER/NAME.") from None


def push_adapter(config: RunConfig, stage: StageDir, info: dict[str, Any]) -> None:
    """Upload ``adapter/`` of a complete stage, unless this adapter was pushed there before.

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
