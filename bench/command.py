"""What all benches share: how they end as commands, and what they say of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
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


def header(*peers: str) -> dict[str, Any]:
    """Date, commit, machine and versions, the named packages' included; "not installed" for those that are missing."""
    from zephyr_lite.train.resume import versions

    found = versions()
    for name in peers:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {
            "cpu": cpu,
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "load_before": os.getloadavg(),
        },
        "versions": found,
    }


def commit() -> str | None:
    """The checkout's commit, with a plus if tracked files were changed; None outside a checkout."""
    try:
        words = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON; None: do nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, default=str, ensure_ascii=False) + "\n", encoding="utf-8")
