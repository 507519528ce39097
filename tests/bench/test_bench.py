"""The benches run, and count what they should. What they measure here means nothing."""

import importlib.util
import json
import os
import time
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from bench import compare, contest, gpu, learning_rate, mistral, ops, rows, turns
from bench.cases import Bench, cases
from zephyr_lite.config.load import DatasetSpec, RunConfig
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.data.dataset import prepare
from zephyr_lite.errors import UserError
from zephyr_lite.memory.machine import free_memory
from zephyr_lite.model.base import load_tokenizer
from zephyr_lite.train.steps import rows_of_step

CPU = torch.device("cpu")


# -- engines side by side on a CPU -----------------------------------------------------------------------------------


def test_tiny(tmp_path, capsys):
    out = tmp_path / "compare.json"
    compare.main(["--tiny", "--sweep", "--out", str(out)])
    results = json.loads(out.read_text())
    found = {method: results[method]["variants"] for method in ("sft", "dpo")}
    assert list(found["sft"]) == ["fused", "trl", "trl recompute", "trl padded"]
    assert set(found["dpo"]) >= {"fused live", "fused cached", "trl live", "trl live recompute", "trl cached"}
    for variants in found.values():
        tokens = [v["tokens"] for v in variants.values()]
        assert len(tokens[0]) == 2 and all(t == tokens[0][: len(t)] for t in tokens)  # the same rows in the same rounds
    # medians of quotients: of the sign of what was measured, and no more can be said of a tiny model
    assert results["sft"]["ratios"].keys() == {f"fused over {best}" for best in [_fastest(found["sft"])]}
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "fused cached over trl live" in printed


def _fastest(variants):
    return min((v for v in variants if v.startswith("trl")), key=lambda name: variants[name]["seconds"][0])


def test_a_variant_that_fails_says_which(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "fused", None)
    with pytest.raises(UserError, match="fused"):
        compare.main(["--tiny", "--engines", "fused", "--methods", "sft"])


# -- the random Mistral, and rows of real lengths ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_base(tmp_path_factory) -> Path:
    folder, built = mistral.ensure_base(tmp_path_factory.mktemp("mistral") / "base", mistral.TINY, CPU, torch.float32)
    assert built
    return folder


def test_the_random_mistral_is_what_transformers_quantizes_and_saves(random_base, tmp_path):
    plain = MistralForCausalLM(MistralConfig(**mistral.TINY))
    weights = {n: mistral.random_weight(n, s, CPU, torch.float32) for n, s in mistral.matrices(mistral.TINY)}
    plain.load_state_dict(weights)
    plain.save_pretrained(tmp_path / "plain")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=nf4, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "saved")
    wanted, found = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (tmp_path / "saved", random_base)
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    quantized = 0
    for name, weight in AutoModelForCausalLM.from_pretrained(random_base).named_parameters():
        if hasattr(weight, "quant_state"):
            packed, state = bnb.quantize_4bit(weights[name], quant_type="nf4", compress_statistics=True)
            assert torch.equal(
                bnb.dequantize_4bit(weight.data, weight.quant_state), bnb.dequantize_4bit(packed, state)
            ), name
            quantized += 1
        else:
            assert torch.equal(weight, weights[name]), name
    assert quantized == 2 * 7


def test_a_folder_with_another_model_is_refused(random_base):
    assert mistral.ensure_base(random_base, mistral.TINY, CPU, torch.float32) == (random_base, False)
    with pytest.raises(UserError, match="num_hidden_layers 2 instead of 3"):
        mistral.ensure_base(random_base, mistral.TINY | {"num_hidden_layers": 3}, CPU, torch.float32)
    with pytest.raises(UserError, match="dtype"):
        mistral.ensure_base(random_base, mistral.TINY, CPU, torch.bfloat16)


def test_rows_have_the_lengths_of_the_real_ones(random_base, tmp_path):
    template = resolve_template("auto", load_tokenizer(random_base))
    count = rows.write_conversations(tmp_path / "sft.jsonl", template, 8000)
    rows.write_pairs(tmp_path / "dpo.jsonl", template, 20)
    whole = RunConfig(max_length=10**6, max_prompt_length=10**6)
    chats = prepare([DatasetSpec(path=str(tmp_path / "sft.jsonl"))], "sft", whole, template)
    shortest = 39 + 1  # the template's own and one letter, where a real tokenizer needs fewer
    real = rows.lengths("sft_conversations")[:count]
    plain = [i for i, runs in enumerate(real) if runs[0] >= shortest and all(n >= 27 for n in runs[2::2])]
    assert len(plain) > count / 2
    for i in plain:
        assert chats.lengths[i] == sum(real[i]) + 1  # and the template's last newline
        assert chats.examples[i].mask.sum() == sum(real[i][1::2])
    pairs = prepare([DatasetSpec(path=str(tmp_path / "dpo.jsonl"))], "dpo", whole, template)
    for example, (prompt, chosen, rejected) in zip(pairs.examples, rows.lengths("dpo_pairs"), strict=False):
        assert len(example.prompt_ids) == max(prompt, shortest - 1 + 1)
        assert (len(example.chosen_ids), len(example.rejected_ids)) == (max(3, chosen), max(3, rejected))

    recipe = RunConfig(max_length=1024, max_prompt_length=512)
    pairs = prepare([DatasetSpec(path=str(tmp_path / "dpo.jsonl"))], "dpo", recipe, template)
    sizes = [len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in pairs.examples]
    expected = rows.pair_sizes(20, 1024, 512)
    assert all(abs(a - b) <= 3 for a, b in zip(sizes, expected, strict=True))
    seed = rows.seed_with_longest_first(expected, 4)
    first = rows_of_step(RunConfig(batch_size=4, seed=seed), 20, 0)
    assert max(sizes) in [sizes[i] for i in first]


# -- bench.gpu -------------------------------------------------------------------------------------------------------

SMALL = ["--tiny", "--rounds", "1", "--per-device", "1", "2", "--sft-rows", "2", "--dpo-pairs", "2"]


def test_gpu_tiny(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    gpu.main([*SMALL, "--dropout", "0.05", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "pairs/s" in printed and "wanted and reached" in printed
    results = json.loads(out.read_text())
    played = results["matches"]
    assert [(m["method"], m["dropout"]) for m in played] == [("sft", 0.05), ("dpo", 0.0)]
    ours = {"sft": {"fused", "trl"}, "dpo": {"fused live", "fused cached", "trl live", "trl cached"}}
    for m in played:
        assert m["rounds"] == 1
        assert m["variants"].keys() >= ours[m["method"]]
        tokens = [v["tokens"] for v in m["variants"].values()]
        assert len(tokens[0]) == 1 and all(t == tokens[0] for t in tokens)
        assert all(
            f"{a} over {b}" in m["ratios"] for a in ours[m["method"]] for b in m["variants"] if a[0] == "f" > b[0]
        )
    # a setting of the baselines is chosen among those that were tried
    chosen = played[0]["variants"]["trl"]
    tried = [t for t in played[0]["tried"] if t["side"] == "trl" and t["result"] == "ran"]
    assert len(tried) >= 2
    assert chosen["seconds"] and min(tried, key=lambda t: t["seconds"])["recompute"] == chosen["recompute"]
    # an engine that is not to be had here is told of, in words, and never timed as another one
    if importlib.util.find_spec("unsloth") is None:
        assert all("unsloth" not in m["variants"] and "unsloth live" not in m["variants"] for m in played)
        assert "unsloth" in played[0]["not_run"]["unsloth"].lower()
        assert all(t["reached"] is None for t in results["targets"] if t["what"].endswith("unsloth live"))
        assert "NO RESULT" in printed
    assert {t["wanted"] for t in results["targets"]} == {1.5, 3.5, 0.6}
    shape = mistral.TINY
    per_layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * shape["intermediate_size"]
    assert results["flop_per_token"] == 4 * shape["num_hidden_layers"] * per_layer
    assert 27.5e9 < 4 * mistral.decoder_parameters(mistral.MISTRAL_7B) < 28.5e9


def test_what_does_not_fit_is_a_result(monkeypatch):
    real = turns.baseline

    def cramped(stage, turns_, variant=None):
        if variant is None or variant.per_device > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(stage, turns_, variant)

    monkeypatch.setattr(turns, "baseline", cramped)
    monkeypatch.setattr(turns, "fused", cramped)
    words = ["--methods", "sft", "--per-device", "1", "2", "4", "--sft-rows", "4", "--dpo-pairs", "4"]
    results = gpu.main([*SMALL, *words, "--engines", "fused,trl"])
    (played,) = results["matches"]
    told = {(t["engine"], t["per_device"], t["recompute"]): t["result"] for t in played["tried"]}
    for recompute in (True, False):
        assert [told["trl", n, recompute] for n in (1, 2, 4)] == ["ran", "memory", "not tried"]
    assert played["variants"].keys() == {"trl"} and played["variants"]["trl"]["per_device"] == 1
    assert played["not_run"]["fused"] == "memory: CUDA out of memory."


def match_of(folder: Path, base: Path, **changes) -> contest.Match:
    args = gpu.arguments([*SMALL, "--rounds", "2", "--methods", "sft"])
    values = contest.configurations(args, base, folder)["sft"]
    told = {"cap": None, "deadline": time.monotonic() + 600, "threads": True, **changes}
    return contest.Match("sft", values, 2, folder=folder, **told)


def test_without_time_a_round_is_played_all_the_same(random_base, tmp_path):
    played = match_of(tmp_path, random_base, deadline=0.0)
    result = played.play(contest.settings("sft", "trl", [1, 2]))
    assert result["rounds"] == 1 and result["rounds_wanted"] == 2
    assert [t["why"] for t in result["tried"]] == ["", *["out of time"] * 4]


def test_an_engine_in_a_process_of_its_own(random_base, tmp_path):
    played = match_of(tmp_path, random_base, threads=False)
    result = played.play([turns.Variant("sft", "fused")])
    assert result["variants"]["fused"]["peak_bytes"] > 0
    assert result["rounds"] == 2 and result["not_run"] == {}


def test_a_cap_is_what_the_planner_sees(monkeypatch):
    gib, told = 2**30, []
    for where in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(where, "mem_get_info", lambda device=None: (100 * gib, 140 * gib))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 6 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 5 * gib)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    turns.imitate_card(24)
    assert told == [(24 * gib - turns.CONTEXT_BYTES) / (140 * gib)]
    assert torch.cuda.mem_get_info() == (18 * gib - turns.CONTEXT_BYTES, 24 * gib)
    assert free_memory(torch.device("cuda")) == 19 * gib - turns.CONTEXT_BYTES


def test_unsloth_plays_at_its_default_too(monkeypatch, tmp_path):
    class Fake:
        def __init__(self, variant, values, **options):
            self.variant, self.steps = variant, []
            self.ready = {"threads": 1, "plan": {}, "kernels_replaced": [], "attention": "varlen"}

        def load(self, timeout):
            return self

        def step(self, timeout):
            v = self.variant
            if (v.engine == "unsloth" and not v.recompute and keeps_fit < 32) or v.skip_layers > keeps_fit:
                raise turns.Failed(v.name, "memory", "CUDA out of memory.")
            seconds = 1.0 + 0.5 * v.recompute - 0.01 * v.skip_layers
            return {"seconds": seconds, "cpu_seconds": 0, "pairs": 4, "tokens": 9, "peak_bytes": 2**30}

        def stop(self):
            pass

        kill = stop

    monkeypatch.setattr(contest, "Runner", Fake)
    wanted = {32: ("unsloth", 1 / 1.5), 16: ("unsloth recompute skip 16", 1.34 / 1.5), 0: (None, 1)}
    for keeps_fit, (setting, share) in wanted.items():
        played = contest.Match("sft", {}, 2, time.monotonic() + 60, tmp_path, None)
        result = played.play(contest.lineup("sft", ["fused", "unsloth"], [1], 4096))
        assert result["variants"].get("unsloth", {}).get("setting") == setting
        assert ("unsloth" in result["not_run"]) == (setting is None)
        ratios = result["ratios"]
        assert ratios["fused over unsloth default"] == 1.5
        assert ratios["fused over unsloth"] / ratios["fused over unsloth default"] == pytest.approx(share)
        tried = [t["skip_layers"] for t in result["tried"] if t["skip_layers"] and t["result"] != "not tried"]
        assert tried == {32: [], 16: [24, 16], 0: [24, 16, 8]}[keeps_fit]
        assert all("fitted, which recomputes less" in t["why"] for t in result["tried"] if t["result"] == "not tried")
        assert result["variants"]["unsloth default"]["setting"] == "unsloth recompute"


def test_gpu_refuses_what_it_cannot_do():
    for words, said in (
        (["--per-device", "3"], "per-device"),
        (["--engines", "fused,foo"], "foo"),
        (["--methods", "ppo"], "ppo"),
    ):
        with pytest.raises(UserError, match=said):
            gpu.main(["--tiny", *words])
    if not torch.cuda.is_available():
        for main in (gpu.main, ops.main):
            with pytest.raises(UserError, match="NVIDIA"):
                main([])


# -- bench.ops -------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    return [case.name for case in cases(Bench(mistral.TINY, 4, CPU, torch.float32))]


def test_ops_tiny(tmp_path, capsys):
    out = tmp_path / "ops.json"
    ops.main(["--tiny", "--out", str(out)])
    results = json.loads(out.read_text())
    by = {(r["operation"], r["by"]): r for r in results["operations"]}
    for name in names():
        assert by[name, "twin"]["seconds"] > 0
    assert by["nf4.dequantize gate_proj", "bitsandbytes"]["bytes_per_second"] > 0
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        assert all("so the twin does" in by[name, "kernel"]["not_run"] for name in names())
    assert "dropout backward" in capsys.readouterr().out


def test_bytes_are_the_least_that_must_move():
    found = {case.name: case for case in cases(Bench(mistral.TINY, 4, CPU, torch.float32))}
    assert found["rms_norm forward, adding"].bytes == 4 * 4 * 64 * 4
    assert found["swiglu backward, and forward again"].bytes == 6 * 4 * 192 * 4
    # 4 bits, a byte for each 64, a float for each 64 * 256, and the result
    assert found["nf4.dequantize gate_proj"].bytes == 192 * 64 // 2 + 192 * 64 // 64 + 4 + 192 * 64 * 4
    # q and k read and written, half of cos and sin
    assert found["rope forward"].bytes == 2 * 4 * (4 + 2) * 16 * 4 + 2 * 4 * 8 * 4


# -- learning rates ---------------------------------------------------------------------------------------------------


def test_the_probe_and_the_grid_run(tmp_path, chat_rows):
    words = [
        str(chat_rows),
        str(chat_rows),
        "--steps",
        "2",
        "--tiny",
        str(tmp_path / "base"),
        "--out",
        str(tmp_path / "out.json"),
    ]
    found = learning_rate.main(words)
    assert len(found["probe"]) == 5 and found["picked"] in found["grid"] and found["above_the_best"] >= 0
    assert json.loads((tmp_path / "out.json").read_text())["steps"] == 2
