"""``bench.memory`` runs end to end on a tiny model on a CPU, and its cases tell why there is no result where there is none."""

from __future__ import annotations

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig

from bench import memory, memory_parts, mistral, rows
from bench.memory_case import CONTEXT_BYTES, Case, peak, play, predicted, reset_peak
from bench.memory_context import longest, one_row, plan_context
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.dataset import prepare
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

    goals = parts["goals"]
    assert goals["sft, inputs offloaded"]["plan"]["offload"] == 3
    assert goals["sft, streamed"]["plan"]["stream"] and goals["sft, streamed"]["predicted"]["host"] > 0
    for case in [*parts["cards"].values(), goals["dpo"]]:
        plan = case["plan"]
        assert case["predicted"]["reserved"] == plan["account"]["peak"] > 0  # no context on a CPU
        assert case["measured"]["reserved"] > 0 and case["measured"]["allocated"] is None
        assert len(case["seconds"]) == 2 and not case["adapted"]
    modes = goals["reference"]["modes"]
    assert set(modes) == {"together", "own"}
    assert all(m["cost"] == m["with_reference"] - m["policy"] for m in modes.values())
    assert goals["reference"]["kept_by_a_pass"] >= 3 * goals["reference"]["a_hidden_state"]

    speeds = parts["speed"]
    assert all(list(case["tokens_per_second"]) == ["102", "409"] for case in speeds.values())
    assert speeds["streamed"]["plan"]["stream"] and not speeds["resident"]["plan"]["stream"]
    start = parts["start"]["start"]
    assert start["seconds"] == pytest.approx(start["imports"] + start["opening"] + start["first_step"], abs=1e-3)
    assert start["base_bytes"] > 0

    context = parts["context"]
    assert context["8 GB: on two layers"]["tokens"] == context["24 GB: by the plan"]["tokens"] == 128
    assert context["8 GB: on two layers"]["host"]["kept activations"] == 128 * 3 * 64 * 4
    whole = context["24 GB: a step of the whole model"]
    assert whole["tokens"] == 128 and len(whole["plan"]["keep"]) == 3

    assert all(target["reached"] is None and target["met"] is None for target in results["targets"])
    assert "say nothing of a plan" in printed and "wanted and reached" in printed
    assert "128 tokens a row" in printed and "tokens/s" in printed


def test_one_part_alone_and_no_time(tmp_path, capsys):
    results = memory.main(["--tiny", "--parts", "start", "--minutes", "0.0001"])
    assert results["parts"] == {
        "start": {"start": {"kind": "late", "error": results["parts"]["start"]["start"]["error"]}}
    }
    assert "NO RESULT (late)" in capsys.readouterr().out


@CPU_ONLY
def test_no_card_is_said():
    with pytest.raises(UserError, match="NVIDIA card"):
        memory.main([])


def test_arguments():
    with pytest.raises(UserError, match="--cards -1"):
        memory.arguments(["--cards", "-1", "8"])
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


# -- the longest context -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1023, 1024, 5000, 70_000, 99_999, 131_072, 10**9])
def test_longest(limit):
    tried = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= limit

    found = longest(fits, 1024, 131_072)
    best = min(limit, 131_072) // 1024 * 1024
    assert found % 1024 == 0 and found <= best and best - found <= max(0, best / 32)
    assert len(tried) <= 2 * math.log2(131_072 / 1024) + 2 and len(set(tried)) == len(tried) and max(tried) <= 131_072


def test_by_the_plan_more_memory_holds_more(tmp_path):
    MistralConfig(**mistral.MISTRAL_7B).save_pretrained(tmp_path)
    values = {"model_name_or_path": str(tmp_path), "optim": "adamw_8bit"}
    limits = {"host": 64, "step": 1024, "most": 2**17}
    found = {c: plan_context(values, c, (8, 6), torch.bfloat16, **limits)["tokens"] for c in (6, 8, 24)}
    assert 0 < found[6] < found[8] < found[24]
    little = plan_context(values, 24, (8, 6), torch.bfloat16, **{**limits, "host": 1})
    assert little["tokens"] < found[24] and little["host_limit"] == 2**30


def test_one_row_is_one_segment_and_a_written_one_is_as_long(tmp_path):
    batch = one_row(100, 320)
    assert len(batch) == 100 and len(batch.segments) == 1 and batch.target_ids.numel() == 99
    template = resolve_template("auto", mistral.make_tokenizer(320))
    rows.write_row(tmp_path / "row.jsonl", template, 500)
    config = RunConfig(max_length=500)
    data = prepare([DatasetSpec(path=str(tmp_path / "row.jsonl"))], "sft", config, template)
    assert list(data.lengths) == [500] and data.examples[0].mask.sum() > 400


# -- what is wanted ----------------------------------------------------------------------------------------------------


def case_of(reserved: float, told: float, **more) -> dict:
    gib = 2**30
    measured = {"reserved": reserved * gib, "allocated": reserved * gib, "managed": 0}
    return {"measured": measured, "predicted": {"reserved": told * gib}, **more}


def test_targets():
    modes = {"together": {"cost": 3 * 2**20}, "own": {"cost": 0}}
    results = {
        "on_a_card": True,
        "parts": {
            "goals": {
                "sft, inputs offloaded": case_of(4.9, 5.0),
                "sft, streamed": {"kind": "memory", "error": "full"},
                "dpo": case_of(8.5, 8.0),
                "reference": {"modes": modes, "a_hidden_state": 2**20},
            },
            "cards": {"sft at 8 GB": case_of(7.0, 7.2), "dpo at 8 GB": case_of(7.0, 6.0)},
            "speed": {
                "resident": {"tokens_per_second": {1024: 10.0, 4096: 10.0}},
                "streamed": {"tokens_per_second": {1024: 5.0, 4096: 9.5}},
            },
            "context": {
                "8 GB: by the plan": {"tokens": 30_000},
                "8 GB: a step of the whole model": case_of(7, 7, tokens=30_000),
            },
            "start": {"start": {"kind": "late", "error": "…"}},
        },
    }
    met = {target["what"]: (target["reached"], target["met"]) for target in memory_parts.targets(results)}
    found = list(met.values())
    assert found[0] == (pytest.approx(4.9), True)
    assert found[1] == (None, None) and found[2] == (pytest.approx(8.5), False)
    assert [m for _, m in found[3:5]] == [False, True]  # three hidden states, none
    assert met["sft at 8 GB: predicted and reserved differ by"][1] is True
    assert met["dpo at 8 GB: predicted and reserved differ by"] == (pytest.approx(1 / 6), False)
    assert met["streamed over resident tokens/s at 4096 tokens"] == (0.95, True)
    assert met["8 GB: tokens of a row that trains"] == (30_000, True)
    assert "24 GB: tokens of a row that trains" not in met
    assert found[-1] == (None, None)
    assert CONTEXT_BYTES == 0.75 * 2**30
