"""Several processes train as one does: the same losses, the same adapter, one writer; whoever fails tells the others."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.contract.test_processes import among_two
from zephyr_lite.cli import app as cli
from zephyr_lite.errors import UserError
from zephyr_lite.io import interrupts as launcher
from zephyr_lite.io.interrupts import StopRequest
from zephyr_lite.train import distributed as world
from zephyr_lite.train import reference
from zephyr_lite.train.distributed import World, deal


def test_rows_are_dealt_by_length_and_each_once():
    lengths = [100, 1, 90, 10, 50, 40, 3]
    parts = deal(range(7), lengths, 3)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(lengths[i] for i in part) for part in parts]
    assert max(loads) <= 4 / 3 * sum(lengths) / 3
    assert deal([5], lengths, 2) == [[5], []]


def test_alone_everything_is_as_without():
    here = World()
    value = torch.ones(3)
    here.add(value)
    assert here.writes and value.tolist() == [1, 1, 1] and here.gather(4) == [4]
    assert here.lead(lambda: 1) == here.in_turn(lambda: 1) == here.together(lambda: 1) == 1
    assert here.sums(lambda: {"a": 2.0}) == {"a": 2.0} and here.share([3, 1], [0] * 4) == [3, 1]


TOGETHER = """
import os, signal, sys
from zephyr_lite.errors import UserError
from zephyr_lite.train.distributed import PeerEnded, joined, sees
with joined() as here:
    import torch
    value = torch.full((2,), float(here.rank + 1))
    here.add(value)
    assert value.tolist() == [3, 3]
    assert here.gather(here.rank) == [0, 1] and here.lead(lambda: here.rank) == 0
    assert here.sums(lambda: {"a": here.rank + 1.0}) == {"a": 3.0}
    turns = sys.argv[1]
    here.in_turn(lambda: open(turns, "a").write(str(here.rank)))
    def fails():
        if here.rank == 1:
            raise UserError("a row of mine")
    try:
        here.together(fails)
        raise SystemExit("nobody noticed")
    except UserError:
        assert here.rank == 1
    except PeerEnded as ended:
        assert here.rank == 0 and ended.code == 2 and "a row of mine" in ended.message
    try:
        sees("." if here.rank == 0 else "nowhere")
        raise SystemExit("nobody noticed")
    except UserError as error:
        assert "does not exist on" in str(error)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which may come before the connection's end is noticed
    if here.rank == 1:
        os.kill(os.getpid(), 9)
    try:
        here.gather(0)
        raise SystemExit("nobody noticed")
    except PeerEnded as ended:
        print("gone:", ended.message, flush=True)
"""


def test_whoever_fails_tells_the_others_and_whoever_dies_is_missed(tmp_path):
    (tmp_path / "together.py").write_text(TOGETHER)
    said = among_two(tmp_path, str(tmp_path / "together.py"), str(tmp_path / "turns"), code=1)
    assert "gone: another process of the run is gone" in said
    assert (tmp_path / "turns").read_text() == "01"


def test_what_runs_in_one_process_says_so(tmp_path, monkeypatch, capsys):
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


def test_who_leaves_an_exchange_half_way_begins_no_other(monkeypatch):
    import torch.distributed as dist

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_left", False)
    monkeypatch.setattr(dist, "all_gather_object", interrupted)
    with pytest.raises(KeyboardInterrupt):
        World(0, 2).gather(1)
    monkeypatch.setattr(dist, "all_gather_object", lambda *args: pytest.fail("another exchange"))
    with pytest.raises(KeyboardInterrupt):
        World(0, 2).gather(1)


def test_what_all_know_one_says(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert cli.run(["sft", "batch_sizes=3"]) == 2
        assert capsys.readouterr().err.count("there is no key") == said
        assert world.everywhere(UserError("x")).said_elsewhere == (rank == 1)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of another machine, which has files of its own
    assert cli.run(["sft", "batch_sizes=3"]) == 2 and "there is no key" in capsys.readouterr().err


def test_an_interrupted_reference_keeps_what_all_have_computed(monkeypatch, tmp_path):
    cache, other = (reference.ReferenceCache(tmp_path, "k" * 16, 3) for _ in range(2))
    cache.sums[0], other.sums[2] = 1.0, 2.0

    class Two(World):
        def together(self, work):
            raise KeyboardInterrupt

        def gather(self, value):
            return [value, other.sums]

    monkeypatch.setattr(reference, "world", lambda: Two(0, 2))
    with pytest.raises(KeyboardInterrupt):
        cache.compute(None, None, None)
    monkeypatch.undo()
    again = reference.ReferenceCache(tmp_path, "k" * 16, 3)
    assert not again.load() and again.missing == 1 and again.sums[[0, 2]].tolist() == [[1, 1], [2, 2]]
