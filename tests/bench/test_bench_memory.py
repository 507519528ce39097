"""``bench.memory`` runs end to end on a tiny model on a CPU, and its cases tell why there is no result where there is none."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import memory, memory_parts
from bench.memory_parts import Case, peak, play, predicted, reset_peak
from zephyr_lite.errors import UserError
from zephyr_lite.memory.plan import Plan

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU can say")


@CPU_ONLY
def test_tiny(tmp_path, capsys):
    out = tmp_path / "memory.json"
    words = ["--tiny", "--cards", "24", "8", "--rows", "2", "--tokens", "1024", "4096", "--out", str(out)]
    memory.main(words)
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    parts = results["parts"]
    assert list(parts) == list(memory_parts.PARTS)
    failed = {name: case["error"] for part in parts.values() for name, case in part.items() if "error" in case}
    assert failed == {}
    assert not results["on_a_card"] and results["versions"]["torch"] and results["settings"]["tiny"]

    for case in parts["cards"].values():
        assert case["predicted"]["reserved"] == case["plan"]["account"]["peak"] > 0  # no context on a CPU
        assert case["measured"]["reserved"] > 0 and case["measured"]["allocated"] is None
        assert len(case["seconds"]) == 2 and not case["adapted"]
    speeds = parts["speed"]
    assert all(list(case["tokens_per_second"]) == ["102", "409"] for case in speeds.values())
    assert speeds["streamed"]["plan"]["stream"] and not speeds["resident"]["plan"]["stream"]
    assert "say nothing of a plan" in printed and "tokens/s" in printed


def test_one_part_alone_and_no_time(tmp_path, capsys):
    results = memory.main(["--tiny", "--parts", "cards", "--cards", "8", "--minutes", "0.0001"])
    assert {case["kind"] for case in results["parts"]["cards"].values()} == {"late"}
    assert "NO RESULT (late)" in capsys.readouterr().out


@CPU_ONLY
def test_no_card_is_said():
    with pytest.raises(UserError, match="NVIDIA card"):
        memory.main([])


def test_arguments():
    with pytest.raises(UserError, match="multiples"):
        memory.arguments(["--tokens", "1024", "1500"])


# -- cases -------------------------------------------------------------------------------------------------------------


def full(case, begun):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more words")


def refused(case, begun):
    raise UserError("no such model", "Name another.")


def broken(case, begun):
    raise ValueError("a bug")


def dies(case, begun):
    os._exit(9)


def sleeps(case, begun):
    time.sleep(60)


def works(case, begun):
    return {"pid": os.getpid(), "begun": begun, "values": case.values}


@pytest.mark.parametrize(("run", "kind"), [(full, "memory"), (refused, "refused"), (broken, "error")])
def test_why_there_is_no_result(run, kind):
    found = play(Case("c", run, "sft", {}), 10, here=True)
    assert found["kind"] == kind
    assert "Traceback" in found["error"] if kind == "error" else "Traceback" not in found["error"]


def test_processes_of_their_own():
    cases = [
        (Case("c", works, "sft", {"a": 1}), 100),
        (Case("c", dies, "sft", {}), 100),
        (Case("c", sleeps, "sft", {}), 3),
    ]
    begun = time.time()
    with ThreadPoolExecutor(3) as pool:
        worked, died, late = pool.map(lambda pair: play(*pair), cases)
    assert worked["pid"] != os.getpid() and worked["values"] == {"a": 1} and worked["begun"] >= begun
    assert died["kind"] == "died" and "exit code 9" in died["error"]
    assert late == {"kind": "late", "error": "not done within 3 s"}


@CPU_ONLY
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux's way to reset a peak")
def test_a_peak_is_that_since_the_reset():
    block = torch.ones(50_000_000)
    before = peak()["reserved"]
    del block
    reset_peak()
    after = peak()["reserved"]
    assert after < before - 150e6
    block = torch.ones(75_000_000)
    assert peak()["reserved"] > after + 250e6 and block.numel()


def test_what_is_predicted_leaves_out_what_no_allocator_sees():
    account = {"base": 100, "CUDA context": 7, "allocator's slack": 5, "a layer at work": 30, "peak": 142}
    plan = Plan(1, ("all",), account=account, host={"kept activations": 3, "streamed base": 4}, managed=2, at="head")
    told = predicted(plan)
    assert (told["reserved"], told["allocated"], told["managed"], told["host"]) == (135, 130, 2, 7)
    assert "peak" not in told["parts"]
