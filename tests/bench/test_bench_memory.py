"""``bench.memory`` runs end to end on a tiny model on a CPU, and its cases tell why there is no result where there is none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import memory, memory_parts, turns
from zephyr_lite.errors import UserError
from zephyr_lite.memory.plan import Plan

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU can say")


@CPU_ONLY
def test_tiny(tmp_path, capsys):
    out = tmp_path / "memory.json"
    memory.main(["--tiny", "--cards", "24", "8", "--rows", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert list(results["cases"]) == ["sft at 24 GB", "dpo at 24 GB", "sft at 8 GB", "dpo at 8 GB"]
    assert {name: case["error"] for name, case in results["cases"].items() if "error" in case} == {}
    assert not results["on_a_card"] and results["versions"]["torch"] and results["settings"]["tiny"]
    for case in results["cases"].values():
        assert case["predicted"]["reserved"] == case["plan"]["account"]["peak"] > 0  # no context on a CPU
        assert case["measured"]["reserved"] > 0 and case["measured"]["allocated"] is None
        assert len(case["seconds"]) == 2 and not case["adapted"]
    assert "say nothing of a plan" in printed


@CPU_ONLY
def test_no_time_and_no_card_are_said(capsys):
    results = memory.main(["--tiny", "--cards", "8", "--minutes", "0.0001"])
    assert {case["kind"] for case in results["cases"].values()} == {"late"}
    assert "NO RESULT (late)" in capsys.readouterr().out
    with pytest.raises(UserError, match="NVIDIA card"):
        memory.main([])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (UserError("no such model", "Name another."), "refused"),
        (ValueError("a bug"), "error"),
    ],
)
def test_why_there_is_no_result(error, kind, monkeypatch, tmp_path):
    def fails(*words):
        raise error

    monkeypatch.setattr(turns, "setup_stage", fails)
    values = {"output_dir": str(tmp_path)}
    found = memory_parts.play(turns.Variant("sft", "fused"), values, None, 60, here=True)
    assert found["kind"] == kind and ("Traceback" in found["error"]) == (kind == "error")


def test_what_is_predicted_leaves_out_what_no_allocator_sees():
    account = {"base": 100, "CUDA context": 7, "allocator's slack": 5, "a layer at work": 30, "peak": 142}
    plan = replace(Plan(1, ("all",)), account=account, host={"kept activations": 3, "streamed base": 4}, managed=2)
    told = memory_parts.predicted(plan.as_dict())
    assert (told["reserved"], told["allocated"], told["managed"], told["host"]) == (135, 130, 2, 7)
    assert "peak" not in told["parts"]
