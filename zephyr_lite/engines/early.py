"""The import of Unsloth, before everybody else's. Nothing heavy is imported here.

Unsloth replaces classes of transformers, PEFT and TRL. A module that bound their names before keeps the old ones, and
would train without Unsloth's part, so a late import is refused. The command line calls this once it knows the engine;
from Python call it before anything of torch's world::

    from zephyr_lite.engines import start_unsloth
    start_unsloth()
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from ..errors import UserError
from ..io.run_dir import cache_dir

WANTED = ">=2026.10.7,<2026.11"  # as the extra in pyproject.toml
INSTALL = 'pip install "zephyr-lite[unsloth]"'
# what Unsloth builds on and we do too; the rest of its requirements is its own affair
SHARED = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
PATCHED = ("transformers", "peft", "trl")


def start_unsloth() -> None:
    """Import Unsloth, or find that it is imported.

    Raises:
        UserError: it is not installed; it, or what it builds on, is of a version that does not fit; transformers, PEFT
            or TRL came first; it refuses to start here (without a GPU, say).
    """
    if hasattr(sys.modules.get("unsloth"), "FastLanguageModel"):
        return
    if conflicts := unsloth_conflicts():
        raise UserError(
            f"engine unsloth: {'; '.join(conflicts)}.", f"{INSTALL}, in an environment of its own; or set engine=trl."
        )
    late = [name for name in PATCHED if name in sys.modules]
    if late:
        raise UserError(
            f"engine unsloth: {', '.join(late)} came first, and what is bound already would not be replaced.",
            "Use the zephyr-lite command, or call zephyr_lite.engines.start_unsloth() before any other import.",
        )
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # a run tells nobody
    # it writes the sources that it generates; the current folder is the user's
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(_cache()))
    try:
        importlib.import_module("unsloth")
    except Exception as error:  # NotImplementedError without a GPU, ImportError, RuntimeError, AttributeError, its own
        raise UserError(
            f"engine unsloth: unsloth {version('unsloth')} with {_versions()} does not start here: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}",
            f"It wants a GPU that it knows, and the versions of its extra: {INSTALL}. Or set engine=trl.",
        ) from error


def unsloth_conflicts() -> list[str]:
    """What stands in the way of importing it, each with what was found and what is wanted; empty where nothing does."""
    try:
        found = version("unsloth")
    except PackageNotFoundError:
        return [f"unsloth {WANTED} is not installed (beside {_versions()})"]
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    result = []
    if not SpecifierSet(WANTED).contains(found, prereleases=True):
        result.append(f"unsloth {found} is installed, wanted is {WANTED}")
    try:
        version("unsloth_zoo")
    except PackageNotFoundError:
        result.append(f"unsloth_zoo is not installed, wanted is {WANTED}")
    for line in requires("unsloth") or []:
        wanted = Requirement(line)
        if wanted.name not in SHARED or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            there = "none"
        if there == "none" or not wanted.specifier.contains(there, prereleases=True):
            result.append(f"{wanted.name} {there} is installed, unsloth {found} wants {wanted.specifier}")
    return result


def _versions() -> str:
    found = []
    for name in ("torch", "transformers", "trl", "datasets"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _cache() -> Path:
    """A folder in the user's cache, a version each: the sources depend on it."""
    folder = cache_dir() / f"unsloth-{version('unsloth')}-{version('trl')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written
        return Path(tempfile.mkdtemp(prefix="zephyr-lite-unsloth-"))
    return folder
