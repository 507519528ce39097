"""The shipped configurations of each family, in small, and what comes out: merge, adapter, GGUF, ids, chat, Modelfile; and its
losses and gradients against TRL's."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import pytest
import torch
import trl
from peft import PeftModel
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from tests.conftest import CONVERSATIONS, TEXT
from tests.contract import test_trl_parity as parity
from tests.contract.test_gguf import add_bos, fields, off
from tests.contract.test_more_families import tiny
from tests.contract.test_text_models import VISION
from tests.export.test_export_ollama import SAID, modelfile_template, render_go
from tests.train.test_train import LN2, metrics
from zephyr_lite.chat import load_chat
from zephyr_lite.chat.generate import Sampling, Streamer
from zephyr_lite.cli.app import run as zephyr_lite
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.export.gguf import end_ids, write_gguf
from zephyr_lite.export.gguf_vocab import _GPT4O, _LLAMA3, _QWEN2, _TEKKEN
from zephyr_lite.export.ollama import write_modelfile
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.files import TEXT_NAMES
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Case:
    """A family's shipped configuration, and a base as the hub's in small."""

    preset: str
    split: str  # how its tokenizer splits a text; "": SentencePiece's kind
    special: tuple[str, ...]  # eos first
    pre: str  # llama.cpp's name for the tokenizer
    metadata: dict  # of the GGUF file
    ends: tuple[str, ...]  # what ends an answer
    template: str = ""  # TRL's name of the family's own; "": the base has none
    bos: str | None = None
    changes: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # of the GGUF file


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CASES = {
    "qwen3": Case(
        "qwen3-4b",
        _QWEN2,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "qwen2",
        {"general.architecture": "qwen3", "qwen3.attention.key_length": 32, "qwen3.rope.dimension_count": 32},
        ("<|im_end|>", "<|endoftext|>"),
        template="qwen3",
        changes={"attention_bias": False, "tie_word_embeddings": True},
        notes=("last 9 tokens", "NFC"),
    ),
    "smollm3": Case(
        "smollm3-3b",
        _LLAMA3,
        ("<|end_of_text|>", "<|begin_of_text|>", "<|im_start|>", "<|im_end|>"),
        "llama-bpe",
        {"general.architecture": "smollm3", "smollm3.block_count": 4},
        ("<|end_of_text|>",),
        changes={
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 1, 1, 0],
            "use_sliding_window": False,
            "mlp_bias": False,
        },
    ),
    "gemma3_text": Case(
        "gemma-3-4b",
        "",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "default",
        {
            "general.architecture": "gemma3",
            "gemma3.attention.sliding_window": 9,
            "gemma3.rope.freq_base": 1e4,
            "gemma3.rope.freq_base_swa": 10.0,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
            "tokenizer.ggml.add_space_prefix": False,
            "tokenizer.ggml.add_bos_token": False,
        },
        ("<end_of_turn>", "<eos>"),
        template="gemma3",
        bos="<bos>",
        changes={
            "num_hidden_layers": 6,
            "layer_types": [*["sliding_attention"] * 5, "full_attention"],
            "query_pre_attn_scalar": 32,
        },
    ),
    "ministral3": Case(
        "ministral-3-8b",
        _TEKKEN,
        ("</s>", "<s>"),
        "tekken",
        {
            "general.architecture": "mistral3",
            "mistral3.attention.temperature_scale": 0.1,
            "mistral3.rope.scaling.type": "yarn",
            "mistral3.rope.scaling.factor": 16.0,
            "mistral3.rope.scaling.original_context_length": 8,
            "mistral3.rope.scaling.yarn_beta_fast": 32.0,
            "mistral3.rope.scaling.yarn_log_multiplier": 1.0,
        },
        ("</s>",),
        bos="<s>",
        changes={"rope_parameters": YARN},
    ),
    "phi3": Case(
        "phi-4-mini",
        _GPT4O,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "gpt-4o",
        {
            "general.architecture": "phi3",
            "phi3.rope.dimension_count": 12,
            "phi3.rope.scaling.type": "longrope",
            "phi3.rope.scaling.original_context_length": 4096,
            "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(4096)),
        },
        ("<|end|>", "<|endoftext|>"),
        template="phi3",
        changes={"original_max_position_embeddings": 4096, "max_position_embeddings": 8192},
        notes=("set its context to 4096", "last 9 tokens"),
    ),
}


def save_tokenizer(folder: Path, case: Case) -> None:
    """A tokenizer of the family's kind, of some 420 tokens."""
    raw = Tokenizer(models.BPE(unk_token=None if case.split else "<unk>", byte_fallback=not case.split))
    special, alphabet = [*case.special], pre_tokenizers.ByteLevel.alphabet()
    if case.split:
        way = ("removed", True) if case.split == _GPT4O else ("isolated", False)
        split = pre_tokenizers.Split(Regex(case.split), *way)
        spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Sequence([split, spelling]), decoders.ByteLevel()
    else:  # Gemma's
        raw.normalizer = normalizers.Replace(" ", "▁")
        raw.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next", invert=False)
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special, alphabet = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], []
    if case.split == _QWEN2:
        raw.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXT + [part for row in CONVERSATIONS for part in row], trainer)
    told = json.loads(raw.to_str())
    told["model"]["ignore_merges"] = case.pre in ("llama-bpe", "tekken")
    told["added_tokens"] = [token for token in told["added_tokens"] if not token["content"].startswith("<0x")]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(told)),
        bos_token=case.bos,
        eos_token=case.special[0],
        extra_special_tokens=[token for token in case.special[1:] if token != case.bos],
        **({} if case.split else {"unk_token": "<unk>"}),
    )
    if not case.split:
        fast.add_tokens([AddedToken("\n\n", normalized=False)])  # Gemma's runs of newlines are tokens of their own
    if case.template:
        fast.chat_template = (TEMPLATES / f"{case.template}.jinja").read_text()
    fast.save_pretrained(folder)
    if case.bos is not None:
        add_bos(folder, case.bos)


def multimodal(text):
    """A base as the hub has it: around the text model, with a vision encoder."""
    vision = PixtralVisionConfig(**VISION, head_dim=16)
    config = Mistral3Config(text_config=text.config, vision_config=vision, tie_word_embeddings=False)
    whole = Mistral3ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    return whole


def bare(base: Path):
    """The base as an adapter's card loads it."""
    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "text_config"):
        return AutoModelForCausalLM.from_pretrained(base, config=config.text_config, key_mapping=TEXT_NAMES)
    return AutoModelForCausalLM.from_pretrained(base)


def read_tensors(file: Path, config) -> torch.nn.Module:
    """The model of a file of an architecture that transformers does not read: q and k as in its ``llama``."""
    found = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    architecture = fields(file)["general.architecture"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    heads = LlamaTensorProcessor({key: getattr(config, key) for key in ("num_attention_heads", "num_key_value_heads")})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        weights = torch.from_numpy(heads.process(found.pop(stored), stored).weights.copy())
        parameter.data.copy_(weights)
    assert not found
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_a_shipped_configuration_and_what_comes_out(name, tmp_path, chat_rows, pair_rows):
    case, base, run, out = CASES[name], tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    model = tiny(name, eos_token_id=0, **case.changes)
    (multimodal(model) if name == "ministral3" else model).save_pretrained(base)
    save_tokenizer(base, case)
    small = ["max_steps=2", "batch_size=3", "lora_r=4", "lora_alpha=8", "learning_rate=0.02", "samples=0"]
    small += [f"model_name_or_path={base}", f"output_dir={run}", "load_in_4bit=false"]
    for train, stage, rows in ((run_sft, "sft", chat_rows), (run_dpo, "dpo", pair_rows)):
        given = [*small, f"dataset.path={rows}", f"eval_dataset.path={rows}"]
        train(load_config(stage, f"{case.preset}/{stage}", given))
    assert abs(metrics(run / "dpo")[0] - LN2) < 1e-6

    # merged = live = the composed adapter on the bare base
    chain, chat = chain_of_run(run), load_chat(run)
    merge(base, chain.adapters, out, tokenizer_from=chain.tokenizer_from)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad(), chat.stack.only(["sft", "dpo"]):
        assert off(chat.stack.model, plain) < 1e-5
    if name == "gemma3_text":  # the keys of transformers 4
        told = json.loads((out / "config.json").read_text())
        assert (told["rope_theta"], told["rope_local_base_freq"], told["rope_scaling"]["factor"]) == (1e4, 10.0, 8.0)
    composed = PeftModel.from_pretrained(bare(base), run / "dpo" / "adapter").eval()
    assert off(plain, composed) < 1e-5 < off(plain, bare(base))
    if name == "ministral3":
        assert zephyr_lite(["merge", "--run", str(run), "--out", str(tmp_path / "adapter"), "--adapter-only"]) == 0
        card = (tmp_path / "adapter" / "README.md").read_text()
        assert "config=text_config, key_mapping=names" in card and "Serve a merged model" in card
        assert all(f'r"{theirs}": "{ours}"' in card for theirs, ours in TEXT_NAMES.items())

    # the ids of a server's prompt, and the tokens of two turns that share a cache longer than a layer's window
    served, template = AutoTokenizer.from_pretrained(out), chat.template
    assert served.convert_ids_to_tokens(end_ids(out, plain.config)) == [*case.ends]
    assert any("enable_thinking=false" in note for note in template.notes) is (name == "qwen3")
    streamer = Streamer(chat, [["sft", "dpo"]])
    messages = [{"role": "user", "content": "What do you like to cook on a rainy evening?"}]
    for _ in range(2):
        ids = template.prompt_ids(messages).tolist()
        assert served.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == ids
        (drawn,) = streamer.draw([ids], [Sampling(temperature=0.0, max_new_tokens=8)])
        given = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": chat.ends, "use_cache": False}
        want = plain.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist()
        assert drawn.tokens == want[: len(drawn.tokens)] and drawn.tokens
        messages += [{"role": "assistant", "content": "Soup."}, {"role": "user", "content": "And then?"}]

    # GGUF
    report = write_gguf(out, tmp_path / "gguf" / "m.gguf", "f16")
    told = fields(report.out)
    assert {key: told[key] for key in case.metadata} == pytest.approx(case.metadata)
    assert [any(note in line for line in report.notes) for note in case.notes] == [True] * len(report.notes)
    if name in ("smollm3", "ministral3"):
        back = read_tensors(report.out, plain.config)
    else:
        config = AutoConfig.from_pretrained(out)  # transformers does not read head_dim and windows
        back = AutoModelForCausalLM.from_pretrained(
            report.out.parent, gguf_file="m.gguf", config=config, dtype=torch.float32
        )
    for parameter in plain.parameters():  # as stored: matrices in float16
        parameter.data = parameter.data.half().float() if parameter.dim() > 1 else parameter.data
    assert off(plain, back.eval()) < 1e-5
    assert told["tokenizer.ggml.pre"] == case.pre and told["tokenizer.chat_template"] == template.text
    reader, _ = convert_gguf_tokenizer(*get_gguf_tokenizer(str(report.out))[:2])
    text = template.text_of([{"role": "user", "content": "I'd cook 12345 soups,\n\n  é 日本?"}], True)
    ids = served(text, add_special_tokens=False).input_ids
    assert reader.encode(text, add_special_tokens=False).ids == ids

    # Ollama
    write_modelfile(out, report.out, tmp_path / "Modelfile")
    text = (tmp_path / "Modelfile").read_text()
    stops = {line.split('"')[1] for line in text.splitlines() if line.startswith("PARAMETER stop")}
    assert stops == {*case.ends}
    for messages in SAID:
        assert render_go(modelfile_template(text), messages) == template.text_of(messages, True)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("smollm3", {}, "no_rope_layers is .*; llama.cpp computes this architecture with"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2}, "query_pre_attn_scalar is 20; .* with 32"),
        ("ministral3", {}, "of type yarn scale attention"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, changes, match, tmp_path):
    tiny(name, **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=match):
        write_gguf(tmp_path, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trls(name, tokenizer, tmp_path, monkeypatch):
    """SFT's and DPO's, on the same rows."""
    monkeypatch.setattr(parity, "make_model", lambda: tiny(name))
    parity.test_sft(tokenizer, tmp_path)
    parity.test_dpo(tokenizer, tmp_path, loss_type="sigmoid", label_smoothing=0.0)
