"""The notebook runs from top to bottom, in small: its parameter cell is replaced, as papermill would. Then its machine is
taken away, and it goes on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

from tests.conftest import make_model, make_tokenizer  # noqa: E402

ROOT = Path(__file__).parents[2]
PATH = ROOT / "notebooks" / "zephyr_lite_colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_valid_and_stripped(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def tagged(notebook, tag):
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    return cell


def test_it_runs_and_goes_on_without_its_machine(notebook, tmp_path, chat_rows, pair_rows, monkeypatch):
    base = tmp_path / "base"
    make_model(intermediate_size=192).save_pretrained(base)
    make_tokenizer(base)
    small = {
        "MODEL": str(base),
        "CHATS": {"path": str(chat_rows), "limit": 6},
        "CHATS_HELD_OUT": {"path": str(chat_rows), "limit": 2},
        "PAIRS": {"path": str(pair_rows), "limit": 6},
        "PAIRS_HELD_OUT": {"path": str(pair_rows), "limit": 2},
        "KEEP": str(tmp_path / "drive"),
        "OVERRIDES": ["max_length=64", "max_prompt_length=32", "batch_size=2", "max_steps=2", "sample_tokens=2"],
        "DPO_KEYS": ["lora_r=4"],
        "NEW_TOKENS": 4,
    }
    tagged(notebook, "parameters").source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    gone = "shutil.rmtree(RUN)\nprint('== the machine is gone')"
    # no room for the model itself; nor for half of it
    room = (
        "shutil.disk_usage = lambda place: type('Usage', (), {'free': 10**9 + int(%s * size)})\n"
        + tagged(notebook, "save").source
    )
    full = [room % 0.7, room % 0]
    again = [gone, tagged(notebook, "sft").source, tagged(notebook, "dpo").source]
    for source in [*full, *again]:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep if os.environ.get("PYTHONPATH") else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(text(output) for cell in notebook.cells for output in cell.get("outputs", []))
    first, after = said.split("== the machine is gone")
    assert "supervised: " in first and "⟦" in first
    for words in (
        "No GPU",
        "plan of sft",
        "plan of dpo",
        "0.6931",
        "== DPO",
        "merged onto the 16-bit base",
        "too little",
    ):
        assert words in first, words
    for stage in ("sft", "dpo"):
        assert f"{stage} is complete already" in after
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    assert (tmp_path / "drive" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "drive" / "model-q8_0.gguf").read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "drive" / "report.html").is_file()
    assert "torch==" in (tmp_path / "pinned.txt").read_text()


def text(output) -> str:
    """A cell's output as text; one that failed shows up as its traceback."""
    if output.output_type == "stream":
        return output.text
    return output.get("data", {}).get("text/plain", "") or "\n".join(output.get("traceback", []))
