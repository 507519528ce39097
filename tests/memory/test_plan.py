"""The planner: what it chooses, what it leaves to the user, what it refuses and with which cure; `zephyr-lite plan`."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from zephyr_lite.config.load import MemorySpec, RunConfig, dump_config, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory import forecast
from zephyr_lite.memory import machine as machine_file
from zephyr_lite.memory.estimate import estimate
from zephyr_lite.memory.expected import MISTRAL_SHAPE, expected_job
from zephyr_lite.memory.fitting import MARGIN, MIXTURES, feasible, fitting, least, single_changes
from zephyr_lite.memory.gpus import CARDS, CONTEXT_BYTES, GIB, find_gpu, gpu_of_size
from zephyr_lite.memory.machine import (
    HOST_ELSEWHERE,
    Machine,
    of_card,
    peak_memory,
    this_machine,
)
from zephyr_lite.memory.plan import TIE, WORTH_THE_HOST, Plan, fastest_change, make_plan, plan_run, run_seconds, smaller
from zephyr_lite.memory.workload import AdapterSpec, Workload
from zephyr_lite.model.families import Shape
from zephyr_lite.model.peft_io import LoraWeights, adapter_sha256, write_adapter

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
FREE = MemorySpec()


def mistral(method="sft", *words, dtype=torch.bfloat16) -> Workload:
    config = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit", *words]).config
    return expected_job(method, config, MISTRAL_SHAPE, dtype)


def card(name="3090", vram=None, dtype=torch.bfloat16, **memory) -> Machine:
    return of_card(CARDS[name], dtype, MemorySpec(vram=vram, **memory))


def plain(size: float) -> Machine:
    """What ``--vram`` alone means."""
    return of_card(gpu_of_size(size), gpu_of_size(size).dtype, MemorySpec(vram=f"{size}GiB"))


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "method", "speed"), [row[:3] for row in RECORDED["ladder"]])
def test_every_plan_fits_says_what_it_takes_and_is_as_fast_as_the_recorded_search_found(size, method, speed):
    machine, job = plain(size), mistral(method)
    plan = make_plan(job, machine, FREE)
    assert plan.peak <= size * GIB * (1 - MARGIN)
    assert plan.peak == sum(n for name, n in plan.account.items() if name != "peak")
    assert plan.account["CUDA context"] == CONTEXT_BYTES
    assert sum(plan.host.values()) <= HOST_ELSEWHERE
    assert plan.peak == estimate(job, plan, machine.device).peak
    assert plan.micro_tokens >= job.longest and len(plan.keep) == 32
    assert plan.tokens_per_second >= 0.98 * speed
    assert Plan(**json.loads(json.dumps(plan.as_dict()))) == plan


def test_more_memory_is_never_slower():
    """But for what is as good as equally fast; of one card, and of the cards that --vram alone means."""
    for machines in ([card("4090", f"{n}GiB") for n in (5.25, 7.5, 8, 24)], [plain(n) for n in (6, 8, 12, 24, 80)]):
        speeds = [make_plan(mistral(), machine, FREE).tokens_per_second for machine in machines]
        assert all(later >= earlier * (1 - 2 * WORTH_THE_HOST - TIE) for earlier, later in pairwise(speeds))


def test_what_is_chosen_follows_from_the_card():
    """Nothing goes to the host where the card has room; `all` goes there where copies are fast, and is recomputed where they are
    slow; without a host layers keep different things; a long example is planned with the MLP in tiles."""
    job, machine = mistral(), card("3090", "10GiB")
    room = make_plan(job, card("h100"), FREE)
    assert (room.offload, room.stream, room.tile, room.scratch, room.host) == (0, False, None, "layer", {})
    assert not room.recomputes
    fast = make_plan(job, machine, FREE)
    assert fast.offload > 0 and set(fast.keep) == {"all"}
    slow = make_plan(job, replace(machine, card=replace(machine.card, pcie=0.5)), FREE)
    assert slow.offload == 0 and slow.recomputes
    mixed = make_plan(job, replace(card("3090", "11GiB"), host=0), FREE)
    assert (mixed.keep[-1], mixed.keep[0]) in MIXTURES and mixed.offload == 0
    long = make_plan(mistral("sft", "max_length=49152"), replace(card(), host=0), FREE)
    assert long.micro_tokens >= 49152 and long.tile is not None and long.peak <= 24 * GIB


# -- smaller ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "cached", "said"),
    [
        ([], False, "would not save time"),
        (["num_train_epochs=2"], True, "that makes 2 epochs 16% shorter"),
        (["num_train_epochs=3", "max_steps=100"], False, "would not save time"),  # of 3,821 an epoch
        (["num_train_epochs=3", "precompute_ref_log_probs=false"], False, ""),
        (["num_train_epochs=3", "engine=trl"], False, ""),
        (
            ["num_train_epochs=3", "dataset=some/where"],
            True,
            "that makes 3 epochs 21% shorter",
        ),  # of any number of rows
        (["max_steps=100", "dataset=some/where"], False, ""),  # the number of epochs is unknown
    ],
)
def test_the_reference_is_cached_where_the_run_is_shorter_with_it(words, cached, said):
    """The pass that computes it takes as long as a live reference does in one epoch, and the predicted time has it."""
    config = load_config("dpo", "zephyr-7b/dpo", ["optim=adamw_8bit", *words]).config
    machine, live = card("3060"), expected_job("dpo", config, MISTRAL_SHAPE, torch.bfloat16)
    job, plan, why = plan_run(live, machine, FREE, config)
    assert (job.cached_reference, job.live_reference, bool(why)) == (cached, not cached, bool(said)) and said in why
    if cached and job.run_tokens is not None:
        one_epoch, speed = replace(job, epochs=1.0), make_plan(live, machine, FREE).tokens_per_second
        assert run_seconds(one_epoch, plan, machine) == pytest.approx(job.run_tokens / speed, rel=0.02)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_smaller_plans_take_ever_less_until_none_is_left(method):
    job, machine = mistral(method), card("4090")
    shape = replace(job.shape, layers=4)
    job = replace(job, shape=shape, adapters=(AdapterSpec.fresh(shape, 16),))
    plan, peaks = make_plan(job, machine, FREE), []
    tokens = plan.micro_tokens
    while plan is not None:
        peaks.append(plan.peak)
        tokens = min(tokens, plan.micro_tokens)
        last, plan = plan, smaller(plan, job, machine, FREE, tokens=tokens, several=False, training=True)
        assert plan is None or (plan.stream >= last.stream and sum(plan.host.values()) <= machine.host)
    assert peaks == sorted(peaks, reverse=True) and 3 < len(set(peaks)) == len(peaks) < 40
    smallest = [found.peak for _, found in fitting(job, machine, least(job, FREE), most=math.inf)]
    assert peaks[-1] <= 1.01 * min(smallest)


# -- what the user fixed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "planned"),
    [("keep", "attention", ("attention",) * 32), ("offload", True, 32), ("stream", True, True)],
)
def test_what_the_user_fixed_stays(name, value, planned):
    plan = make_plan(mistral(), card("3090", "16GiB"), MemorySpec(**{name: value}))
    assert getattr(plan, name) == planned


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_missing_and_its_cures_cure():
    machine, spec = card("3060", "7GiB"), MemorySpec(stream=False)
    job = mistral("sft", "optim=adamw_torch", "lora_r=64")
    with pytest.raises(UserError, match=r"[\d.]+ GiB are missing.*decoder layers 3\.35") as caught:
        make_plan(job, machine, spec)
    cures = caught.value.hint.removeprefix("Any one of these is enough: ").removesuffix(".").split("; ")
    changes = {text: changed for _, text, changed in single_changes(job, machine, spec)}
    assert {re.split(r"[=\d]| left", cure)[0] for cure in cures} >= {"memory.stream", "optim", "lora_r", "a card of "}
    assert all(feasible(*changes[cure]) for cure in cures)


def test_too_little_main_memory_is_said():
    """With the number named it fits, with a little less it does not; the cure is that number."""
    machine = replace(card("3060", "4GiB"), host=GIB)
    with pytest.raises(UserError, match="GiB in main memory") as caught:
        make_plan(mistral(), machine, FREE)
    needed = float(re.search(r"with ([\d.]+) GiB in main memory", caught.value.message)[1])
    make_plan(mistral(), replace(machine, host=int((needed + 0.006) * GIB)), FREE)
    with pytest.raises(UserError):
        make_plan(mistral(), replace(machine, host=int((needed - 0.006) * GIB)), FREE)
    assert f"memory.host={math.ceil(needed)}GiB" in caught.value.hint


# -- cards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RTX 4090", "4090"),
        ("A100 80GB", "a100-80"),
        ("a100", "a100-40"),
        ("4060 Ti 16GB", "4060ti-16"),
        ("DGX Spark", "gb10"),
    ],
)
def test_cards_are_found_as_people_spell_them(said, name):
    assert find_gpu(said) == CARDS[name]


def test_the_peak_of_a_cpu_run_where_the_system_does_not_record_it(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda path: "VmRSS:\t1 kB\n")
    assert peak_memory(torch.device("cpu")) > 2**25


@pytest.mark.gpu
def test_this_card_is_measured_and_planned_for():
    device = torch.device("cuda", torch.cuda.current_device())
    machine = this_machine(device, torch.float16, FREE)
    card = machine.card
    assert card.measured and card.tflops > 1 and card.bandwidth > 20 and 0.5 < card.pcie < 200
    plan = make_plan(mistral(dtype=torch.float16), machine, FREE)
    assert 0 < plan.peak <= machine.free


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_plan_is_short_and_the_rest_is_in_the_details(invoke):
    """Both stages on one screen."""
    code, out, _ = invoke("plan", "--gpu", "3060", "--price", "0.2")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[0] == "plan of sft on 3060: mistralai/Mistral-7B-v0.1, rank 16"
    assert re.fullmatch(r"  memory  fits: 11\.\d+ GiB of 12\.00 GiB at the peak, and 1\d\.\d+ GiB of RAM", lines[1])
    assert re.match(r"  time    about 7\.\d days, \$3\d\.\d+ at \$0\.20/h \(\d+ tokens/s by data sheets\)", lines[2])
    assert "--config zephyr-7b/overnight-sft: 6,000 of 207,865 rows" in lines[3]
    assert "plan of dpo on 3060: " in out and "decoder layers" not in out
    code, out, _ = invoke("plan", "sft", "--gpu", "3060", "--details")
    assert code == 0 and max(map(len, out.splitlines())) <= 80
    assert re.search(r"decoder layers +3\.35 GiB", out) and "what was chosen" in out


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--gpu", "tnt2"], "give its memory: --vram 16GiB"),
        (["model_name_or_path=some/where"], "there is no such folder"),
        (["--gpu", "3060", "--vram", "3GiB", "memory.stream=false"], "GiB are missing"),
        (["--gpu", "3060", "lora_target_modules=[foo]"], "'foo' is none of"),
        (["--gpu", "3060", "dtype=float64"], "4-bit weights are not computed in 64 bits"),
    ],
)
def test_what_is_wrong_is_said(invoke, words, wrong):
    code, _, err = invoke("plan", "sft", *words)
    assert code == 2 and wrong in err


# -- the README --------------------------------------------------------------------------------------------------------


def test_the_ladder_in_the_readme_is_the_planners():
    lines = forecast.ladder_lines([])
    assert "\n".join(lines) in README, "run `zephyr-lite plan --ladder` and put its table there"


@pytest.mark.parametrize("place", ["box/run", "elsewhere"])
def test_a_containers_limit_counts(tmp_path, place):
    """Of nested groups the tightest does; cached files are room; a group that is not there is the one at the top."""
    group = tmp_path / "group"
    assert machine_file.container_room(group, tmp_path) is None

    def write(folder, limit, used, cached, names=("memory.max", "memory.current", "inactive_file")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")

    group.write_text(f"0::/{place}\n")
    write(tmp_path, 9000, 1000, 200)
    write(tmp_path / "box", 1000, 500, 100)
    write(tmp_path / "box" / "run", "max", 300, 0)
    assert machine_file.container_room(group, tmp_path) == (600 if place == "box/run" else 8200)
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    write(tmp_path / "memory" / "box" / "run", 700, 500, 50, old)
    group.write_text("5:cpu,cpuacct:/\n4:memory:/box/run\n")
    assert machine_file.container_room(group, tmp_path) == 250


def test_dpo_is_planned_on_the_run(invoke, tmp_path, tiny_base, monkeypatch):
    """The finished stage's base and its adapter's rank."""
    stage = StageDir(tmp_path / "run" / "sft")
    config = RunConfig(model_name_or_path=str(tiny_base), output_dir=str(tmp_path / "run"))
    stage.path.mkdir(parents=True)
    stage.config.write_text(dump_config(config))
    modules = {"model.layers.1.mlp.up_proj": LoraWeights(torch.zeros(5, 64), torch.zeros(128, 5), 1.0)}
    write_adapter(stage.adapter, modules, base_model_name=str(tiny_base))
    info = {
        "status": "complete",
        "method": "sft",
        "adapters": [],
        "base": {"name_or_path": str(tiny_base)},
        "own": {"path": "adapter", "sha256": adapter_sha256(stage.adapter)},
    }
    (stage.path / "stage.json").write_text(json.dumps(info))
    seen = []
    real = forecast.plan_run
    monkeypatch.setattr(forecast, "plan_run", lambda job, *rest: seen.append(job) or real(job, *rest))
    code, out, err = invoke("plan", "dpo", f"output_dir={tmp_path / 'run'}", "max_length=64")
    assert code == 0, err
    assert str(tiny_base) in out.replace("\n    ", "") and "assuming rank" not in out
    assert [dict(r) for r in seen[0].adapters[0].ranks] == [{}, {"up_proj": 5}] and seen[0].shape.hidden == 64


# -- int8 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "times"), [("3060", 2.0), ("4090", 1.6), ("h200", 1.1)])
def test_int8_is_planned_as_faster_by_estimate(name, times):
    dtype = CARDS[name].dtype
    machine, job = card(name, dtype=dtype), mistral("sft", "memory.compute=int8", dtype=dtype)
    plan, other = make_plan(job, machine, FREE), make_plan(mistral(dtype=dtype), machine, FREE)
    assert plan.int8 and not other.int8 and "products with the base in int8" in plan.lines()
    assert times < plan.tokens_per_second / other.tokens_per_second < 3


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("t4", {}, "T4 has compute capability 7.5; int8 needs 8.0"),
        ("4090", {"shape": Shape(64, 192, 2, 8, 1, 8, 448)}, "no multiples of 16 × 64 (k_proj 8 × 64, v_proj 8 × 64)"),
        ("4090", {"shape": Shape(96, 128, 2, 3, 3, 32, 448)}, "no multiples of 16 × 64 (q_proj 96 × 96"),
    ],
)
def test_int8_is_refused_where_its_kernels_do_not_run(name, changes, what):
    job = mistral("sft", "memory.compute=int8", dtype=CARDS[name].dtype)
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        make_plan(replace(job, **changes), card(name), FREE)
    assert "Set memory.compute=16bit" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "compute", "shape", "better"),
    [
        ("4090", "16bit", Shape.of(MISTRAL_SHAPE), "int8"),
        ("4090", "int8", Shape(64, 128, 2, 2, 2, 32, 448), "16bit"),
        ("4090", "int8", Shape.of(MISTRAL_SHAPE), ""),
        ("t4", "16bit", Shape.of(MISTRAL_SHAPE), ""),  # int8 does not run there
    ],
)
def test_the_faster_products_are_suggested_by_estimate(name, compute, shape, better):
    job, machine = mistral("sft", f"memory.compute={compute}", dtype=CARDS[name].dtype), card(name)
    job = replace(job, shape=shape, adapters=(AdapterSpec.fresh(shape, 16),))
    times, text = fastest_change(make_plan(job, machine, FREE), job, machine, FREE)
    assert (text == f"by estimate, memory.compute={better}" and times > 1.05) if better else times < 1.05


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["engine=trl", "memory.stream=true"], "no effect with engine trl: memory.stream; only"),
        (["engine=unsloth", "memory.vram=8GiB"], "no effect with engine unsloth: memory.vram; only"),
        (["engine=trl", "memory.compute=int8"], "memory.compute int8 is for engine fused and a 4-bit base, not for"),
        (
            ["load_in_4bit=false", "memory.compute=int8"],
            "memory.compute int8 is for engine fused and a 4-bit base, not for",
        ),
    ],
)
def test_keys_without_effect_are_refused(words, wrong):
    with pytest.raises(UserError, match=wrong):
        load_config("sft", None, words)
    load_config("sft", None, [words[0], "memory.keep=input", "memory.micro_tokens=100", "memory.compute=16bit"])
