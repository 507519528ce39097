"""The YAML files shipped with the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.text import is_file, is_folder, refuse_special

# folders of shipped files that do not configure a stage
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
    if (found := shipped.get(name.removesuffix(".yaml"))) is not None:
        return found
    raise not_found(f"configuration {name[:300]}", path, f"a shipped one: {', '.join(shipped)}")


def not_found(what: str, path: Path, known: str) -> UserError:
    """The error for a YAML file that does not exist, or for a folder in its place.

    Args:
        what: the kind of file, and its name as the user wrote it.
        known: other names that exist.
    """
    if not is_folder(path):
        return UserError(f"{what}: there is no such file.", f"Give a YAML file, or {known}.")
    inside = ", ".join(sorted(each.name for each in path.glob("*.y*ml"))[:3])
    return UserError(
        f"{what}: is a folder.", f"Give a YAML file{' in it (' + inside + ')' if inside else ''}, or {known}."
    )


def preset_configs(kind: str = "stages") -> dict[str, Path]:
    """{name: path} of the shipped YAML files.

    Args:
        kind: ``stages`` (the configurations of training commands), ``tables`` (ablations) or ``feedback``; the names
            of the last two leave their folder out.
    """
    configs = Path(__file__).resolve().parents[1] / "configs"
    root = configs if kind == "stages" else configs / kind
    return {
        path.relative_to(root).with_suffix("").as_posix(): path
        for path in sorted(root.rglob("*.yaml"))
        if kind != "stages" or path.relative_to(root).parts[0] not in OTHER_CONFIGS
    }
