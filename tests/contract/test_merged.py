"""Claim 6: the merged folder and the written adapter are the live stack, in transformers and in PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
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

from tests.contract.steps import PLAIN
from tests.numeric import apart, conversation, folder_logps
from tests.train.test_train import dpo_words
from zephyr_lite.config.load import load_config
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.errors import UserError
from zephyr_lite.merge import adapter_only, chain_of_run, compare_logps, merge
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.decoder import Decoder
from zephyr_lite.model.peft_io import compose, read_adapter
from zephyr_lite.train.dpo import run_dpo


def live_logps(base, chain):
    """A conversation, and the log-probability of each of its tokens but the first under base, sft and dpo."""
    stack = AdapterStack(AutoModelForCausalLM.from_pretrained(base))
    for name, adapter in zip(("sft", "dpo"), chain.adapters, strict=True):
        stack.add_frozen(name, adapter)
    example = conversation(0, 30)
    example.mask[:] = True
    return example, Decoder(stack, torch.float32).token_logps(collate_conversations([example]))


def test_the_written_adapter_and_the_merged_folder_are_the_live_policy(windowed, run, pair_rows, tmp_path):
    """``dpo/adapter`` alone on the bare base, and the merge in plain transformers; ``delta`` alone is something else."""
    run_dpo(load_config("dpo", None, dpo_words(windowed, run, pair_rows, **PLAIN)))
    chain = chain_of_run(run)
    example, live = live_logps(windowed, chain)
    merge(windowed, chain.adapters, tmp_path / "merged", tokenizer_from=chain.tokenizer_from)
    folders = {
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "adapter": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(windowed), run / "dpo" / "adapter"),
        "delta": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(windowed), run / "dpo" / "delta"),
    }
    ids = torch.from_numpy(example.ids[None].astype("int64"))
    for name, model in folders.items():
        with torch.no_grad():
            logps = model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert (apart(logps, live) < 1e-5) == (name != "delta"), name


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
