"""Code that the user did not ask for is not run: files of the current folder, kernels of the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zephyr_lite.demo.child import child
from zephyr_lite.export.llama import CHILD
from zephyr_lite.ops.hub_kernels import no_hub_kernels

RECORD = "import pathlib\npathlib.Path(r'{log}').open('a').write(__name__ + '\\n')\n"


@pytest.fixture
def shadows(working_folder, tmp_path) -> Path:
    """A working folder with a file of every standard module's name; the log of those that were imported."""
    log = tmp_path / "imported"
    for name in (*sys.stdlib_module_names, "torch", "typer", "rich", "yaml", "pydantic"):
        (working_folder / f"{name}.py").write_text(RECORD.format(log=log))
    return log


@pytest.mark.parametrize("python", [[], ["-P"]])
def test_modules_of_the_current_folder_are_not_imported(shadows, python):
    words = [sys.executable, *python, "-m", "zephyr_lite", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("zephyr-lite ")
    assert not shadows.exists(), shadows.read_text()


def test_nor_by_the_commands_that_a_command_starts(shadows, tmp_path):
    assert child(["--version"], log=tmp_path / "log") == 0
    done = subprocess.run([*CHILD, "tokenize", "none.gguf"], capture_output=True, text=True, input="[]", check=False)
    assert done.returncode == 1 and ("llama_cpp" in done.stderr or "none.gguf" in done.stderr)
    assert not shadows.exists(), shadows.read_text()


@pytest.mark.parametrize(
    "use",
    [
        "import zephyr_lite.ops.nf4",
        "from zephyr_lite.cli import app as cli; cli.run(['env'])",
        "from zephyr_lite.cli import app as cli; cli.app = lambda **words: __import__('bitsandbytes'); cli.run([])",
    ],
)
def test_bitsandbytes_fetches_no_kernel(tmp_path, use):
    """It would on a processor with AVX512-BF16, where the package ``kernels`` is installed."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(RECORD.format(log=tmp_path / "imported") + "get_kernel = print\n")
    code = f"import os\n{use}\nassert not os.path.exists({str(tmp_path / 'imported')!r})\nimport kernels"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "imported").read_text() == "kernels\n"  # by the last line only


def test_hub_kernels_are_not_importable_within(tmp_path, monkeypatch):
    (tmp_path / "kernels.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with no_hub_kernels(), no_hub_kernels(), pytest.raises(ImportError):
        import kernels
    import kernels

    with no_hub_kernels(), pytest.raises(ImportError):
        from kernels import anything  # noqa: F401
    assert sys.modules.pop("kernels") is kernels
