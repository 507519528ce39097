"""Every malformed input of the table gets its exact message, the exit code of a user's error, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import malformed_data, malformed_model, malformed_words
from tests.malformed import Case, Fixtures, said
from zephyr_lite.cli import app as cli

CASES: list[Case] = [*malformed_data.CASES, *malformed_words.CASES, *malformed_model.CASES]


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_base, chat_rows, pair_rows):
    """A function: the folder of a run whose sft and dpo stages are complete, made when it is first asked for."""
    made: list[Path] = []

    def run() -> Path:
        if not made:
            folder = tmp_path_factory.mktemp("finished") / "t"
            common = ["max_length=128", "batch_size=4", "lora_r=4", "max_steps=2", f"output_dir={folder}"]
            assert cli.run(["sft", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}", *common]) == 0
            assert cli.run(["dpo", f"dataset={pair_rows}", "max_prompt_length=64", *common]) == 0
            made.append(folder)
        return made[0]

    return run


@pytest.fixture
def fixtures(tiny_base, chat_rows, pair_rows, finished, tmp_path) -> Fixtures:
    return Fixtures(tiny_base, chat_rows, pair_rows, finished)


def files_of_runs(folder: Path) -> set[str]:
    runs = folder / "runs"
    return {str(p.relative_to(runs)) for p in runs.rglob("*") if not p.is_dir()} if runs.is_dir() else set()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_what_is_said_of_a_malformed_input(case, fixtures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = case.make(tmp_path, fixtures)
    before = files_of_runs(tmp_path)
    capsys.readouterr()
    code = cli.run(given)
    out, err = capsys.readouterr()
    assert said(err, tmp_path, fixtures) == case.expected()
    assert code == case.code
    assert "Traceback" not in out
    assert files_of_runs(tmp_path) - before <= case.leaves
    assert before <= files_of_runs(tmp_path)


def test_the_table_names_each_input_once():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
