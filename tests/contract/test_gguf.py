"""Claim 6: a GGUF file that is read back gives the model's logits and its token ids."""

import json
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import CONVERSATIONS, TEXT, make_model, make_tokenizer
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.llama import check_prompts, write_q4_k_m

IDS = torch.arange(40).view(2, 20) % 300 + 10


SAMPLE = "I'd say it's 12345, isn't it?\n\n  Two spaces — é 日本.</s>\nEnd"


def model_dir(folder: Path, kind: str = "mistral", *, template: str | None = "zephyr", bos=True, **config) -> Path:
    """A model's folder as merge makes one; with ``bos`` its tokenizer begins every text with <s>, as Mistral's does."""
    make_model(kind, **config).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    if bos:
        add_bos(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if template is not None:
        resolve_template(template, tokenizer)
        tokenizer.save_pretrained(folder)
    return folder


def add_bos(folder: Path, bos: str = "<s>") -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    index = next(token["id"] for token in told["added_tokens"] if token["content"] == bos)
    told["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
    path.write_text(json.dumps(told))


def spm_tokenizer(folder: Path, *, legacy: bool) -> None:
    """SentencePiece's kind: bytes as tokens, spaces as ▁; ``legacy`` puts one after special tokens too."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TEXT + [part for pair in CONVERSATIONS for part in pair]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=440, special_tokens=special, show_progress=False))
    told = json.loads(raw.to_str())
    told["added_tokens"] = told["added_tokens"][:3]  # the bytes are ordinary tokens
    (folder / "raw.json").write_text(json.dumps(told))
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "raw.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    (folder / "raw.json").unlink()
    fast.save_pretrained(folder)
    add_bos(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    resolve_template("zephyr", tokenizer)
    tokenizer.save_pretrained(folder)


def read_back(file: Path):
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def fields(file: Path) -> dict:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


@torch.no_grad()
def off(model, other) -> float:
    """‖difference of the logits‖ / ‖logits‖."""
    a, b = model(IDS).logits, other(IDS).logits
    return float((a - b).norm() / a.norm())


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> Path:
    return model_dir(tmp_path_factory.mktemp("models") / "small", num_hidden_layers=2)


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("q8_0", 3e-2)])
def test_transformers_reads_the_model_back(mistral, tmp_path, kind, most):
    report = write_gguf(mistral, tmp_path / "m.gguf", kind)
    model, tokenizer = read_back(report.out)
    own = AutoModelForCausalLM.from_pretrained(mistral, dtype=torch.float32)
    assert off(own, model) < most
    assert report.types == {"F32": 5, kind.upper(): 16}  # the norms, and every matrix
    assert report.error < most
    template = resolve_template("auto", AutoTokenizer.from_pretrained(mistral))
    assert tokenizer.chat_template == template.text
    for text in (SAMPLE, template.text_of([{"role": "user", "content": "What's 12 + 3?"}], True)):
        assert (
            tokenizer(text, add_special_tokens=False).input_ids
            == template.tokenizer(text, add_special_tokens=False).input_ids
        )


def test_tied_embeddings_biases_and_bf16(tmp_path):
    folder = model_dir(
        tmp_path / "llama",
        "llama",
        bos=False,
        template=None,
        tie_word_embeddings=True,
        attention_bias=True,
        head_dim=32,
    )
    weights = load_file(folder / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.bias"].abs().max() > 0
    save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    report = write_gguf(folder, tmp_path / "m.gguf")
    told = fields(report.out)
    assert "output.weight" not in {tensor.name for tensor in gguf.GGUFReader(report.out).tensors}
    assert told["llama.attention.key_length"] == 32 and told["tokenizer.ggml.add_bos_token"] is False
    state = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(report.out).tensors}
    # channels i and i + 16 of a head of 32 stand beside each other
    for part in ("weight", "bias"):
        own = load_file(folder / "model.safetensors")[f"model.layers.0.self_attn.q_proj.{part}"].float()
        stored = state[f"blk.0.attn_q.{part}"].float()
        assert torch.allclose(stored[:4], own[[0, 16, 1, 17]], atol=1e-4) and not torch.equal(stored, own)
    own = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.allclose(state["token_embd.weight"].float(), own, rtol=0, atol=3e-8)  # float16's smallest step is 6e-8


def test_scaled_rotary_embeddings_become_factors(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    folder = model_dir(
        tmp_path / "m", "llama", rope_parameters={**rope, "original_max_position_embeddings": 64}, num_hidden_layers=1
    )
    report = write_gguf(folder, tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(report.out).tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 1e4 ** -(torch.arange(0, 16, 2).float() / 16)
    assert torch.allclose(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert factors[0] == 1 and float(factors[-1]) == pytest.approx(8)
    told = json.loads((folder / "config.json").read_text())
    told["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="yarn scale attention"):
        write_gguf(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece(tmp_path, legacy):
    folder = model_dir(tmp_path / "m", template=None, num_hidden_layers=1)
    spm_tokenizer(folder, legacy=legacy)
    report = write_gguf(folder, tmp_path / "m.gguf")
    told = fields(report.out)
    assert told["tokenizer.ggml.model"] == "llama" and told["tokenizer.ggml.add_space_prefix"] is legacy
    tokens, types, scores = (told[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "scores"))
    assert types[:3] == [2, 3, 3] and tokens[3] == "<0x00>" and set(types[3:259]) == {6}
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    order = [scores[tokens.index("".join(merge))] for merge in merges]
    assert order == sorted(order, reverse=True)  # what merges first has the higher score
    assert any("neither" in note for note in report.notes) is not legacy
    if not legacy:  # transformers' reader knows only this way of putting spaces
        own, back = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
        text = resolve_template("auto", own).text_of([{"role": "user", "content": " a dog\n\n with é 日"}], True)
        assert back(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
    if find_spec("llama_cpp") is not None:
        assert check_prompts(folder, report.out) == "prompt ids equal llama.cpp's in 2 texts"


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_generates_what_transformers_does(mistral, tmp_path):
    import llama_cpp

    report = write_gguf(mistral, tmp_path / "m.gguf")
    assert check_prompts(mistral, report.out) == "prompt ids equal llama.cpp's in 2 texts"
    template = resolve_template("auto", AutoTokenizer.from_pretrained(mistral))
    prompt = template.prompt_ids([{"role": "user", "content": "Who are you?"}]).tolist()
    own = AutoModelForCausalLM.from_pretrained(mistral, dtype=torch.float32)
    wanted = own.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
    model = llama_cpp.Llama(str(report.out), n_ctx=128, n_threads=1, verbose=False)
    found = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        found.append(token)
        if len(found) == len(wanted):
            break
    model.close()
    assert found == wanted
    report = write_q4_k_m(mistral, tmp_path / "q4.gguf")
    assert report.types["F32"] == 5 and sum(report.types.values()) == 21
