"""The planner: what it chooses, what it leaves to the user, what it refuses and with which cure; `zephyr-lite plan`."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tests.messages import messages_to
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import MemorySpec, RunConfig, dump_config, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory import forecast
from zephyr_lite.memory import machine as machine_file
from zephyr_lite.memory.estimate import CONTEXT_BYTES, GIB, estimate
from zephyr_lite.memory.forecast import MISTRAL_SHAPE, expected_job
from zephyr_lite.memory.gpus import CARDS, find_gpu, gpu_of_size
from zephyr_lite.memory.machine import (
    HOST_ELSEWHERE,
    Machine,
    of_card,
    parse_size,
    peak_memory,
    process_memory,
    reset_peak_memory,
    this_machine,
)
from zephyr_lite.memory.plan import (
    MARGIN,
    MIXTURES,
    TIE,
    WORTH_THE_HOST,
    Limits,
    Plan,
    feasible,
    fitting,
    make_plan,
    smaller,
    with_rank,
)
from zephyr_lite.memory.speed import step_time
from zephyr_lite.memory.workload import AdapterSpec, Workload, make_workload
from zephyr_lite.model.execution import ExecutionConfig
from zephyr_lite.model.families import Shape
from zephyr_lite.model.peft_io import LoraWeights, adapter_sha256, write_adapter

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
RECORDED = json.loads((Path(__file__).parent / "recorded.json").read_text())
FREE = MemorySpec()


def mistral(method="sft", *words, dtype=torch.bfloat16) -> Workload:
    config = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit", *words]).config
    return expected_job(method, config, MISTRAL_SHAPE, dtype)


def limits_of(job: Workload, machine: Machine) -> Limits:
    return Limits.of(job, machine, FREE)


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("size", [6, 8, 12, 16, 24])
def test_every_plan_fits_and_says_what_it_takes(size, method):
    machine, job = of_card(gpu_of_size(size), f"{size}GiB"), mistral(method)
    plan = make_plan(job, machine, FREE)
    assert plan.peak <= size * GIB * (1 - MARGIN)
    assert plan.peak == sum(n for name, n in plan.account.items() if name != "peak")
    assert plan.account["CUDA context"] == CONTEXT_BYTES
    assert sum(plan.host.values()) <= HOST_ELSEWHERE
    assert plan.peak == estimate(job, plan, machine.device(job.dtype)).peak
    assert plan.micro_tokens >= job.longest and len(plan.keep) == 32
    assert Plan(**json.loads(json.dumps(plan.as_dict()))) == plan


@pytest.mark.parametrize("words", [[], ["max_length=8192"]])
def test_more_memory_is_never_slower(words):
    """But for what is as good as equally fast; of one card, and of the cards that --vram alone means."""
    same = [of_card(CARDS["4090"], f"{n}GiB") for n in (5.25, 7.5, 8, 24)]
    series = [of_card(gpu_of_size(n), f"{n}GiB") for n in (6, 8, 12, 24, 80)]
    for machines in (same, series):
        speeds = [make_plan(mistral("sft", *words), machine, FREE).tokens_per_second for machine in machines]
        assert all(later >= earlier * (1 - 2 * WORTH_THE_HOST - TIE) for earlier, later in pairwise(speeds))


def test_nothing_goes_to_the_host_where_the_card_has_room():
    plan = make_plan(mistral(), of_card(CARDS["h100"]), FREE)
    assert not plan.offload and not plan.stream and plan.tile is None and set(plan.keep) == {"all"}
    assert plan.host == {} and plan.scratch == "layer" and not plan.recomputes


def test_offload_or_recompute_is_decided_by_the_link():
    """`all` on the host where copies are fast, recomputation where they are slow."""
    job = mistral()
    fast = make_plan(job, of_card(CARDS["3090"], "10GiB"), FREE)
    assert fast.offload > 0 and set(fast.keep) == {"all"}
    slow = make_plan(job, of_card(replace(CARDS["3090"], pcie=0.5), "10GiB"), FREE)
    assert slow.offload == 0 and slow.recomputes


def test_without_a_host_layers_keep_different_things():
    machine = replace(of_card(CARDS["3090"], "11GiB"), host=0)
    plan = make_plan(mistral(), machine, FREE)
    assert len(set(plan.keep)) == 2 and (plan.keep[-1], plan.keep[0]) in MIXTURES and plan.offload == 0


def test_a_long_example_is_planned_with_the_mlp_in_tiles():
    job = mistral("sft", "max_length=49152")
    plan = make_plan(job, replace(of_card(CARDS["3090"]), host=0), FREE)
    assert plan.micro_tokens >= 49152 and plan.tile is not None and plan.peak <= 24 * GIB


@pytest.mark.parametrize(("size", "method", "speed"), [row[:3] for row in RECORDED["ladder"]])
def test_no_plan_is_slower_than_the_recorded_search_found(size, method, speed):
    plan = make_plan(mistral(method), of_card(gpu_of_size(size), f"{size}GiB"), FREE)
    assert plan.tokens_per_second >= 0.98 * speed


@pytest.mark.parametrize(("size", "host"), [(5, 2), (8, 7), (12, 12)])
def test_no_setting_that_the_search_leaves_out_is_better(size, host):
    """Against every number of layers, of some settings."""
    job, machine = mistral("sft", "max_length=24576"), of_card(CARDS["3090"], f"{size}GiB")
    limits = replace(limits_of(job, machine), host=host * GIB)
    assert feasible(job, limits, FREE) == any(True for _ in fitting(job, limits, FREE))
    if not feasible(job, limits, FREE):
        return
    plan = make_plan(job, replace(machine, host=host * GIB), FREE)
    for n in range(33):
        for keep, offload in ((("all",) * 32, n), (("input",) * n + ("all",) * (32 - n), 0)):
            other = replace(plan, keep=keep, offload=offload)
            found = estimate(job, other, limits.device)
            if found.peak <= limits.budget and sum(found.host.values()) <= limits.host:
                assert step_time(job, other, limits.card).step >= step_time(job, plan, limits.card).step * 0.9


# -- smaller ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_smaller_plans_take_ever_less_until_none_is_left(method):
    job, machine = mistral(method), of_card(CARDS["4090"])
    shape = replace(job.shape, layers=4)
    job = replace(job, shape=shape, adapters=(AdapterSpec.fresh(shape, 16),))
    limits, plan, peaks = limits_of(job, machine), make_plan(job, machine, FREE), []
    tokens = plan.micro_tokens
    while plan is not None:
        peaks.append(plan.peak)
        tokens = min(tokens, plan.micro_tokens)
        last, plan = plan, smaller(plan, job, limits, FREE, tokens=tokens, several=False, training=True)
        assert plan is None or (plan.stream >= last.stream and sum(plan.host.values()) <= limits.host)
    assert peaks == sorted(peaks, reverse=True) and 3 < len(set(peaks)) == len(peaks) < 40
    least = [found.peak for _, found in fitting(job, limits, FREE, most=math.inf, least=True)]
    assert peaks[-1] <= 1.01 * min(least)


def test_examples_that_do_not_fit_beside_each_other_run_alone():
    job, machine = mistral(), of_card(CARDS["4090"])
    least = ExecutionConfig(2048, ("input",) * 32, 32, True, 512, "small", "own")
    plan = Plan(**vars(least))
    limits = replace(limits_of(job, machine), host=2**40)
    alone = smaller(plan, job, limits, FREE, tokens=2000, several=True, training=True)
    assert alone == replace(plan, micro_tokens=1)
    assert smaller(alone, job, limits, FREE, tokens=1000, several=False, training=True) is None


def test_an_evaluation_that_does_not_fit_keeps_what_training_keeps():
    """Nothing is kept without a backward pass: fewer tokens at once, and no recomputation."""
    job, machine = mistral(), of_card(CARDS["h100"])
    plan = make_plan(job, machine, FREE)
    found = smaller(plan, job, limits_of(job, machine), FREE, tokens=plan.micro_tokens, several=True, training=False)
    assert found.keep == plan.keep and not found.offload and found.micro_tokens <= plan.micro_tokens


# -- what the user fixed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fixed",
    [{"keep": "attention"}, {"micro_tokens": 3000}, {"offload": True}, {"offload": False}, {"stream": True}],
)
def test_what_the_user_fixed_stays(fixed):
    plan = make_plan(mistral(), of_card(CARDS["3090"], "16GiB"), MemorySpec(**fixed))
    ((name, value),) = fixed.items()
    found = {"keep": plan.keep[0], "micro_tokens": plan.micro_tokens, "offload": plan.offload, "stream": plan.stream}
    if name == "offload":
        assert plan.offload == (32 if value else 0)
    else:
        assert found[name] == value and (name != "keep" or len(set(plan.keep)) == 1)


def test_a_budget_for_the_host_is_kept():
    machine = of_card(CARDS["3060"])
    much, little = (make_plan(mistral(), machine, MemorySpec(host=h)) for h in ("16GiB", "2GiB"))
    assert sum(little.host.values()) <= 2 * GIB < sum(much.host.values()) and little.peak <= machine.free


@pytest.mark.parametrize(
    ("text", "bytes_"), [("8GiB", 8 * GIB), ("8", 8 * GIB), ("7.5 gb", int(7.5 * GIB)), ("512MiB", 2**29)]
)
def test_sizes(text, bytes_):
    assert parse_size(text, "x") == bytes_


@pytest.mark.parametrize("text", ["", "many", "8KiB", "-1GiB", "0GiB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=r"memory\.vram: .* is no size"):
        of_card(CARDS["3060"], text)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_missing_and_its_cures_cure():
    machine = of_card(CARDS["3060"], "7GiB")
    spec = MemorySpec(stream=False)
    job = mistral("sft", "optim=adamw_torch", "lora_r=64")
    with pytest.raises(UserError) as caught:
        make_plan(job, machine, spec)
    missing = float(re.search(r"([\d.]+) GiB are missing", caught.value.message)[1])
    assert missing > 0 and "decoder layers 3.35" in caught.value.message
    hint = caught.value.hint
    cures = hint.removeprefix("Any one of these is enough: ").removesuffix(".").split("; ")
    assert {cure.split("=")[0] for cure in cures} >= {"memory.stream left to the plan", "optim", "lora_r"}
    for cure in cures:
        changed, there, fixed = job, machine, spec
        if found := re.fullmatch(r"memory\.(\w+) left to the plan", cure):
            fixed = spec.model_copy(update={found[1]: None})
        elif found := re.fullmatch(r"optim=(\w+)", cure):
            changed = replace(job, optim=found[1])
        elif found := re.fullmatch(r"lora_r=(\d+)", cure):
            changed = with_rank(job, int(found[1]))
        elif found := re.fullmatch(r"max_length=(\d+)", cure):
            changed = replace(job, longest=int(found[1]))
        else:
            there = of_card(CARDS["3060"], re.fullmatch(r"a card of (\d+) GB", cure)[1])
        assert feasible(changed, limits_of(changed, there), fixed), cure


def test_too_little_main_memory_is_said():
    """With the number named it fits, with a little less it does not; the cure is that number."""
    machine = replace(of_card(CARDS["3060"], "4GiB"), host=GIB)
    with pytest.raises(UserError, match="GiB in main memory") as caught:
        make_plan(mistral(), machine, FREE)
    needed = float(re.search(r"with ([\d.]+) GiB in main memory", caught.value.message)[1])
    make_plan(mistral(), replace(machine, host=int((needed + 0.006) * GIB)), FREE)
    with pytest.raises(UserError):
        make_plan(mistral(), replace(machine, host=int((needed - 0.006) * GIB)), FREE)
    assert f"memory.host={math.ceil(needed)}GiB" in caught.value.hint


def test_more_tokens_at_once_than_a_step_has_are_a_step():
    plan = make_plan(mistral(), of_card(CARDS["3060"]), MemorySpec(micro_tokens=1_000_000))
    assert plan.micro_tokens == 8 * 2048
    with pytest.raises(UserError, match="a micro-batch of 16,384 tokens"):
        make_plan(mistral(), of_card(CARDS["3060"], "5GiB"), MemorySpec(micro_tokens=1_000_000, stream=False))


def test_a_cpu_and_another_engine_are_never_refused():
    shape = Shape.of(tiny_config())
    job = Workload(
        shape,
        torch.float32,
        "dense",
        (AdapterSpec.fresh(shape, 4),),
        "adamw_torch",
        False,
        "sft",
        longest=10,
    )
    cpu = Machine("cpu", "the CPU", CARDS["3060"], 1000, 1000)
    assert make_plan(job, cpu, FREE).micro_tokens == 10
    card = replace(of_card(CARDS["3060"]), free=1000)
    plan = make_plan(replace(job, engine="trl"), card, FREE)
    assert plan.micro_tokens == 10 and not plan.offload and not plan.stream and plan.account == {}


# -- a CPU stays what it was -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, 3000])
def test_a_cpu_keeps_all_and_runs_2048_tokens(monkeypatch, length):
    monkeypatch.setattr("zephyr_lite.memory.machine.free_memory", lambda device: 16 * GIB)
    config = RunConfig(load_in_4bit=False)
    job = make_workload(config, "sft", tiny_config(), torch.float32, longest=length)
    plan = make_plan(job, this_machine(torch.device("cpu"), job.dtype, config.memory), config.memory)
    assert set(plan.keep) == {"all"} and plan.micro_tokens == max(2048, length)
    assert (plan.offload, plan.stream, plan.tile, plan.reference) == (0, False, None, "together")


def test_a_configuration_that_lacks_names_is_planned_for_other_engines():
    class Strange:
        hidden_size, num_hidden_layers, num_attention_heads = 64, 3, 4

    config = RunConfig(engine="trl", lora_target_modules=["query_key_value"])
    job = make_workload(config, "sft", Strange(), torch.float32)
    plan = make_plan(job, this_machine(torch.device("cpu"), job.dtype, config.memory), config.memory)
    assert len(plan.keep) == 3 and plan.bytes_per_token > 0 and plan.free_bytes > 0


# -- cards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("RTX 4090", "4090"),
        ("a100-80", "a100-80"),
        ("A100 80GB", "a100-80"),
        ("nvidia T4", "t4"),
        ("RTX2060", "rtx2060"),
        ("3060 12GB", "3060"),
        ("a100", "a100-40"),
        ("V100", "v100-16"),
        ("4060 Ti 16GB", "4060ti-16"),
    ],
)
def test_cards_are_found_as_people_spell_them(said, name):
    assert find_gpu(said).name == name


def test_an_unknown_card_lists_the_known_ones():
    with pytest.raises(UserError) as caught:
        find_gpu("tnt2")
    assert all(name in caught.value.hint for name in CARDS)


@pytest.fixture
def processor(monkeypatch):
    """Measures a CPU anew whose products, exponentials and dequantized numbers a second are given."""

    def measured(*rates: float) -> Machine:
        found = iter(rates)
        monkeypatch.setattr(machine_file, "_rate", lambda device, run, amount: run() is None or next(found))
        machine_file._processor.cache_clear()
        return this_machine(torch.device("cpu"), torch.float32, FREE)

    yield measured
    machine_file._processor.cache_clear()


def test_a_cpu_is_measured_and_planned_for(processor):
    machine = processor(1.98e11, 2.04e10, 3.03e9)
    card = machine.card
    assert (card.tflops, card.bandwidth, card.unpacking, card.measured) == (0.2, 20, 3, True)
    assert this_machine(torch.device("cpu"), torch.float32, FREE).card is card  # not measured again
    assert not this_machine(torch.device("cpu"), torch.float32, FREE, measure=False).card.measured
    for storage in ("dense", "nf4"):
        job = make_workload(
            RunConfig(), "sft", tiny_config(hidden_size=512), torch.float32, storage=storage, run_tokens=10**7
        )
        speeds = [
            make_plan(job, replace(machine, card=replace(card, **slower)), FREE).tokens_per_second
            for slower in ({}, {"unpacking": 0.03}, {"tflops": 0.1})
        ]
        assert speeds[2] < speeds[0] and (speeds[1] < speeds[0]) == (storage == "nf4")
        plan = make_plan(job, machine, FREE)
        said = " ".join(forecast.forecast_lines(job, machine, plan, RunConfig()))
        minutes = re.escape(forecast.duration(1e7 / plan.tokens_per_second))
        assert re.search(rf"tokens/s \(from a short measurement of this CPU\).*about {minutes} of steps", said)


def test_the_plan_of_a_cpu_counts_the_process_as_the_measured_peak_does(processor):
    machine = processor(2e11, 2e10, 3e9)
    job = make_workload(RunConfig(), "sft", tiny_config(), torch.float32)
    plan = make_plan(job, machine, FREE)
    tensors = make_plan(job, replace(machine, free=machine.free - machine.context, context=0), FREE)
    assert plan.account["process"] == machine.context > 2**26
    assert plan.peak == machine.context + tensors.peak and plan.free_bytes == tensors.free_bytes
    assert replace(plan, account={}) == replace(tensors, account={})
    assert peak_memory(torch.device("cpu")) >= machine.context
    little = this_machine(torch.device("cpu"), torch.float32, MemorySpec(vram="100MiB"))
    assert little.free - little.context == 100 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a process's peak")
def test_the_measured_peak_of_a_cpu_leaves_out_what_was_before():
    cpu, size = torch.device("cpu"), 256 * 2**20
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.ones(size, dtype=torch.uint8)
    assert peak_memory(cpu) >= before + 0.9 * size
    process_memory(cpu)  # returns what was freed to the system
    reset_peak_memory(cpu)
    assert peak_memory(cpu) < before + 0.5 * size


@pytest.mark.gpu
def test_this_card_is_measured_and_planned_for():
    device = torch.device("cuda", torch.cuda.current_device())
    machine = this_machine(device, torch.float16, FREE)
    card = machine.card
    assert card.measured and card.tflops > 1 and card.bandwidth > 20 and 0.5 < card.pcie < 200
    plan = make_plan(mistral(dtype=torch.float16), machine, FREE)
    assert 0 < plan.peak <= machine.free


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def run(*words):
        code = cli.run(["plan", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_plan_prints_a_table_for_a_card(said):
    code, out, _ = said("--gpu", "3060", "--price", "0.2", "optim=adamw_8bit")
    assert code == 0
    for text in (
        "plan of sft on 3060",
        "plan of dpo on 3060",
        "base: decoder layers",
        "3.35",
        "together",
        "what was chosen",
        "main memory, locked",
        "tokens/s",
        "at $0.20 an hour",
        "disk:",
    ):
        assert text in out, text
    assert max(map(len, out.splitlines())) <= 80


def test_its_rows_add_up(said):
    _, out, _ = said("sft", "--vram", "8GiB")
    numbers = [
        float(line.split()[-1])
        for line in out.splitlines()
        if len(line) == 57 and "together" not in line and re.search(r"\d\.\d\d$", line)
    ]
    assert len(numbers) > 8
    (total,) = re.findall(r"together +(\d+\.\d+)  of 8\.00", out)
    assert sum(numbers) == pytest.approx(float(total), abs=0.005 * (len(numbers) + 1))


def test_one_stage_on_this_machine_from_a_folder(said, tiny_base):
    code, out, _ = said("dpo", f"model_name_or_path={tiny_base}", "max_length=64")
    assert code == 0 and "plan of dpo on the CPU" in out and "plan of sft" not in out and "--gpu 3060" in out


def test_dpo_is_planned_on_the_adapter_that_it_will_stand_on(said, tmp_path):
    """Of a run's finished SFT stage, or of a folder; a folder that is not there is refused."""
    shape = Shape.of(MISTRAL_SHAPE)
    ranks = {0: 3, 5: 7}
    modules = {
        f"model.layers.{i}.self_attn.q_proj": LoraWeights(
            torch.zeros(r, shape.hidden), torch.zeros(shape.queries, r), 1.0
        )
        for i, r in ranks.items()
    }
    write_adapter(tmp_path / "own", modules, base_model_name="x")
    config = load_config("dpo", None, [f"adapters={tmp_path / 'own'}"]).config
    below, notes = forecast._below("dpo", config, shape)
    assert [dict(below[0].ranks[i]) for i in (0, 1, 5)] == [{"q_proj": 3}, {}, {"q_proj": 7}] and not notes
    code, out, _ = said("dpo", "--gpu", "3060", f"adapters={tmp_path / 'own'}", "optim=adamw_8bit")
    assert code == 0 and "assuming rank" not in out
    code, _, err = said("dpo", "--gpu", "3060", f"adapters={tmp_path / 'none'}")
    assert code == 2 and "adapter_config.json" in err
    code, out, _ = said("dpo", "--gpu", "3060", "adapters=some/body")
    assert code == 0 and "some/body is not downloaded: assuming rank 16" in out
    code, out, _ = said("dpo", "--gpu", "3060", f"output_dir={tmp_path / 'run'}")
    assert code == 0 and "assuming rank 16 for the SFT adapter below" in out


def test_dpo_is_planned_on_the_run(said, tmp_path, tiny_base, monkeypatch):
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
    real = forecast.make_plan
    monkeypatch.setattr(forecast, "make_plan", lambda job, *rest: seen.append(job) or real(job, *rest))
    code, out, err = said("dpo", f"output_dir={tmp_path / 'run'}", "max_length=64")
    assert code == 0, err
    assert str(tiny_base) in out.replace("\n    ", "") and "assuming rank" not in out
    assert [dict(r) for r in seen[0].adapters[0].ranks] == [{}, {"up_proj": 5}] and seen[0].shape.hidden == 64


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--gpu", "tnt2"], "no card of that name"),
        (["--vram", "lots"], "is no size"),
        (["model_name_or_path=some/where"], "config.json"),
        (["lora_rr=3"], "lora_rr"),
        (["engine=trl"], "only the fused engine"),
        (["--gpu", "3060", "--vram", "3GiB", "memory.stream=false"], "GiB are missing"),
        (["--gpu", "3060", "--price", "-1"], "is not a price"),
        (["--gpu", "3060", "--price", "nan"], "is not a price"),
        (["--vram", ""], "is no size"),
        (["--gpu", "3060", "lora_target_modules=[foo]"], "'foo' is none of"),
        (["--gpu", "3060", "dtype=float64"], "4-bit weights are not computed in 64 bits"),
    ],
)
def test_what_is_wrong_is_said(said, words, wrong):
    code, _, err = said("sft", *words)
    assert code == 2 and wrong in err


def test_a_word_that_is_no_stage(said):
    code = cli.run(["plan", "foo"])
    assert code == 2
    assert forecast.stages_of(["DPO", "lora_r=8"]) == (("dpo",), ["lora_r=8"])
    assert forecast.stages_of(["lora_r=8"]) == (("sft", "dpo"), ["lora_r=8"])
    with pytest.raises(UserError, match="no such stage") as caught:
        forecast.stages_of(["foo"])
    assert "sft, dpo or both" in caught.value.hint


def test_a_file_is_planned_for_the_stage_that_it_is_for(tmp_path):
    assert forecast.stages_of([], "zephyr-7b/paper-dpo")[0] == ("dpo",)
    assert forecast.stages_of([], "zephyr-7b/sft")[0] == ("sft",)
    own = tmp_path / "mine.yaml"
    own.write_text("beta: 0.1\n")
    assert forecast.stages_of([], str(own))[0] == ("dpo",)
    own.write_text("lora_r: 8\n")
    assert forecast.stages_of([], str(own))[0] == ("sft", "dpo")


@pytest.mark.parametrize("words", [["--gpu", "3060"], ["-c", "zephyr-7b/sft"], ["engine=trl"], ["sft"]])
def test_what_the_ladder_fixes_is_refused(capsys, words):
    assert cli.run(["plan", *words, "--ladder"]) == 2
    assert "cannot be set" in capsys.readouterr().err


@pytest.mark.parametrize("engine", ["trl", "unsloth"])
@pytest.mark.parametrize("word", ["stream=true", "offload=false", "host=1GiB", "vram=8GiB"])
def test_what_another_engine_does_not_read_is_refused(engine, word):
    with pytest.raises(UserError, match=f"memory.{word.split('=')[0]} has no effect with engine {engine}"):
        load_config("sft", None, [f"engine={engine}", f"memory.{word}"])
    load_config("sft", None, [f"engine={engine}", "memory.keep=input", "memory.micro_tokens=100"])


def test_a_stage_says_the_same_plan_before_it_loads_anything(monkeypatch, tiny_base, chat_rows, tmp_path):
    """The lines of a dry run and of a run are the forecast's; and what does not fit is refused before the base is read."""
    from zephyr_lite.train import setup

    words = [
        f"model_name_or_path={tiny_base}",
        f"dataset={chat_rows}",
        "max_length=128",
        "chat_template=zephyr",
        f"output_dir={tmp_path / 'r'}",
        "load_in_4bit=false",
    ]
    loaded = load_config("sft", None, words)
    lines: list[str] = []
    with messages_to(lines.append):
        stage = setup.setup_stage("sft", loaded, claim=False)
    wanted = [line for line in lines if line.startswith("plan of sft on the CPU")]
    assert wanted and lines.index(wanted[0]) < next(i for i, line in enumerate(lines) if line.startswith("loading"))
    assert stage.plan.peak > 0 and "  what was chosen" not in lines
    monkeypatch.setattr(setup, "this_machine", lambda *a, **k: of_card(CARDS["3060"], "0.78GiB"))
    monkeypatch.setattr(setup, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match="iB are missing"), messages_to(lines.append):
        setup.setup_stage("sft", load_config("sft", None, [*words, "memory.micro_tokens=9000000"]))
    assert not (tmp_path / "r").exists()


def test_the_plans_parameters_are_the_stages(tiny_base, chat_rows, tmp_path):
    """Counted from the configuration, equal to what is attached; so is a frozen adapter's rank."""
    from zephyr_lite.train.setup import setup_stage

    for targets in ("all-linear", ["q_proj", "model.layers.1.mlp.down_proj"]):
        config = load_config(
            "sft",
            None,
            [
                f"model_name_or_path={tiny_base}",
                f"dataset={chat_rows}",
                "max_length=128",
                f"output_dir={tmp_path / 'r'}",
                "chat_template=zephyr",
            ],
        )
        config.config = config.config.model_copy(update={"lora_target_modules": targets})
        stage = setup_stage("sft", config, claim=False)
        job = make_workload(config.config, "sft", stage.base.model.config, stage.base.dtype)
        assert job.parameters == sum(p.numel() for p in stage.stack.parameters().values())
        layers = stage.base.model.model.layers
        adapters = [[m.weight for n, m in layer.named_modules() if n.endswith("lora_A.sft")] for layer in layers]
        assert max(job.ranks) == max(sum(a.shape[0] for a in of_layer) for of_layer in adapters)


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
