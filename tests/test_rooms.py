"""The rooms of the package: a room imports only from itself and from the rooms before it in ``ROOMS``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import zephyr_lite

PACKAGE = Path(zephyr_lite.__file__).parent
ROOMS = (
    "errors",
    "ops",
    "io",
    "config",
    "data",
    "model",
    "memory",
    "chat",
    "train",
    "engines",
    "monitor",
    "client",
    "evaluate",
    "merge",
    "export",
    "recipe",
    "demo",
    "audit",
    "ui",
    "cli",
)
# imports that run upwards, to be removed: (room, room)
UPWARDS = {
    ("train", "engines"),
}
ONLY_IN = {
    "bitsandbytes": {"ops/nf4.py", "train/optim.py", "memory/machine.py", "cli/environment.py"},
    "triton": {"ops/", "cli/environment.py"},
    "trl": {"engines/"},
    "unsloth": {"engines/"},
    "gradio": {"ui/"},
}


@pytest.fixture(scope="module")
def imported():
    """{file: the modules that it imports}; those of the package as ``.room.module``."""
    return {path.relative_to(PACKAGE): set(imports(path)) for path in PACKAGE.rglob("*.py")}


def imports(path):
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module
                continue
            parts = [*folder[: len(folder) + 1 - node.level], *(node.module.split(".") if node.module else [])]
            yield from ["." + ".".join(parts)] if parts else ["." + alias.name for alias in node.names]


def test_a_room_imports_only_from_rooms_before_it(imported):
    seen = set()
    for path, names in imported.items():
        room = path.with_suffix("").parts[0]
        if room.startswith("__"):
            continue
        for name in names:
            target = name[1:].split(".")[0]
            if name.startswith(".") and target in ROOMS:
                seen.add((room, target))
                if ROOMS.index(target) > ROOMS.index(room):
                    assert (room, target) in UPWARDS, f"{path}: {name}"
    assert seen >= UPWARDS, f"no longer needed in UPWARDS: {UPWARDS - seen}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_that_only_some_files_import(imported, library):
    users = {
        path.as_posix() for path, names in imported.items() if any(name.split(".")[0] == library for name in names)
    }
    assert {user for user in users if not user.startswith(tuple(ONLY_IN[library]))} == set()


# Imports every module of training and of the benches where these packages cannot be imported from this project (other
# libraries may have them: huggingface_hub needs an HTTP client).
WITHOUT = """
import builtins, importlib, pkgutil
import bench, zephyr_lite.train

def limited(name, globals=None, *rest, plain=builtins.__import__, **more):
    importer = (globals or {}).get("__name__", "").split(".")[0]
    if importer in ("bench", "zephyr_lite") and name.split(".")[0] in MISSING:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain(name, globals, *rest, **more)

builtins.__import__ = limited
for package in (zephyr_lite.train, bench):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
        print(module.name)
"""
OPTIONAL = (
    "httpx2",
    "trl",
    "gguf",
    "matplotlib",
    "openai",
    "fastapi",
    "uvicorn",
    "sentencepiece",
    "lm_eval",
    "unsloth",
    "tensorboard",
    "gradio",
)


def test_training_and_benches_import_without_what_only_one_command_needs():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"MISSING = {OPTIONAL}{WITHOUT}"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"zephyr_lite.train.sft", "zephyr_lite.train.dpo", "bench.gpu", "bench.memory"} <= set(done.stdout.split())
