"""The YAML files that travel with the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.reading import is_file, is_folder, refuse_special

# folders of shipped files that are not the configuration of a stage
OTHER_CONFIGS = ("tables", "feedback")


def find_config(name: str) -> Path:
    """A YAML file by its path, or a shipped one by its name (``zephyr-7b/sft``).

    Raises:
        UserError: neither exists; the message lists the shipped names.
    """
    path = Path(name)
    refuse_special(path, name)
    if is_file(path):
        return path
    shipped = preset_configs()
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise not_found(f"configuration {name[:300]}", path, f"a shipped one: {', '.join(shipped)}")


def not_found(what: str, path: Path, known: str) -> UserError:
    """What to say where a YAML file was to be; a folder is told from nothing.

    Args:
        what: the kind of file, and its name as the user wrote it.
        known: what else could be named.
    """
    if not is_folder(path):
        return UserError(f"{what}: there is no such file.", f"Give a YAML file, or {known}.")
    inside = ", ".join(sorted(each.name for each in path.glob("*.y*ml"))[:3])
    return UserError(
        f"{what}: is a folder.", f"Give a YAML file{' in it (' + inside + ')' if inside else ''}, or {known}."
    )


def preset_configs(kind: str = "stages") -> dict[str, Path]:
    """{name: path} of the YAML files that travel with the package.

    Args:
        kind: ``stages``, what a training command takes; or one of the folders of other files: ``tables`` (ablations),
            ``feedback``, without that folder in the name.
    """
    root = Path(__file__).resolve().parents[1] / "configs"
    found = {}
    for path in sorted((root if kind == "stages" else root / kind).rglob("*.yaml")):
        parts = path.relative_to(root).parts
        if kind != "stages":
            found["/".join(parts[1:]).removesuffix(".yaml")] = path
        elif parts[0] not in OTHER_CONFIGS:
            found["/".join(parts).removesuffix(".yaml")] = path
    return found
