"""``fuse``: stock TRL trainers and plain forward passes give the same numbers with it and without it."""

import copy
import json

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import zephyr_lite
from tests.conftest import make_model
from tests.numeric import apart
from zephyr_lite.model import fuse as fuse_file
from zephyr_lite.model import layer as layer_file

fuse = zephyr_lite.fuse
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def peft_model(base=None, dropout=0.0, **changes):
    torch.manual_seed(0)
    model = get_peft_model(base or make_model(**changes), LoraConfig(**LORA, lora_dropout=dropout))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def quantized(folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def both(model, **inputs):
    """Hidden states and adapter gradients of the model, before and after it is fused."""
    found = []
    for fused in (False, True):
        if fused:
            fuse(model)
        model.zero_grad()
        hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
        mask = inputs.get("attention_mask")
        hidden = hidden if mask is None else hidden * mask[..., None]
        (hidden * torch.linspace(-1, 1, hidden.shape[1], device=hidden.device)[None, :, None]).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((hidden.detach(), grads))
    return found


def assert_same(found, tolerance=1e-5):
    (plain, grads), (ours, fused) = found
    assert apart(ours, plain) < tolerance
    assert fused.keys() == grads.keys() and fused
    for name in grads:
        assert apart(fused[name], grads[name]) < tolerance, name


IDS = torch.randint(3, 440, (3, 12), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 12, [1] * 7 + [0] * 5, [1] + [0] * 11])


@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1), RIGHT.bool()])
@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_padded_batches(kind, mask):
    assert_same(both(peft_model(kind=kind), input_ids=IDS, attention_mask=mask))


def test_a_sliding_window_and_4_bits(tiny_base):
    assert_same(both(peft_model(sliding_window=5), input_ids=IDS, attention_mask=RIGHT))
    assert_same(both(peft_model(quantized(tiny_base)), input_ids=IDS, attention_mask=RIGHT))


def test_packed_rows_are_told_apart_by_their_positions():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]])
    assert_same(both(peft_model(), input_ids=IDS[:1], position_ids=positions))


def test_a_llama_has_no_sliding_window():
    """Whatever its configuration says: the Hugging Face model ignores the key."""
    model = peft_model(kind="llama")
    model.get_base_model().config.sliding_window = 3
    assert_same(both(model, input_ids=IDS, attention_mask=RIGHT))


def test_holes_in_a_mask_without_a_window():
    mask = torch.tensor([[1] * 4 + [0, 0] + [1] * 6] * 3)
    assert_same(both(peft_model(), input_ids=IDS, attention_mask=mask))


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_one_side_of_the_adapters_frozen(side):
    model = peft_model()
    for name, parameter in model.named_parameters():
        if side in name:
            parameter.requires_grad_(False)
    assert_same(both(model, input_ids=IDS, attention_mask=RIGHT))


def test_an_adapter_on_the_embeddings_and_a_trained_final_norm():
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens"]}, modules_to_save=["model.norm"])
    found = both(get_peft_model(make_model(), config), input_ids=IDS, attention_mask=RIGHT)
    assert {"lora_embedding_B", "norm"} <= {part for name in found[0][1] for part in name.split(".")}
    assert_same(found)


@pytest.mark.parametrize("keep", ["input", "attention", "all"])
def test_every_policy(keep, monkeypatch):
    monkeypatch.setattr(fuse_file.fuse, "__kwdefaults__", {"keep": keep, "scratch": "small"})
    assert_same(both(peft_model(), input_ids=IDS, attention_mask=RIGHT))


def test_gradient_checkpointing_keeps_the_layers_inputs(monkeypatch):
    """The trainer's own switch decides what is kept."""
    seen = []
    plain = fuse_file.run_layer
    monkeypatch.setattr(fuse_file, "run_layer", lambda *a: seen.append(a[-1]) or plain(*a))
    model = fuse(peft_model())
    model.train()
    model(IDS)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(IDS).logits.sum().backward()
    assert seen == ["all", "all", "input", "input"]


def test_adapters_are_switched_as_peft_switches_them():
    """A second adapter, one switched off, all switched off, and one beneath another."""
    model = peft_model()
    model.add_adapter("ref", LoraConfig(**LORA))
    other = copy.deepcopy(model)
    fuse(model)

    def hidden(m):
        with torch.no_grad():
            return m.get_base_model().model(IDS, use_cache=False).last_hidden_state

    seen = []
    for names in (["default"], ["ref"], ["default", "ref"]):
        for m in (model, other):
            m.base_model.set_adapter(names)
        assert apart(hidden(model), hidden(other)) < 1e-5
        seen.append(hidden(model))
    with model.disable_adapter(), other.disable_adapter():
        assert apart(hidden(model), hidden(other)) < 1e-5
        assert apart(hidden(model), seen[0]) > 1e-3
    assert apart(seen[1], seen[0]) > 1e-3


def test_generation_is_as_before():
    model = peft_model()
    plain = model.generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False)
    assert torch.equal(fuse(model).generate(input_ids=IDS[:1], max_new_tokens=8, do_sample=False), plain)


def test_dropout_drops_that_share_and_follows_the_seed():
    model = fuse(peft_model(dropout=0.5))
    model.eval()
    still = model(IDS).logits
    assert torch.equal(still, model(IDS).logits)
    model.train()
    torch.manual_seed(5)
    first, second = model(IDS).logits, model(IDS).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(IDS).logits)
    assert apart(first, second) > 1e-3 and apart(first, still) > 1e-3


def test_a_16_bit_base_under_autocast():
    model = peft_model()
    ids = IDS[:, :6]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(ids, use_cache=False).logits
        ours = fuse(model)(ids, use_cache=False).logits
    exact = peft_model()(ids, use_cache=False).logits.detach()
    assert apart(ours.float(), exact) < 1.5 * apart(plain.float(), exact) + 1e-3


# --- stock TRL trainers ---


def arguments(folder):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def trl_base(tiny_base):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    return tiny_base, tokenizer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("four_bit", [False, True])
def test_sft_trainer_gives_the_same_losses(trl_base, chat_rows, tmp_path, four_bit, checkpointing, monkeypatch):
    folder, tokenizer = trl_base
    texts = [
        " ".join(m["content"] for m in json.loads(line)["messages"]) for line in chat_rows.read_text().splitlines()
    ]
    rows = datasets.Dataset.from_dict({"text": texts})
    ran = count_layers(monkeypatch)
    found = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = quantized(folder) if four_bit else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = peft_model(model)
        trainer = SFTTrainer(
            model=fuse(model) if fused else model,
            args=SFTConfig(**arguments(tmp_path), max_length=64, gradient_checkpointing=checkpointing),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        found[fused] = losses(trainer)
    assert len(found[True]) == 4 and found[True][0] != found[True][-1]
    tolerance = 2e-2 if four_bit else 1e-4  # TRL casts the adapters of a 4-bit model to bfloat16
    assert found[True] == pytest.approx(found[False], rel=tolerance)
    assert len(ran) == 4 * 2


@pytest.mark.parametrize("how", ["fresh", "continued", "4 bits"])
def test_dpo_trainer_gives_the_same_losses(trl_base, pair_rows, tmp_path, how, monkeypatch):
    folder, tokenizer = trl_base
    read = [json.loads(line) for line in pair_rows.read_text().splitlines()]
    rows = datasets.Dataset.from_list(
        [
            {"prompt": r["prompt"], "chosen": r["chosen"][1]["content"], "rejected": r["rejected"][1]["content"]}
            for r in read
        ]
    )
    ran = count_layers(monkeypatch)
    found = {}
    for fused in (False, True):
        torch.manual_seed(0)
        model = (
            quantized(folder) if how == "4 bits" else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        )
        config = None
        if how == "fresh":
            config = LoraConfig(**LORA)
        else:
            peft_model(model).save_pretrained(tmp_path / "adapter")
            plain = (
                quantized(folder)
                if how == "4 bits"
                else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            )
            model = PeftModel.from_pretrained(plain, tmp_path / "adapter", is_trainable=True)
        trainer = DPOTrainer(
            model=fuse(model) if fused else model,
            args=DPOConfig(**arguments(tmp_path), beta=0.5, gradient_checkpointing=False),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=config,
        )
        found[fused] = losses(trainer)
    assert found[True][0] == pytest.approx(0.6931, abs=2e-2 if how == "4 bits" else 1e-4)
    assert abs(found[True][0] - found[True][-1]) > 1e-3
    assert found[True] == pytest.approx(found[False], rel=2e-2 if how == "4 bits" else 1e-4, abs=1e-5)
    assert len(ran) == 4 * 2 * 2  # policy and reference


def count_layers(monkeypatch):
    ran = []
    plain = layer_file._forward
    monkeypatch.setattr(layer_file, "_forward", lambda *a: ran.append(1) or plain(*a))
    return ran
