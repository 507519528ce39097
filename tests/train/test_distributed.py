"""Several processes: rows are dealt by length, and errors reach the others."""

import signal

import pytest

from tests.contract.test_processes import among_two
from zephyr_lite.cli import app as cli
from zephyr_lite.io import interrupts as launcher
from zephyr_lite.io.interrupts import StopRequest
from zephyr_lite.train.distributed import deal


def test_rows_are_dealt_by_length_and_each_once():
    lengths = [100, 1, 90, 10, 50, 40, 3]
    parts = deal(range(7), lengths, 3)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) <= 4 / 3 * sum(lengths) / 3
    assert deal([5], lengths, 2) == [[5], []]


TWO = """
import os, signal, sys
from zephyr_lite.errors import UserError
from zephyr_lite.train.distributed import PeerEnded, joined
with joined() as here:
    import torch
    value = torch.full((2,), float(here.rank + 1))
    here.all_reduce(value)
    assert value.tolist() == [3, 3]
    assert here.all_gather(here.rank) == [0, 1] and here.broadcast(lambda: here.rank) == 0
    turns = sys.argv[1]
    here.main_process_first(lambda: open(turns, "a").write(str(here.rank)))
    def fails():
        if here.rank == 1:
            raise UserError("a row of mine")
    try:
        here.main_process_first(fails)
        raise SystemExit("not noticed")
    except UserError:
        assert here.rank == 1
    except PeerEnded as ended:
        assert here.rank == 0 and ended.code == 2 and "a row of mine" in ended.message
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the connection's end is noticed
    if here.rank == 1:
        os.kill(os.getpid(), 9)
    try:
        here.all_gather(0)
        raise SystemExit("not noticed")
    except PeerEnded as ended:
        print("gone:", ended.message, flush=True)
"""


def test_an_error_and_a_killed_process_end_the_others(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    said = among_two(tmp_path, str(tmp_path / "two.py"), str(tmp_path / "turns"), code=1)
    assert "gone: another process of the run has ended" in said
    assert (tmp_path / "turns").read_text() == "01"


def test_commands_for_one_process_refuse_two(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["plan"], ["sft", "--dry-run"], ["dpo", "--smoke"]):
        assert cli.run(arguments) == 2
        assert "runs in one process; 2 were started" in capsys.readouterr().err


def test_the_launchers_copy_of_a_signal_is_no_second_request(monkeypatch):
    monkeypatch.setenv("RANK", "0")  # systemd and scancel signal torchrun and its processes; torchrun passes it on
    with StopRequest("the step is finished") as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
        monkeypatch.setattr(launcher, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(launcher, "ECHO", 5.0)
    with StopRequest("the step is finished"):  # alone the second is a person's
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
