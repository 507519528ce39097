"""``--smoke``: what it does and leaves, and what it says where something fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

# what the commands would import, each in a process of its own
import zephyr_lite.chat.session
import zephyr_lite.evaluate.likelihood
import zephyr_lite.memory.forecast
import zephyr_lite.merge.command
import zephyr_lite.monitor.report_writer
import zephyr_lite.monitor.screens
import zephyr_lite.train.dpo
import zephyr_lite.train.sft  # noqa: F401
from tests.messages import messages_to
from tests.train.test_train import dpo_words, words
from zephyr_lite.__main__ import main
from zephyr_lite.config.load import load_config
from zephyr_lite.demo.smoke import MARK, STEPS, claim, run_smoke, smoke_folder
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir, newest_run


def forked(command, *, log=None, asked=None, answer=None, kill_when=None):
    """As ``child``, but of this process, which has imported everything: seconds less, and as killable."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.setsid()
            said = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            heard = os.open(asked or os.devnull, os.O_RDONLY)
            told = os.open(answer, os.O_WRONLY | os.O_CREAT) if answer else said
            for place, handle in enumerate((heard, told, said)):
                os.dup2(handle, place)
            sys.stdin = os.fdopen(0, closefd=False)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
            try:
                main(list(command))
            except SystemExit as done:
                code = int(done.code or 0)
        finally:
            os._exit(code)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if kill_when is not None and kill_when():
            os.killpg(pid, signal.SIGKILL)
            kill_when = None
        time.sleep(0.002)


@pytest.fixture(scope="module")
def tested(tmp_path_factory, tiny_base, pair_rows):
    """A DPO stage tested in a run that has no SFT stage yet: on the bare base, then."""
    root = tmp_path_factory.mktemp("runs")
    said: list[str] = []
    small = {"load_in_4bit": "false", "max_length": 64, "max_prompt_length": 32, "samples": 0}
    keys = dpo_words(tiny_base, root / "mine", pair_rows, **small)
    with messages_to(said.append):
        parts = run_smoke("dpo", None, keys, run=forked)
    return root, parts, said


def test_a_stage_is_killed_resumed_merged_and_answers(tested):
    root, parts, said = tested
    names = ["train, 10 steps", f"resume to step {STEPS}", "merge", "answer"]
    assert [part["name"] for part in parts] == names
    stage = StageDir(root / "mine-smoke" / "run" / "dpo")
    info = stage.info()
    assert info["status"] == "complete" and [start["step"] for start in info["resumed"]] == [10]
    assert info["adapters"] == []
    assert "from checkpoint-10, loss 0.693" in parts[1]["found"]
    assert parts[2]["found"].endswith("removed again") and not (root / "mine-smoke" / "merged").exists()
    assert (root / "mine-smoke" / "answer.txt").stat().st_size or "first token" in parts[3]["found"]
    text = "\n".join(said)
    assert "everything works" in text and "GiB at most" in text and "so the real dpo of about 6 steps" in text


def test_the_run_is_not_touched_and_the_smoke_test_is_never_the_newest_run(tested):
    root, _, _ = tested
    assert not (root / "mine").exists()
    assert newest_run(root) is None
    assert json.loads((root / "mine-smoke" / MARK).read_text())["status"] == "passed"


def test_a_dpo_stage_starts_from_the_runs_sft_adapter(tiny_base, chat_rows, pair_rows, tmp_path):
    """Without a process: a runner that only looks at what it is given."""
    from zephyr_lite.train.sft import run_sft

    run = tmp_path / "mine"
    run_sft(load_config("sft", None, words(tiny_base, run, chat_rows, max_steps=1, samples=0)))
    given = []

    def fails(command, log=None, **options):
        given.append(load_config("dpo", command[2]).config)
        log.write_text("error: the card fell out\n")
        return 2

    with pytest.raises(UserError, match=r"failed at: train, 10 steps.*exit code 2") as error:
        run_smoke("dpo", None, dpo_words(tiny_base, run, pair_rows, sync=tmp_path / "there"), run=fails)
    assert "the card fell out" in error.value.message and "1-train.log" in error.value.hint
    assert given[0].adapters == [str(run / "sft" / "adapter")] and given[0].sync is None
    assert given[0].output_dir == str(tmp_path / "mine-smoke" / "run")
    assert json.loads((tmp_path / "mine-smoke" / MARK).read_text())["status"] == "failed"


def test_the_folder_is_beside_the_run_and_only_an_earlier_smoke_test_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert smoke_folder(tmp_path / "runs" / "a") == tmp_path / "runs" / "a-smoke"
    assert smoke_folder(Path(".")) == tmp_path.with_name(f"{tmp_path.name}-smoke")
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is not a smoke test .it holds thesis.tex"):
        claim(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"
    (tmp_path / "thesis.tex").unlink()
    claim(tmp_path)
    (tmp_path / "merged").mkdir()
    claim(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", MARK]
