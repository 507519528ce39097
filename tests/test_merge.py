"""Merging: the folder is the live stack, whatever the base looks like, and nothing is half-written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from zephyr_lite.errors import UserError
from zephyr_lite.merge import adapter_only, chain_of_adapters, chain_of_run, compare_logps, folder_logps, merge
from zephyr_lite.merge import weights as merging
from zephyr_lite.model.compose import compose
from zephyr_lite.model.peft_files import LoraWeights, read_adapter, write_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12) % 100 + 6


def save_tokenizer(folder: Path, *, template: bool) -> None:
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "a", "b"])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if template:
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        )
    tokenizer.save_pretrained(folder)


def make_base(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    llama: bool = False,
    tied: bool = False,
    sharded: bool = False,
) -> Path:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)) if llama else MistralForCausalLM(MistralConfig(**settings))
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
    save_tokenizer(folder, template=False)
    return folder


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(load(base), peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


def make_chain(base: Path, folder: Path) -> list[Path]:
    first = make_adapter(base, folder / "first", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    return [
        first,
        make_adapter(base, folder / "second", 2, r=8, use_rslora=True, target_modules=["q_proj", "gate_proj"]),
    ]


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def live(model: Any, folders: list[Path]) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    model.base_model.set_adapter([f"a{i}" for i in range(len(folders))])
    return logits(model.eval())


def in_4bit(base: Path, double_quant: bool, dtype: torch.dtype = torch.float32) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = load(base, dtype=dtype, quantization_config=config, device_map={"": "cpu"})
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            # As in model/load.py: the weight would be repacked in place at the first evaluation.
            module.support_avx512bf16_for_cpu = False
    return model


def distance(x: torch.Tensor, reference: torch.Tensor) -> float:
    return float((x - reference).norm() / reference.norm())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def read(folders: list[Path]) -> list[Any]:
    return [read_adapter(folder) for folder in folders]


@pytest.mark.parametrize("llama", [False, True], ids=["mistral", "llama"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_merged_folder_is_the_live_stack(tmp_path: Path, llama: bool, tied: bool, sharded: bool) -> None:
    base = make_base(tmp_path / "base", llama=llama, tied=tied, sharded=sharded)
    assert len(list(base.glob("*.safetensors"))) > 1 or not sharded
    chain = make_chain(base, tmp_path)
    report = merge(base, read(chain), tmp_path / "out")
    want = live(load(base), chain)
    assert distance(logits(load(base)), want) > 1e-2
    assert distance(logits(load(tmp_path / "out")), want) < 1e-5

    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert list(before) == list(after)
    assert sorted(p.name for p in base.glob("model*")) == sorted(p.name for p in (tmp_path / "out").glob("model*"))
    touched = {f"{module}.weight" for module in compose(read(chain))}
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in touched), name
    assert (report.merged, report.copied) == (len(touched), len(before) - len(touched))
    assert ("lm_head.weight" in after) == (not tied)


def test_composed_adapter_on_the_bare_base_is_the_live_stack(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    chain = make_chain(base, tmp_path)
    adapter_only(read(chain), tmp_path / "out", base_model_name=str(base), tokenizer_from=base)
    want = live(load(base), chain)
    assert distance(live(load(base), [tmp_path / "out"]), want) < 1e-5
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 7
    merge(base, [compose(read(chain))], tmp_path / "merged")
    assert distance(logits(load(tmp_path / "merged")), want) < 1e-5


@pytest.mark.parametrize("block", [1, 1000, 2**26])
def test_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    base = make_base(tmp_path / "base")
    chain = make_chain(base, tmp_path)
    monkeypatch.setattr(merging, "BLOCK_BYTES", block)
    merge(base, read(chain), tmp_path / "out", onto="nf4", quant_dtype=torch.float32)
    assert distance(logits(load(tmp_path / "out")), live(in_4bit(base, True), chain)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_base_is_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", dtype=dtype)
    chain = make_chain(base, tmp_path)
    merge(base, read(chain), tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for module, weights in compose(read(chain)).items():
        exact = before[f"{module}.weight"].double() + weights.b.double() @ weights.a.double()
        gap = (after[f"{module}.weight"].double() - exact).abs()
        # Half a unit in the last place, and the float32 sum's own error.
        assert after[f"{module}.weight"].dtype == dtype
        assert (gap <= exact.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-7).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onto_nf4_is_what_4_bit_training_saw(tmp_path: Path, double_quant: bool, dtype: torch.dtype) -> None:
    base = make_base(tmp_path / "base", sharded=True)
    chain = make_chain(base, tmp_path)
    report = merge(base, read(chain), tmp_path / "out", onto="nf4", double_quant=double_quant, quant_dtype=dtype)
    assert report.requantized == 14

    quantized = in_4bit(base, double_quant, dtype)
    after = tensors_of(tmp_path / "out")
    untouched = "model.layers.0.self_attn.o_proj"
    linear = quantized.get_submodule(untouched)
    import bitsandbytes.functional as bnb

    seen = bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(after[f"{untouched}.weight"], seen.float())
    assert torch.equal(after["lm_head.weight"], tensors_of(base)["lm_head.weight"])
    if dtype == torch.float32:
        want = live(quantized, chain)
        assert distance(logits(load(tmp_path / "out")), want) < 1e-5
        merge(base, read(chain), tmp_path / "plain")
        assert distance(logits(load(tmp_path / "plain")), want) > 1e-2


@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_checkpoint_as_base(tmp_path: Path, double_quant: bool) -> None:
    plain = make_base(tmp_path / "plain")
    chain = make_chain(plain, tmp_path)
    in_4bit(plain, double_quant).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    save_tokenizer(tmp_path / "base", template=False)
    with pytest.raises(UserError, match="quantized") as caught:
        merge(tmp_path / "base", read(chain), tmp_path / "out", onto="base")
    assert "--base" in caught.value.hint

    merge(tmp_path / "base", read(chain), tmp_path / "out", onto="nf4")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(tensors_of(tmp_path / "out")) == sorted(tensors_of(plain))
    # Written in the compute dtype: float32 here, bfloat16 where the checkpoint says nothing else.
    assert distance(logits(load(tmp_path / "out")), live(in_4bit(plain, double_quant), chain)) < 1e-5


def test_folder_has_tokenizer_template_and_end_token(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77], "temperature": 0.7}))
    stage = tmp_path / "stage"
    save_tokenizer(stage, template=True)
    lineage = {"run": "mine", "adapters": [{"sha256": "abc"}]}
    report = merge(base, read(make_chain(base, tmp_path)), tmp_path / "out", tokenizer_from=stage, lineage=lineage)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert text == "<|im_start|>user\na<|im_end|>\n"
    model = load(tmp_path / "out")
    assert model.generation_config.eos_token_id == report.eos_token_ids == [4, 2, 77]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["MistralForCausalLM"], "float32")
    assert json.loads((tmp_path / "out" / "zephyr_lite.json").read_text())["run"] == "mine"
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["zephyr_lite"])["adapters"] == [{"sha256": "abc"}]


def test_without_a_template_generation_stops_at_the_tokenizers_eos(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").unlink()
    merge(base, read(make_chain(base, tmp_path)), tmp_path / "out")
    assert load(tmp_path / "out").generation_config.eos_token_id == 2


def test_output_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    chain = read(make_chain(base, tmp_path))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        merge(base, chain, foreign, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="is the base"):
        merge(base, chain, base, overwrite=True)

    out = tmp_path / "out"
    merge(base, chain, out)
    with pytest.raises(UserError, match="earlier merge") as caught:
        merge(base, chain, out)
    assert "--overwrite" in caught.value.hint
    merge(base, chain[:1], out, overwrite=True)
    assert distance(logits(load(out)), live(load(base), [tmp_path / "first"])) < 1e-5
    with pytest.raises(UserError, match="earlier merge"):
        adapter_only(chain, out, base_model_name="x")
    assert not list(tmp_path.glob(".*"))


def adapter_for(folder: Path, module: str, out_features: int, in_features: int, value: float = 0.1) -> list[Any]:
    weights = LoraWeights(torch.full((2, in_features), value), torch.full((out_features, 2), value), 1.0)
    write_adapter(folder, {module: weights}, base_model_name="another")
    return read([folder])


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        ("model.layers.0.self_attn.q_proj", (64, 32), r"q_proj is \[64, 64\] in .*\[64, 32\]"),
        ("model.layers.7.self_attn.q_proj", (64, 64), r"layers\.7\.self_attn\.q_proj"),
        ("lm_head", (128, 64), "ties to its embeddings"),
    ],
)
def test_adapter_of_another_base(tmp_path: Path, module: str, shape: tuple[int, int], said: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    with pytest.raises(UserError, match=said):
        merge(base, adapter_for(tmp_path / "adapter", module, *shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_head_that_is_not_tied_merges(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", 1, target_modules=["lm_head", "q_proj"])
    merge(base, read([adapter]), tmp_path / "out")
    assert distance(logits(load(tmp_path / "out")), live(load(base), [adapter])) < 1e-5


def test_a_weight_that_overflows_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    module = "model.layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=rf"{module}\.weight.*F16"):
        merge(base, adapter_for(tmp_path / "adapter", module, 128, 64, 1e3), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    chain = read(make_chain(base, tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="are free"):
        merge(base, chain, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("how", ["bin", "cut", "overlap", "bounds", "dtype", "missing shard"])
def test_broken_bases_are_named(tmp_path: Path, how: str) -> None:
    base = make_base(tmp_path / "base", sharded=how == "missing shard")
    chain = read(make_chain(base, tmp_path))
    weights = next(iter(sorted(base.glob("*.safetensors"))))
    said = weights.name
    if how == "bin":
        weights.rename(base / "pytorch_model.bin")
        said = "pytorch_model.bin"
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "missing shard":
        weights.unlink()
    else:
        raw = weights.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        names = [name for name in header if name != "__metadata__"]
        if how == "dtype":
            header[names[0]]["dtype"] = "F3"
        else:
            begin, end = header[names[1]]["data_offsets"]
            shift = 10**9 if how == "bounds" else -begin
            header[names[1]]["data_offsets"] = [begin + shift, end + shift]
        new = json.dumps(header).encode()
        weights.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    with pytest.raises(UserError, match=said.replace(".", r"\.")) as caught:
        merge(base, chain, tmp_path / "out")
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_killed_in_the_middle_there_is_no_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", sharded=True)
    chain = make_chain(base, tmp_path)
    script = f"""
import time
from zephyr_lite.merge import merge
from zephyr_lite.model.peft_files import read_adapter
def progress(done, total):
    print(done, flush=True)
    if done > total / 2:
        time.sleep(60)
chain = [read_adapter(p) for p in {[str(p) for p in chain]!r}]
merge({str(base)!r}, chain, {str(tmp_path / "out")!r}, progress=progress)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*/*.safetensors")), "it was not killed in the middle"
    merge(base, read(chain), tmp_path / "out")
    assert distance(logits(load(tmp_path / "out")), live(load(base), chain)) < 1e-5


# ---- chains -------------------------------------------------------------------------------------------------------


def make_run(run: Path, base: Path) -> list[Path]:
    """A run of two stages as the training rooms leave it: sft/adapter, dpo/delta, dpo/adapter (composed)."""
    sft = make_adapter(base, run / "sft" / "adapter", 1)
    delta = make_adapter(base, run / "dpo" / "delta", 2, r=8)
    write_adapter(run / "dpo" / "adapter", compose(read([sft, delta])), base_model_name=str(base))
    about = {
        "name_or_path": str(base),
        "revision": "main",
        "load_in_4bit": False,
        "double_quant": True,
        "dtype": "float32",
    }
    for stage, own, below in (("sft", "adapter", []), ("dpo", "delta", [("sft/adapter", sft)])):
        save_tokenizer(run / stage / "adapter", template=True)
        info = {
            "method": stage,
            "stage": stage,
            "status": "complete",
            "base": about,
            "adapters": [{"path": path, "sha256": read_adapter(folder).sha256} for path, folder in below],
            "own": {"path": own, "sha256": read_adapter(run / stage / own).sha256},
        }
        (run / stage / "stage.json").write_text(json.dumps(info))
    return [sft, delta]


def test_newest_run_and_its_last_stage(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_run(tmp_path / "runs" / "old", base)
    folders = make_run(tmp_path / "runs" / "new", base)
    chain = chain_of_run(runs_root=tmp_path / "runs")
    assert (chain.run, chain.stage) == (tmp_path / "runs" / "new", "dpo")
    assert [a.path for a in chain.adapters] == folders
    merge(
        chain.base["name_or_path"],
        chain.adapters,
        tmp_path / "out",
        tokenizer_from=chain.tokenizer_from,
        lineage=chain.lineage(),
    )
    want = live(load(base), folders)
    assert distance(logits(load(tmp_path / "out")), want) < 1e-5
    assert distance(live(load(base), [tmp_path / "runs" / "new" / "dpo" / "adapter"]), want) < 1e-5
    told = json.loads((tmp_path / "out" / "zephyr_lite.json").read_text())
    assert [a["sha256"] for a in told["adapters"]] == [a.sha256 for a in chain.adapters]
    assert [a.path for a in chain_of_run(tmp_path / "runs" / "old", stage="sft").adapters] == [
        tmp_path / "runs" / "old" / "sft" / "adapter"
    ]

    stage = tmp_path / "runs" / "new" / "dpo" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "status": "running"}))
    assert chain_of_run(tmp_path / "runs" / "new").stage == "sft"


def test_a_run_may_move(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_run(tmp_path / "runs" / "one", base)
    (tmp_path / "runs" / "one").rename(tmp_path / "moved")
    assert len(chain_of_run(tmp_path / "moved").adapters) == 2


@pytest.mark.parametrize("which", ["sft/adapter", "dpo/delta"])
def test_a_chain_whose_hash_does_not_match_is_refused(tmp_path: Path, which: str) -> None:
    base = make_base(tmp_path / "base")
    run = tmp_path / "runs" / "one"
    make_run(run, base)
    info = json.loads((run / "dpo" / "stage.json").read_text())
    trained_on = (info["adapters"][0] if which == "sft/adapter" else info["own"])["sha256"]
    weights = run / which / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, weights)
    with pytest.raises(UserError, match=trained_on[:12]) as caught:
        chain_of_run(run)
    assert which in caught.value.message and read_adapter(run / which).sha256[:12] in caught.value.message
    assert caught.value.hint


def test_missing_runs_stages_and_adapters_are_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    with pytest.raises(UserError, match="no run there has a complete stage"):
        chain_of_run(runs_root=tmp_path / "runs")
    with pytest.raises(UserError, match="no such run"):
        chain_of_run(tmp_path / "runs" / "nothing")
    run = tmp_path / "runs" / "one"
    make_run(run, base)
    with pytest.raises(UserError, match="stage third"):
        chain_of_run(run, stage="third")
    with pytest.raises(UserError, match="is an adapter's folder, and no run") as refused:
        chain_of_run(run / "sft" / "adapter")
    assert str(run) in refused.value.hint and "--adapter" in refused.value.hint
    with pytest.raises(UserError, match="it is no run's folder"):
        chain_of_run(tmp_path / "runs")
    shutil.rmtree(run / "sft" / "adapter")
    with pytest.raises(UserError, match="sft/adapter: is gone"):
        chain_of_run(run)


def test_explicit_adapters(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    chain = make_chain(base, tmp_path)
    assert chain_of_adapters([str(p) for p in chain]).base["name_or_path"] == str(base)
    adapter_for(tmp_path / "odd", "model.layers.0.self_attn.q_proj", 64, 64)
    names = [str(chain[0]), str(tmp_path / "odd")]
    with pytest.raises(UserError, match="several bases"):
        chain_of_adapters(names)
    assert chain_of_adapters(names, base="mine").base["name_or_path"] == "mine"


# ---- the comparison afterwards ------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [None, 200_000], ids=["fits", "offloaded"])
def test_log_probabilities_of_the_folder(tmp_path: Path, memory: int | None) -> None:
    base = make_base(tmp_path / "base", sharded=True)
    rows = [IDS[0].tolist(), IDS[1, :5].tolist()]
    got = folder_logps(base, rows, memory=memory)
    model = load(base)
    with torch.no_grad():
        want = [model(input_ids=torch.tensor([r])).logits[0].log_softmax(-1)[range(len(r) - 1), r[1:]] for r in rows]
    difference = compare_logps(want, got)
    assert difference.tokens == 11 + 4
    assert difference.max < 1e-5 and difference.mean <= difference.max
    assert compare_logps(want, [g + 0.5 for g in got]).mean == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(ValueError, match="different rows"):
        compare_logps(want, got[:1])


def test_memory_bench_runs(tmp_path: Path) -> None:
    """The bench itself, at a tiny size."""
    root = Path(__file__).parent.parent
    sizes = {"layers": 2, "hidden": 256, "intermediate": 512, "vocab": 300, "shards": 2, "onto": "nf4", "dir": tmp_path}
    options = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, str(root / "bench" / "merge_memory.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["nf4"]["above_imports_mb"] < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_stage_that_lost_its_stage_json_is_not_passed_over(tmp_path, content):
    for name in ("sft", "dpo"):
        (tmp_path / name / "adapter").mkdir(parents=True)
    (tmp_path / "sft/stage.json").write_text(json.dumps({
        "status": "complete", "adapters": [], "own": {"path": "adapter", "sha256": "0"}, "base": {"name_or_path": "x"},
    }))  # fmt: skip
    if content is not None:
        (tmp_path / "dpo/stage.json").write_text(content)
    with pytest.raises(UserError, match=r"dpo: has an adapter, and no stage\.json that says what it stands on"):
        chain_of_run(tmp_path)
