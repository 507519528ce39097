"""The notebook runs from top to bottom, in small: its parameter cell is replaced, as papermill would."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

from .conftest import make_model, make_tokenizer  # noqa: E402

ROOT = Path(__file__).parent.parent
PATH = ROOT / "notebooks" / "zephyr_lite_colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_valid_and_stripped(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_it_runs(notebook, tmp_path, chat_rows, pair_rows, monkeypatch):
    base = tmp_path / "base"
    make_model(intermediate_size=192).save_pretrained(base)
    make_tokenizer(base)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    small = {
        "MODEL": str(base),
        "CHATS": {"path": str(chat_rows), "limit": 6},
        "PAIRS": {"path": str(pair_rows), "limit": 6},
        "OVERRIDES": ["max_length=128", "max_prompt_length=64", "lora_r=4", "batch_size=2", "max_steps=2"],
        "NEW_TOKENS": 4,
    }
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep if os.environ.get("PYTHONPATH") else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(text(output) for cell in notebook.cells for output in cell.get("outputs", []))
    for words in ("first step: loss", "0.6931", "== DPO", "merged against live"):
        assert words in said
    assert (tmp_path / "runs" / "notebook" / "merged" / "model.safetensors").is_file()


def text(output) -> str:
    """A cell's output as text; one that failed shows up as its traceback."""
    if output.output_type == "stream":
        return output.text
    return output.get("data", {}).get("text/plain", "") or "\n".join(output.get("traceback", []))
