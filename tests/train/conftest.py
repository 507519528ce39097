"""Rows of a user that several files train on."""

import json

import pytest


@pytest.fixture
def own(tiny_base, tmp_path):
    """Words of a run on thirty rows of the user, without a configuration file."""
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"What is {n} plus one?", "completion": f"It is {n + 1}."} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"model_name_or_path={tiny_base}", f"dataset={path}", f"output_dir={tmp_path / 'run'}", "samples=0"]
