"""Upload a model's or an adapter's folder to the hub: the files of a model only, in one commit, listed first."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from ..errors import UserError
from ..io.redact import find_secret, redact
from ..merge.weights import MARK
from ..model.tokenizer import TOKENIZER_FILES
from .model_card import CARD, PLOTS

logger = logging.getLogger(__name__)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FOLDER = re.compile(r'"(?:path|name_or_path|base_model_name_or_path)":\s*"(?:/|~|[A-Za-z]:)')
# everything else stays here: checkpoints, logs, and other files beside a model
_BELONGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "Modelfile", CARD, MARK, *TOKENIZER_FILES),
    *("*.safetensors", "*.safetensors.index.json", "*.gguf", "LICENSE*", "NOTICE*", "USE_POLICY*"),
    *("additional_chat_templates/*.jinja", f"{PLOTS}/*.png"),
)
_TEXT_BYTES = 2**20  # tokenizer.json is larger, and never holds a key


@dataclass
class Upload:
    """The files to upload."""

    folder: Path
    repo: str
    files: dict[str, Path] = field(default_factory=dict)  # path in the repository → file
    left_out: list[str] = field(default_factory=list)  # names of files that do not belong to a model
    notes: list[str] = field(default_factory=list)  # warnings

    def lines(self) -> list[str]:
        """For the console."""
        sizes = {name: path.stat().st_size / 1e6 for name, path in self.files.items()}
        width = max(map(len, sizes))
        more = " …" if len(self.left_out) > 8 else ""
        return [
            f"{self.repo}: {len(sizes)} files, {sum(sizes.values()):,.1f} MB",
            *(f"  {name:<{width}}  {size:>10,.1f} MB" for name, size in sizes.items()),
            *([f"left out: {', '.join(self.left_out[:8])}{more}"] if self.left_out else []),
            *(f"note: {note}" for note in self.notes),
        ]


def check_repo(repo: str) -> None:
    """Check what can be known before there is anything to upload.

    Raises:
        UserError: ``repo`` is not OWNER/NAME, there is no token, or the hub is switched off.
    """
    if not _REPO.fullmatch(repo):
        raise UserError(f"{repo}: is not a repository's name.", "Write OWNER/NAME.")
    if constants.HF_HUB_OFFLINE or get_token() is None:
        missing = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "there is no token of the hub"
        raise UserError(f"{repo}: {missing}.", "Unset HF_HUB_OFFLINE, and run `hf auth login` (with write access).")


def prepare(folder: str | Path, repo: str) -> Upload:
    """Choose the files of a model's or an adapter's folder.

    Raises:
        UserError: the folder holds neither; ``repo`` is not OWNER/NAME; a file holds a secret of this machine.
    """
    folder = Path(folder).expanduser()
    if not _REPO.fullmatch(repo):
        raise UserError(f"{repo}: is not a repository's name.", "Write OWNER/NAME.")
    upload = Upload(folder, repo)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        # a pattern without a slash is for files of the folder itself; a link may lead anywhere
        belongs = any(name.count("/") == p.count("/") and Path(name).match(p) for p in _BELONGS)
        if path.is_symlink() or not path.is_file() or not belongs:
            upload.left_out.append(name)
            continue
        upload.files[name] = path
        is_text = path.suffix in (".json", ".jinja", ".md", ".txt", "") and path.stat().st_size <= _TEXT_BYTES
        if is_text and (found := find_secret(path.read_text(encoding="utf-8", errors="replace"))):
            raise UserError(f"{path}: holds {found}.", "Remove it before you publish the file.")
    weights = any(name.endswith((".safetensors", ".gguf")) for name in upload.files)
    if not weights or not upload.files.keys() & {"config.json", "adapter_config.json"}:
        raise UserError(
            f"{folder}: holds neither a model nor an adapter.",
            "Give the folder that merge made; a run is not published.",
        )
    if CARD not in upload.files:
        upload.notes.append(f"there is no {CARD}; zephyr-lite export card {folder} writes one")
    for name in (MARK, "adapter_config.json"):
        if name in upload.files and _FOLDER.search(upload.files[name].read_text(encoding="utf-8")):
            upload.notes.append(f"{name} names folders of this machine")
    return upload


def push(upload: Upload, *, private: bool = False) -> None:
    """Upload in one commit; the repository is made if it does not exist.

    Args:
        private: make it a private one.

    Raises:
        UserError: no token, the hub is switched off, not permitted, no connection; or ``private``, and the repository
            exists and is public.
    """
    check_repo(upload.repo)
    api = HfApi()
    try:
        try:
            public = not api.repo_info(upload.repo).private
        except RepositoryNotFoundError:
            api.create_repo(upload.repo, private=private, exist_ok=True)
            public = not private
        if private and public:
            raise UserError(
                f"{upload.repo}: is there already, and public.", "Make it private in its settings, or name another."
            )
        api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            commit_message="A model of zephyr-lite",
        )
    except (HTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{upload.repo}: {redact(' '.join(str(error).split())[:300]) or type(error).__name__}",
            "Nothing was published. Log in (hf auth login) or check the connection, and run the same command.",
        ) from None
    logger.info(f"{upload.repo}: uploaded{'' if public else ', private'}; https://huggingface.co/{upload.repo}")
