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
from transformers import AutoConfig

from tests.conftest import tiny_config
from tests.messages import messages_to
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import MemorySpec, RunConfig, dump_config, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory import expected, forecast
from zephyr_lite.memory import machine as machine_file
from zephyr_lite.memory.device import CONTEXT_BYTES, CPU, GIB
from zephyr_lite.memory.estimate import estimate
from zephyr_lite.memory.expected import MISTRAL_SHAPE, expected_job
from zephyr_lite.memory.gpus import CARDS, find_gpu, gpu_of_size
from zephyr_lite.memory.machine import (
    HOST_ELSEWHERE,
    Machine,
    of_card,
    parse_size,
    peak_memory,
    reset_peak_memory,
    this_machine,
)
from zephyr_lite.memory.plan import (
    MARGIN,
    MIXTURES,
    TIE,
    WORTH_THE_HOST,
    Plan,
    budget,
    fastest_change,
    feasible,
    fitting,
    make_plan,
    smaller,
    with_rank,
)
from zephyr_lite.memory.speed import attention_operations, step_time
from zephyr_lite.memory.workload import AdapterSpec, Workload, make_workload
from zephyr_lite.model.families import Shape
from zephyr_lite.model.peft_io import LoraWeights, adapter_sha256, write_adapter

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
MEMORY_PAGE = (Path(__file__).parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")
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


@pytest.mark.parametrize("words", [[], ["max_length=8192"]])
def test_more_memory_is_never_slower(words):
    """But for what is as good as equally fast; of one card, and of the cards that --vram alone means."""
    for machines in ([card("4090", f"{n}GiB") for n in (5.25, 7.5, 8, 24)], [plain(n) for n in (6, 8, 12, 24, 80)]):
        speeds = [make_plan(mistral("sft", *words), machine, FREE).tokens_per_second for machine in machines]
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


@pytest.mark.parametrize(("size", "host"), [(5, 2), (8, 7), (12, 12)])
def test_no_setting_that_the_search_leaves_out_is_better(size, host):
    """Against every number of layers, of some settings."""
    job, machine = mistral("sft", "max_length=24576"), card("3090", f"{size}GiB", host=f"{host}GiB")
    assert feasible(job, machine, FREE) == any(True for _ in fitting(job, machine, FREE))
    if not feasible(job, machine, FREE):
        return
    plan = make_plan(job, machine, FREE)
    for n in range(33):
        for keep, offload in ((("all",) * 32, n), (("input",) * n + ("all",) * (32 - n), 0)):
            other = replace(plan, keep=keep, offload=offload)
            found = estimate(job, other, machine.device)
            if found.peak <= budget(job, machine) and sum(found.host.values()) <= machine.host:
                assert step_time(job, other, machine.card)[0] >= step_time(job, plan, machine.card)[0] * 0.9


# the published sizes, and their billions of parameters (of the multimodal ones without the vision tower)
BASES = {
    "Qwen3-8B": ("qwen3", 8.19, {"intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}),
    "SmolLM3-3B": (
        "smollm3",
        3.08,
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
        | {"num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
    "gemma-3-4b": (
        "gemma3_text",
        3.88,
        {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8}
        | {
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
            "tie_word_embeddings": True,
        },
    ),
    "gemma-3-12b": (
        "gemma3_text",
        11.77,
        {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16}
        | {"head_dim": 256, "vocab_size": 262208, "sliding_window": 1024, "tie_word_embeddings": True},
    ),
    "Phi-4-mini": (
        "phi3",
        3.84,
        {"hidden_size": 3072, "intermediate_size": 8192, "num_attention_heads": 24, "sliding_window": 262144}
        | {"vocab_size": 200064, "tie_word_embeddings": True},
    ),
    "Ministral-3-8B": ("ministral3", 8.49, {"intermediate_size": 14336, "num_hidden_layers": 34, "vocab_size": 131072}),
}
COMMON = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}


@pytest.mark.parametrize("name", BASES)
def test_bases_of_other_families_on_common_cards(name):
    """Their sizes are the published ones; SFT fits into 8 GB, everything into 24, there faster and with the base on the card; the
    page on memory has their speeds."""
    kind, billions, sizes = BASES[name]
    config = AutoConfig.for_model(kind, **{**COMMON, **sizes})
    shape = Shape.of(config)
    heads = shape.head_weights * (1 if shape.tied else 2)
    assert (shape.layers * shape.layer_weights + heads) / 1e9 == pytest.approx(billions, rel=0.003)
    row = f"| {name} |"
    for method in ("sft", "dpo"):
        recipe = load_config(method, f"zephyr-7b/{method}", ["optim=adamw_8bit"]).config
        job = expected_job(method, recipe, config, torch.bfloat16)
        length = min(job.segment, job.longest)
        keys = [min(place, window or length) for window in shape.windows for place in range(1, length + 1)]
        seen = sum(keys) / len(keys)  # by a query, in a layer on average
        assert attention_operations(job) == pytest.approx(4 * shape.queries * seen, rel=0.01)
        large = make_plan(job, plain(24), FREE)
        assert large.peak <= 24 * GIB * (1 - MARGIN) and not large.stream
        if feasible(job, plain(8), FREE):
            small = make_plan(job, plain(8), FREE)
            assert small.peak <= 8 * GIB and small.tokens_per_second < large.tokens_per_second
            row += f" {small.tokens_per_second:,.0f} |"
        else:
            assert (name, method) == ("gemma-3-12b", "dpo")
            row += " does not fit |"
        row += f" {large.tokens_per_second:,.0f} |"
    assert row in MEMORY_PAGE


# -- smaller ones ------------------------------------------------------------------------------------------------------


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
    least = [found.peak for _, found in fitting(job, machine, FREE, most=math.inf, least=True)]
    assert peaks[-1] <= 1.01 * min(least)


def test_examples_that_do_not_fit_beside_each_other_run_alone():
    job, machine = mistral(), replace(card("4090"), host=2**40)
    plan = Plan(2048, ("input",) * 32, 32, True, 512, "small", "own")
    alone = smaller(plan, job, machine, FREE, tokens=2000, several=True, training=True)
    assert alone == replace(plan, micro_tokens=1)
    assert smaller(alone, job, machine, FREE, tokens=1000, several=False, training=True) is None


# -- what the user fixed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "planned"),
    [
        ("keep", "attention", ("attention",) * 32),
        ("micro_tokens", 3000, 3000),
        ("offload", True, 32),
        ("offload", False, 0),
        ("stream", True, True),
    ],
)
def test_what_the_user_fixed_stays(name, value, planned):
    plan = make_plan(mistral(), card("3090", "16GiB"), MemorySpec(**{name: value}))
    assert getattr(plan, name) == planned


def test_a_budget_for_the_host_is_kept():
    much, little = (make_plan(mistral(), card("3060", host=host), FREE) for host in ("16GiB", "2GiB"))
    assert sum(little.host.values()) <= 2 * GIB < sum(much.host.values()) and little.peak <= card("3060").free


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * GIB), ("8", 8 * GIB), ("7.5 gb", int(7.5 * GIB)), ("512MiB", 2**29)]
    + [(text, None) for text in ("", "many", "8KiB", "-1GiB", "0GiB")],
)
def test_sizes(text, size):
    if size is not None:
        assert parse_size(text, "x") == size
        return
    with pytest.raises(UserError, match=r"memory\.vram: .* is no size"):
        parse_size(text, "memory.vram")


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_refusal_says_what_is_missing_and_its_cures_cure():
    machine, spec = card("3060", "7GiB"), MemorySpec(stream=False)
    job = mistral("sft", "optim=adamw_torch", "lora_r=64")
    with pytest.raises(UserError) as caught:
        make_plan(job, machine, spec)
    missing = float(re.search(r"([\d.]+) GiB are missing", caught.value.message)[1])
    assert missing > 0 and "decoder layers 3.35" in caught.value.message
    cures = caught.value.hint.removeprefix("Any one of these is enough: ").removesuffix(".").split("; ")
    changes = {
        r"memory\.(\w+) left to the plan": lambda key: (job, machine, spec.model_copy(update={key: None})),
        r"optim=(\w+)": lambda optim: (replace(job, optim=optim), machine, spec),
        r"lora_r=(\d+)": lambda rank: (with_rank(job, int(rank)), machine, spec),
        r"max_length=(\d+)": lambda length: (replace(job, longest=int(length)), machine, spec),
        r"a card of (\d+) GB": lambda size: (job, card("3060", size), spec),
    }
    kinds = set()
    for cure in cures:
        ((kind, found),) = [(kind, m[1]) for kind in changes if (m := re.fullmatch(kind, cure))]
        kinds.add(kind)
        assert feasible(*changes[kind](found)), cure
    assert len(kinds) >= 4


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


def test_more_tokens_at_once_than_a_step_has_are_a_step():
    plan = make_plan(mistral(), card("3060"), MemorySpec(micro_tokens=1_000_000))
    assert plan.micro_tokens == 8 * 2048
    with pytest.raises(UserError, match="a micro-batch of 16,384 tokens"):
        make_plan(mistral(), card("3060", "5GiB"), MemorySpec(micro_tokens=1_000_000, stream=False))


def test_a_cpu_and_another_engine_are_never_refused(monkeypatch):
    job = make_workload(RunConfig(load_in_4bit=False), "sft", tiny_config(), torch.float32, longest=10)
    cpu = Machine("the CPU", CARDS["3060"], 1000, 1000, CPU)
    assert make_plan(job, cpu, FREE).micro_tokens == 10
    plan = make_plan(replace(job, engine="trl"), replace(card("3060"), free=1000), FREE)
    assert plan.micro_tokens == 10 and not plan.offload and not plan.stream


def test_trl_is_planned_roughly():
    """One row at a time, recomputed where a layer that takes three times as much does not fit; at half of the speed."""
    job, large = replace(mistral(), engine="trl"), make_plan(replace(mistral(), engine="trl"), card("h200"), FREE)
    assert set(large.keep) == {"all"} and large.micro_tokens == job.longest and not large.host
    plan = make_plan(job, card("3060"), FREE)
    fused = estimate(mistral(), plan, card("3060").device)
    assert set(plan.keep) == {"input"} and plan.micro_tokens == job.longest and fused.peak < plan.peak < 9 * GIB
    assert plan.tokens_per_second == pytest.approx(step_time(job, plan, CARDS["3060"])[1] / 2, rel=0.01)


# -- a CPU, and other engines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, 3000])
def test_a_cpu_keeps_all_and_runs_2048_tokens(monkeypatch, length):
    monkeypatch.setattr("zephyr_lite.memory.machine.free_memory", lambda device: 16 * GIB)
    config = RunConfig(load_in_4bit=False)
    job = make_workload(config, "sft", tiny_config(), torch.float32, longest=length)
    plan = make_plan(job, this_machine(torch.device("cpu"), job.dtype, config.memory), config.memory)
    assert set(plan.keep) == {"all"} and plan.micro_tokens == max(2048, length)
    assert (plan.offload, plan.stream, plan.tile, plan.reference) == (0, False, None, "together")


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
        ("NVIDIA GeForce RTX 4060 Ti", "4060ti-8"),
        ("NVIDIA RTX 6000 Ada Generation", "6000ada"),
        ("RTX A4000", "a4000"),
        ("DGX Spark", "gb10"),
        ("Tesla T4", "t4"),
    ],
)
def test_cards_are_found_as_people_spell_them(said, name):
    assert find_gpu(said).name == name


def test_cards_are_in_the_order_that_people_find_them_in():
    """Of the recipe's SFT; a T4 trains at 60 to 70 % of a 3060's speed."""
    cards = {name: CARDS[name] for name in ("t4", "3060", "3070", "3080", "3090", "4090", "5090")}
    jobs = {dtype: mistral(dtype=dtype) for dtype in (torch.float16, torch.bfloat16)}
    speeds = [make_plan(jobs[c.dtype], of_card(c, c.dtype, FREE), FREE).tokens_per_second for c in cards.values()]
    assert speeds == sorted(set(speeds)) and 0.6 < speeds[0] / speeds[1] < 0.7


@pytest.fixture
def processor(monkeypatch):
    """Replaces the measurement of a CPU by given rates: of products, exponentials and dequantized numbers."""
    rates = iter((0.2, 20.0, 3.0))
    monkeypatch.setattr(machine_file, "_rate", lambda device, run, amount: run() is None or next(rates))
    machine_file._processor.cache_clear()
    yield this_machine(torch.device("cpu"), torch.float32, FREE)
    machine_file._processor.cache_clear()


def test_a_cpu_is_measured_and_planned_for(processor):
    card = processor.card
    assert (card.tflops, card.bandwidth, card.unpacking, card.measured) == (0.2, 20, 3, True)
    assert this_machine(torch.device("cpu"), torch.float32, FREE).card is card  # not measured again
    assert not this_machine(torch.device("cpu"), torch.float32, FREE, measure=False).card.measured
    for storage in ("dense", "nf4"):
        config = RunConfig(load_in_4bit=storage == "nf4", bnb_4bit_use_double_quant=False)
        job = make_workload(config, "sft", tiny_config(hidden_size=512), torch.float32, run_tokens=10**7)
        speeds = [
            make_plan(job, replace(processor, card=replace(card, **slower)), FREE).tokens_per_second
            for slower in ({}, {"unpacking": 0.03}, {"tflops": 0.1})
        ]
        assert speeds[2] < speeds[0] and (speeds[1] < speeds[0]) == (storage == "nf4")
    said = " ".join(forecast.forecast_lines(job, processor, make_plan(job, processor, FREE), config))
    assert re.search(r"fits: .* free at the peak.*about .* tokens/s by a short measurement", said)


def test_the_plan_of_a_cpu_counts_the_process_as_the_measured_peak_does(processor):
    job, process = make_workload(RunConfig(), "sft", tiny_config(), torch.float32), processor.device.context
    plan = make_plan(job, processor, FREE)
    tensors = make_plan(job, replace(processor, free=processor.free - process, device=CPU), FREE)
    assert plan.account["process"] == process > 2**26
    assert plan.peak == process + tensors.peak and plan.free_bytes == tensors.free_bytes
    assert replace(plan, account={}) == replace(tensors, account={})
    assert peak_memory(torch.device("cpu")) >= process
    little = this_machine(torch.device("cpu"), torch.float32, MemorySpec(vram="100MiB"))
    assert little.free - little.device.context == 100 * 2**20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux resets a process's peak")
def test_the_measured_peak_of_a_cpu_leaves_out_what_was_before():
    cpu, size = torch.device("cpu"), 256 * 2**20
    reset_peak_memory(cpu)
    before = peak_memory(cpu)
    torch.ones(size, dtype=torch.uint8)
    assert peak_memory(cpu) >= before + 0.9 * size
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


def test_a_plan_says_in_three_lines_what_one_wants_to_know(said):
    """Both stages on one screen; the rest with --details."""
    code, out, _ = said("--gpu", "3060", "--price", "0.2")
    lines = out.splitlines()
    assert code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert lines[0] == "plan of sft on 3060: mistralai/Mistral-7B-v0.1, rank 16"
    assert re.fullmatch(r"  memory  fits: 11\.\d+ of 12\.00 GiB at the peak, and 1\d\.\d+ of main memory", lines[1])
    assert re.fullmatch(
        r"  time    about 7\.\d days, \$3\d\.\d+ at \$0\.20/h \(\d+ tokens/s by data sheets\)", lines[2]
    )
    assert re.fullmatch(r"  change  --config zephyr-7b/overnight-sft: 6,000 of 207,865 rows, \d h \d+ min", lines[3])
    assert "plan of dpo on 3060: " in out and "decoder layers" not in out and lines[-1] == "details: add --details"
    assert "$" not in said("sft", "--gpu", "3060", "--price", "0.00001")[1]
    code, out, _ = said("sft", "--gpu", "3060", "--details")
    assert code == 0 and max(map(len, out.splitlines())) <= 80 and "add --details" not in out
    for text in ("decoder layers", "3.35", "together", "what was chosen", "main memory, locked", "disk"):
        assert text in out, text


def test_a_model_that_a_cpu_cannot_train_is_said(said, processor):
    code, out, _ = said()
    assert code == 0 and out.count("Mistral-7B-v0.1 does not train on a CPU (") == 2 and "days" not in out
    assert out.count("--gpu 3060 plans for a card") == 2 and len(out.splitlines()) <= 24


def test_own_rows_are_counted_by_their_characters(said, tmp_path):
    """The plan then has a duration; rows that cannot be read are a note."""
    file, text = tmp_path / "chats.jsonl", "word " * 600
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    file.write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[::-1] + turns}) + "\n")
    own = ("sft", "--gpu", "3060", f"dataset={file}", "val_size=0")
    out = " ".join(said(*own, "num_train_epochs=30")[1].split())
    assert ": 2 rows of about 3,0" in out and "a run of few rows chooses more" not in out
    seconds = 2 * 3000 * 30 / float(re.search(r"\((\d+) tokens/s", out)[1])
    assert float(re.search(r"time about (\d+) min", out)[1]) == pytest.approx(seconds / 60, rel=0.1)
    assert "a run of few rows chooses more" in said(*own)[1]
    out = " ".join(said("dpo", "--gpu", "3060", f"dataset={file}")[1].split())
    assert "a step (" in out and "the rows are not counted: " in out and "dpo needs preference rows" in out


def test_the_suggestion_is_the_change_that_helps_most(said):
    """A setting that the user fixed, where leaving it to the plan is faster; and nothing where nothing helps."""
    few = ["--config", "zephyr-7b/overnight-sft", "--gpu", "3060"]
    spec = MemorySpec(keep="input")
    speed, text = fastest_change(mistral(), card("3060"), spec)
    gain = speed / make_plan(mistral(), card("3060"), spec).tokens_per_second - 1
    assert text == "memory.keep left to the plan" and gain > 0.05
    assert f"change  {text} makes it {gain:.0%} faster" in said("sft", *few, "optim=adamw_8bit", "memory.keep=input")[1]
    assert "change  nothing: no single setting makes it 5% faster" in said("sft", *few)[1]


def test_a_plan_is_corrected_by_earlier_runs_of_this_kind(processor):
    """By their median, of this machine, engine and size of base only; the settings stay."""
    job = make_workload(
        RunConfig(load_in_4bit=False), "sft", tiny_config(hidden_size=448), torch.float32, run_tokens=10**7
    )
    first = make_plan(job, processor, FREE)
    for ratio in (9, 9, 0.5, 0.8, 0.9, 0.7, 1.2):
        machine_file.add_run("the CPU", job, ratio)
    plan = make_plan(job, processor, FREE)
    assert (plan.speed_ratio, plan.earlier_runs) == (0.8, machine_file.RUNS)
    assert plan.tokens_per_second == pytest.approx(0.8 * first.tokens_per_second, abs=0.01)
    assert replace(first, seconds_per_step=0, tokens_per_second=0) == replace(
        plan, seconds_per_step=0, tokens_per_second=0, speed_ratio=1.0, earlier_runs=0
    )
    said = " ".join(" ".join(forecast.forecast_lines(job, processor, plan, RunConfig())).split())
    assert "corrected by 5 earlier runs here: 0.80 of what was predicted" in said
    assert not machine_file.earlier_runs("the CPU", replace(job, engine="trl"))
    assert make_plan(job, replace(processor, card=CARDS["3060"]), FREE).earlier_runs == 0  # data sheets


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
    loaded = load_config("dpo", None, [f"adapters={tmp_path / 'own'}"])
    below, notes = expected.adapters_below("dpo", loaded, shape)
    assert [dict(below[0].ranks[i]) for i in (0, 1, 5)] == [{"q_proj": 3}, {}, {"q_proj": 7}] and not notes
    code, out, _ = said("dpo", "--gpu", "3060", f"adapters={tmp_path / 'own'}", "optim=adamw_8bit")
    assert code == 0 and "assuming rank" not in out
    code, _, err = said("dpo", "--gpu", "3060", f"adapters={tmp_path / 'none'}")
    assert code == 2 and f"{tmp_path / 'none'}: there is no such folder" in err
    code, out, _ = said("dpo", "--gpu", "3060", "adapters=some/body")
    assert code == 0 and "some/body is not downloaded: assuming rank 16" in out
    code, out, _ = said("dpo", "--gpu", "3060", f"output_dir={tmp_path / 'run'}")
    assert code == 0 and "assuming rank 16 for the SFT adapter below" in out


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--gpu", "tnt2"], "give its memory: --vram 16GiB"),
        (["--vram", "lots"], "is no size"),
        (["model_name_or_path=some/where"], "config.json"),
        (["lora_rr=3"], "lora_rr"),
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


@pytest.mark.parametrize("words", [["--gpu", "3060"], ["-c", "zephyr-7b/sft"], ["engine=trl"], ["sft"]])
def test_what_the_ladder_fixes_is_refused(capsys, words):
    assert cli.run(["plan", *words, "--ladder"]) == 2
    assert "cannot be set" in capsys.readouterr().err


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
    at = next(i for i, line in enumerate(lines) if line.startswith("plan of sft on the CPU"))
    assert at < next(i for i, line in enumerate(lines) if line.startswith("loading"))
    assert [line[2:8] for line in lines[at + 1 :] if re.match(r"  \S", line)] == ["memory", "time  "]
    assert stage.plan.peak > 0
    monkeypatch.setattr(setup, "this_machine", lambda *a, **k: card("3060", "0.78GiB", torch.float32))
    monkeypatch.setattr(setup, "load_base", lambda *a, **k: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match="iB are missing"), messages_to(lines.append):
        setup.setup_stage("sft", load_config("sft", None, [*words, "memory.micro_tokens=9000000"]))
    assert not (tmp_path / "r").exists()


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


def test_a_file_is_planned_for_the_stage_that_it_is_for(tmp_path):
    assert forecast.stages_of([], "zephyr-7b/paper-dpo")[0] == ("dpo",)
    assert forecast.stages_of([], "zephyr-7b/sft")[0] == ("sft",)
    own = tmp_path / "mine.yaml"
    own.write_text("beta: 0.1\n")
    assert forecast.stages_of([], str(own))[0] == ("dpo",)
    own.write_text("lora_r: 8\n")
    assert forecast.stages_of([], str(own))[0] == ("sft", "dpo")


@pytest.mark.parametrize("engine", ["trl", "unsloth"])
@pytest.mark.parametrize("word", ["stream=true", "offload=false", "host=1GiB", "vram=8GiB"])
def test_what_another_engine_does_not_read_is_refused(engine, word):
    with pytest.raises(UserError, match=f"memory.{word.split('=')[0]} has no effect with engine {engine}"):
        load_config("sft", None, [f"engine={engine}", f"memory.{word}"])
    load_config("sft", None, [f"engine={engine}", "memory.keep=input", "memory.micro_tokens=100"])
