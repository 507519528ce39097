"""``push_to_hub``: the finished adapter in a repository of the hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..config.load import RunConfig
from ..errors import UserError
from ..io.run_dir import StageDir


def check_repo_name(config: RunConfig) -> None:
    """Refuse a name under which the hub has no repositories, before anything is trained.

    Raises:
        UserError: as said.
    """
    if config.push_to_hub:
        try:
            validate_repo_id(config.push_to_hub)
        except HFValidationError as error:
            raise UserError(f"push_to_hub {config.push_to_hub}: {error}", "Set push_to_hub=OWNER/NAME.") from None


def push_adapter(config: RunConfig, stage: StageDir, info: dict[str, Any], say: Callable[[str], None]) -> None:
    """Upload ``adapter/`` of a complete stage, unless this very adapter was pushed there before.

    Args:
        info: the stage's stage.json, which then says where it was pushed to.

    Raises:
        UserError: it cannot be pushed; the stage stays complete, and the same command pushes again.
    """
    pushed = {"repo": config.push_to_hub, "sha256": info.get("adapter_sha256")}
    if not config.push_to_hub or info.get("pushed") == pushed:
        return
    import httpx2  # only an upload needs it

    api = HfApi()
    try:
        # the name may come without its owner, as in the handbook's recipes: the hub says whose it is
        repo = api.create_repo(config.push_to_hub, private=config.hub_private_repo or None, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=stage.adapter)
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        httpx2.HTTPError,
        OSError,
    ) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"push_to_hub {config.push_to_hub}: {what}",
            f"The stage is complete, and its adapter is in {stage.adapter}. Log in (hf auth login) or mend the connection; "
            "the same command then pushes it.",
        ) from None
    info["pushed"] = pushed
    stage.write_info(info)
    say(f"pushed to {config.push_to_hub}")
