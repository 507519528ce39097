"""The YAML files shipped with the package, by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..io.text import is_file, is_folder, refuse_special

# folders of shipped files that do not configure a stage
OTHER_CONFIGS = ("tables", "feedback")


def find_config(name: str, kind: str = "stages") -> Path:
    """A YAML file by its path, or a shipped one by its name (``zephyr-7b/sft``).

    Args:
        kind: of the shipped files; see ``preset_configs``.

    Raises:
        UserError: neither exists; the message lists the shipped names.
    """
    path = Path(name)
    refuse_special(path, name)
    if is_file(path):
        return path
    shipped = preset_configs(kind)
    if (found := shipped.get(name.removesuffix(".yaml"))) is not None:
        return found
    what = f"{'table' if kind == 'tables' else 'configuration'} {name[:300]}"
    known = f"a shipped one: {', '.join(shipped)}"
    if not is_folder(path):
        raise UserError(f"{what}: there is no such file.", f"Give a YAML file, or {known}.")
    inside = ", ".join(sorted(each.name for each in path.glob("*.y*ml"))[:3])
    raise UserError(
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
