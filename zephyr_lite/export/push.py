"""Upload a model's or an adapter's folder to the hub: the files of a model only, in one commit, listed first."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from ..errors import UserError
from ..io.redact import find_secret, redact
from ..io.sync import check_repo
from ..merge.weights import MARK
from ..model.tokenizer import TOKENIZER_FILES
from .model_card import CARD, PLOTS

logger = logging.getLogger(__name__)

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
    files: dict[str, Path]  # path in the repository → file
    notes: list[str] = field(default_factory=list)  # warnings

    def lines(self) -> list[str]:
        """For the console."""
        sizes = {name: path.stat().st_size / 1e6 for name, path in self.files.items()}
        return [
            f"{self.repo}: {len(sizes)} files, {sum(sizes.values()):,.1f} MB; other files of {self.folder} stay here",
            *(f"  {size:>10,.1f} MB  {name}" for name, size in sizes.items()),
            *(f"note: {note}" for note in self.notes),
        ]


def prepare(folder: str | Path, repo: str) -> Upload:
    """Choose the files of a model's or an adapter's folder."""
    folder = Path(folder).expanduser()
    found = sorted({path for pattern in _BELONGS for path in folder.glob(pattern)})
    # a link may lead anywhere
    files = {path.relative_to(folder).as_posix(): path for path in found if path.is_file() and not path.is_symlink()}
    weights = any(name.endswith((".safetensors", ".gguf")) for name in files)
    if not weights or not files.keys() & {"config.json", "adapter_config.json"}:
        raise UserError(
            f"{folder}: holds neither a model nor an adapter.",
            "Give the folder that merge made; a run is not published.",
        )
    upload = Upload(folder, repo, files)
    for name, path in files.items():
        is_text = path.suffix in (".json", ".jinja", ".md", ".txt", "") and path.stat().st_size <= _TEXT_BYTES
        text = path.read_text(encoding="utf-8", errors="replace") if is_text else ""
        if secret := find_secret(text):
            raise UserError(f"{path}: holds {secret}.", "Remove it before you publish the file.")
        if name in (MARK, "adapter_config.json") and _FOLDER.search(text):
            upload.notes.append(f"{name} names folders of this machine")
    if CARD not in files:
        upload.notes.append(f"there is no {CARD}; zephyr-lite export card {folder} writes one")
    return upload


def push(upload: Upload, *, private: bool = False) -> None:
    """Upload in one commit; the repository is made (private, if so asked) if it does not exist.

    Raises:
        UserError: the hub cannot be written, or ``private``, and the repository exists and is public.
    """
    check_repo(upload.repo)
    api = HfApi()
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        public = not api.repo_info(upload.repo).private
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
