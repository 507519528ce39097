"""``make wheel``: the wheel holds every file of the package, and works in an environment without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESETS = """
import zephyr_lite
from zephyr_lite.config.load import load_config, preset_configs
from zephyr_lite.config.strict_yaml import read_yaml
for kind in ("stages", "tables", "feedback"):
    for name, path in preset_configs(kind).items():
        assert read_yaml(path), path
        if kind == "stages":
            load_config("dpo" if "dpo" in name else "sft", name)
        print(name)
print(zephyr_lite.__file__)
"""


def test_a_wheel_holds_every_file_and_works_alone(tmp_path):
    tree, environment = tmp_path / "tree", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # "0": pip reads it as --no-build-isolation

    def run(*words: object) -> str:
        return subprocess.run(
            map(str, words), cwd=tree, env=environment, capture_output=True, text=True, check=True
        ).stdout

    shutil.copytree(ROOT / "zephyr_lite", tree / "zephyr_lite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    files = {path.relative_to(tree).as_posix() for path in (tree / "zephyr_lite").rglob("*") if path.is_file()}
    run("make", "wheel", f"PYTHON={sys.executable}")
    (wheel,) = (tree / "dist").glob("zephyr_lite-*.whl")
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == files

    tree = tmp_path
    venv.create(tree / "venv", symlinks=True)
    python = tree / "venv/bin/python"
    (site,) = (tree / "venv/lib").glob("python*/site-packages")
    (site / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    assert "Stage 1" in run(tree / "venv/bin/zephyr-lite", "--help")
    assert "learning_rate" in run(tree / "venv/bin/zephyr-lite", "keys", "warm-up")
    *names, place = run(python, "-c", PRESETS).splitlines()
    assert "zephyr-7b/overnight-dpo" in names and "distill" in names and "alpha-beta" in names
    assert Path(place).parents[1] == site
