"""Writes that fail and processes that die while they write: what was there stays, and the same command ends alike."""

import errno
import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.faults import KINDS, Died, faulty, left_aside
from tests.kill import Ground, _sft, standing
from zephyr_lite.cli import app as cli
from zephyr_lite.io import atomic
from zephyr_lite.io.atomic import write_manifest


def text(path: Path) -> None:
    atomic.write_text(path / "a.json", "new")


def large(path: Path) -> None:
    with atomic.bytes_aside(path / "a.json") as file:
        for _ in range(3):
            file.write(b"x" * 2**20)


def folder(path: Path) -> None:
    with atomic.folder_aside(path / "f") as aside:
        atomic.write_json(aside / "one.json", {"a": 1})
        (aside / "deeper").mkdir()
        (aside / "deeper" / "foreign").write_text("by a library")
        write_manifest(aside)


def copy(path: Path) -> None:
    atomic.copy_file(path / "a.json", path / "b.json")


def removal(path: Path) -> None:
    if (path / "f").exists():
        atomic.remove_folder(path / "f")


def before(path: Path) -> Path:
    (path / "f").mkdir(parents=True)
    (path / "a.json").write_text("old")
    (path / "f" / "one.json").write_text("old")
    return path


def visible(path: Path) -> dict[str, str]:
    found = {str(p.relative_to(path)): p.read_text() for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: text for name, text in found.items() if not name.startswith(".")}


@pytest.mark.parametrize("work", [text, large, folder, copy, removal])
def test_a_write_that_fails_leaves_what_was_there(work, tmp_path):
    whole = before(tmp_path / "whole")
    old = visible(whole)
    with faulty() as disk:
        work(whole)
    new = visible(whole)
    assert new != old and left_aside(whole) == []
    for kind in KINDS:
        for at, (name, _) in enumerate(disk.calls):
            if name == "remove" or (kind == "torn" and name != "write"):
                continue
            place = before(tmp_path / f"{kind}{at}")
            with faulty(at, kind), pytest.raises((OSError, Died)) as caught:
                work(place)
            if kind == "full":
                assert caught.value.errno == errno.ENOSPC and str(place) in caught.value.filename
                assert not atomic._ASIDE.search(caught.value.filename), "names a file that is not there any more"
                assert left_aside(place) == [] and visible(place) in (old, new)
            atomic.sweep(place)
            assert visible(place) in (old, new) and left_aside(place) == []
            work(place)
            assert visible(place) == new


def test_a_living_process_keeps_what_it_has_aside(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from zephyr_lite.io.atomic import folder_aside, file_aside\n"
        "with folder_aside(Path(sys.argv[1]) / 'f'), file_aside(Path(sys.argv[1]) / 't'):\n"
        "    print('there', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"there\n"
        (tmp_path / ".cache").mkdir()
        atomic.sweep(tmp_path)
        assert len(left_aside(tmp_path)) == 2
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    (tmp_path / ".other.01234567").write_text("x")
    atomic.sweep(tmp_path, "f")
    atomic.sweep(tmp_path, "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cache", ".other.01234567"]


def run(words: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = cli.run(words)
    return code, said.getvalue()


def test_a_run_whose_disk_fails_ends_alike_when_it_is_started_again(tiny_base, chat_rows, pair_rows, tmp_path):
    out = tmp_path / "run"
    settings = {"max_steps": 3, "save_steps": 1, "save_total_limit": 1, "load_in_4bit": "false"}
    words = _sft(Ground(tiny_base, chat_rows, pair_rows), out, **settings)
    with faulty() as disk:
        code, said = run(words)
    assert code == 0, said
    right = standing(out)
    writes = [at for at, (name, path) in enumerate(disk.calls) if name == "write" and "checkpoint" in path]
    renames = [at for at, (name, path) in enumerate(disk.calls) if name == "replace" and "checkpoint" in path]
    log = next(at for at, (name, path) in enumerate(disk.calls) if name == "write" and "metrics.jsonl" in path)
    for at, kind in ((writes[0], "full"), (writes[-1], "torn"), (renames[-1], "died"), (log, "full")):
        out.rename(tmp_path / f"run{at}")
        with faulty(at, kind):
            try:
                code, said = run(words)
                assert code == 2 and "No space left" in " ".join(said.split()) and str(out) in "".join(said.split())
                assert "Traceback" not in said and left_aside(out) == []
            except Died:
                assert kind != "full"
        code, said = run(words)
        assert code == 0, said
        assert standing(out) == right
