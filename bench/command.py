"""What all benches share: how they end as commands, and what they say of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from zephyr_lite.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def run(main: Callable[[], Any]) -> None:
    """Call a bench's main function; a UserError is printed without a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(str(error))


def header(*peers: str, checkout: Path = ROOT) -> dict[str, Any]:
    """Date, commit, machine and versions, the named packages' included; "not installed" for those that are missing."""
    from zephyr_lite.train.setup import versions

    found = versions()
    for name in peers:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(checkout),
        "machine": machine(),
        "versions": found,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, system, and load."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "load_before": os.getloadavg()}


def commit(checkout: Path = ROOT) -> str | None:
    """The checkout's commit, with a plus if tracked files were changed; None outside a checkout."""
    if shutil.which("git") is None:
        return None

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True, check=False)

    head = ask("rev-parse", "HEAD")
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if ask("status", "--porcelain", "--untracked-files=no").stdout.strip() else "")


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON; None: do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
