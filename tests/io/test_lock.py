"""One process at a time on a folder, and whose lock is no obstacle."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from zephyr_lite.errors import UserError
from zephyr_lite.io import lock
from zephyr_lite.io.lock import alone, this_host

HOLDER = """
import sys, time
from pathlib import Path
from zephyr_lite.io.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that works in the folder ``run``."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def leave(folder, **changes):
    """A lock file as a process leaves it that is killed."""
    folder.mkdir(exist_ok=True)
    value = {
        **this_host(),
        "pid": 2**22 + 1,
        "started": 1,
        "command": "zephyr-lite sft",
        "since": "2026-01-01",
        "token": "x",
    }
    (folder / ".lock").write_text(json.dumps({**value, **changes}))
    return folder


def without_flock(monkeypatch):
    monkeypatch.setattr(lock, "flock", lambda handle: None)


def test_nobody_else_and_nothing_left(tmp_path):
    said = []
    with alone(tmp_path / "a" / "run", said.append):
        told = json.loads((tmp_path / "a" / "run" / ".lock").read_text())
        assert told["pid"] == os.getpid() and told["boot_id"] == this_host()["boot_id"]
        with alone(tmp_path / "a" / ".." / "a" / "run", said.append):  # the same process, by another name
            pass
        assert (tmp_path / "a" / "run" / ".lock").is_file()
    assert not (tmp_path / "a").exists() and said == []


def test_what_was_put_into_the_folder_stays(tmp_path):
    with alone(tmp_path / "run"):
        (tmp_path / "run" / "x").write_text("1")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]


def test_a_living_process_is_named_and_a_killed_one_is_no_obstacle(holder, tmp_path):
    with pytest.raises(UserError) as refused, alone(tmp_path / "run"):
        pass
    assert refused.value.message.startswith(f"{tmp_path / 'run'}: process {holder.pid} on {this_host()['host']} (-c")
    assert refused.value.message.endswith("is running and works here.")
    assert refused.value.hint == f"Wait for it, end it (kill {holder.pid}), or choose another output_dir."
    holder.kill()
    holder.wait()
    said = []
    with alone(tmp_path / "run", said.append):
        assert f"the lock of process {holder.pid}" in said[0] and "taken over" in said[0]


def test_a_living_process_is_in_the_way_where_the_file_system_has_no_locks(holder, tmp_path, monkeypatch):
    without_flock(monkeypatch)
    with pytest.raises(UserError, match=rf"process {holder.pid} .* is running"), alone(tmp_path / "run"):
        pass


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},  # a process that is gone
        {"pid": os.getpid(), "started": 12},  # its number was given to another since
        {"pid": 1, "boot_id": "another boot"},
        {"pid": "1; rm -rf /"},
        {"pid": -1},
        {"pid": 10**30},
    ],
    ids=["dead", "reused", "rebooted", "words", "negative", "huge"],
)
def test_a_lock_that_was_left_is_taken_over(tmp_path, changes, flock, monkeypatch):
    if not flock:
        without_flock(monkeypatch)
    said = []
    with alone(leave(tmp_path / "run", **changes), said.append):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert len(said) == 1 and not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"{", b"[1]", b"[" * 60_000, b"null"])
def test_a_file_that_says_nothing_is_no_obstacle(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_bytes(content)
    with alone(tmp_path / "run"):
        pass


def test_another_machine_is_waited_for_and_not_for_ever(tmp_path):
    folder = leave(tmp_path / "run", host="spot-7", machine="m", boot_id="b", pid=1)
    with (
        pytest.raises(UserError, match=r"process 1 on spot-7 .* was at work .* s ago and works here") as refused,
        alone(folder),
    ):
        pass
    assert "gives way 5 minutes after" in refused.value.hint
    past = time.time() - lock.SILENT - 1
    os.utime(folder / ".lock", (past, past))
    with alone(folder):
        pass


def test_the_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    with alone(tmp_path / "run"):
        os.utime(tmp_path / "run" / ".lock", (1, 1))
        end = time.time() + 5
        while os.stat(tmp_path / "run" / ".lock").st_mtime < 1000 and time.time() < end:
            time.sleep(0.01)
        assert time.time() - os.stat(tmp_path / "run" / ".lock").st_mtime < 5


def test_an_owner_that_was_taken_for_lost_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    said = []
    with alone(tmp_path / "run", said.append):
        leave(tmp_path / "run", token="theirs")
        end = time.time() + 5
        while not said and time.time() < end:
            time.sleep(0.01)
    assert "another machine took this one for lost" in said[0]
    assert (tmp_path / "run" / ".lock").is_file()  # theirs


def test_a_worker_that_outlives_its_parent_holds_nothing(tmp_path):
    """Loading and tokenizing fork workers; they share what was locked."""
    code = HOLDER.replace(
        "time.sleep(60)", "import os\n    if os.fork() == 0:\n        time.sleep(20)\n    time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    time.sleep(0.3)
    process.kill()
    process.wait()
    with alone(tmp_path / "run"):
        pass
    process.stdout.close()


def test_of_two_that_start_together_one_works(tmp_path, monkeypatch):
    """Each with a lock of its own, as two processes have."""
    refused, entered, inside = [], [], threading.Barrier(4)

    def start():
        try:
            inside.wait()
            held = lock._acquire(tmp_path / ".lock", tmp_path, lambda line: None)
            entered.append(held)
        except UserError as error:
            refused.append(error)

    for flock in (True, False):
        if not flock:
            without_flock(monkeypatch)
        refused.clear(), entered.clear()
        threads = [threading.Thread(target=start) for _ in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(entered) == 1 and len(refused) == 3
        lock._release(entered[0])


def test_a_folder_that_cannot_be_made_or_written_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match=r"file/run: cannot be made: .*file is a file"),
        alone(tmp_path / "file" / "run"),
    ):
        pass
    with pytest.raises(UserError, match="cannot be made"), alone(tmp_path / "file"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")  # what it leads to is not written over
    with pytest.raises(UserError, match="lock of the folder cannot be made"), alone(tmp_path / "run"):
        pass
    assert (tmp_path / "file").read_text() == "x"


def test_a_lock_from_the_future_is_looked_at(tmp_path, monkeypatch):
    """One of the two clocks is wrong: only whether somebody touches the lock says something."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    folder = leave(tmp_path / "run", host="spot-7", machine="m", boot_id="b", pid=1)
    file, ahead = folder / ".lock", time.time() + 7200
    os.utime(file, (ahead, ahead))
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(lock.time, "sleep", lambda seconds: os.utime(file, (ahead + 1, ahead + 1)))
        with pytest.raises(UserError, match=r"process 1 on spot-7 .* is at work"), alone(folder, said.append):
            pass
    assert "of a time to come" in said[0]
    with alone(folder):
        pass


def test_no_process_of_another_machine_is_to_be_killed_here(tmp_path):
    """Machines may have the same name: containers, rented ones."""
    folder = leave(tmp_path / "run", machine="another", boot_id="b", pid=1)
    with pytest.raises(UserError) as refused, alone(folder):
        pass
    assert "kill" not in refused.value.hint and "end it there" in refused.value.hint
