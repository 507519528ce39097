"""Qwen2, the worked example of docs/extending.md, through all that a family meets: layer, decoder, NF4, streaming, plan,
recipe, merge, chat, GGUF. What the layer does in general is tested on the other two families in the other files."""

import json
import shutil
import unicodedata

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.conftest import CONVERSATIONS, SIZES, TEXT, randomized
from tests.contract.test_fuse import RIGHT, assert_same, both, peft_model
from tests.contract.test_gguf import fields, off, read_back
from tests.contract.test_layer import KEEPS, compare
from tests.contract.test_streaming import assert_bits, decoder_over, dpo_steps, plan_of, sft_steps
from tests.numeric import apart, conversation, hugging_face_logps, live_stack, pair
from tests.train.test_train import LN2, dpo_words, metrics, words
from zephyr_lite.chat import load_chat
from zephyr_lite.chat.generate import Sampling, Streamer
from zephyr_lite.config.load import RunConfig, load_config
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.data.chat_template import resolve_template
from zephyr_lite.errors import UserError
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.gguf_vocab import _QWEN2
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.base import load_base
from zephyr_lite.model.base_folder import read_model_config
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.families import FAMILIES, layer_windows
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

# Layer 0 sees everything, layer 1 the last nine tokens.
MIXED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
# of the shape of Qwen2.5's own: a system turn that nobody wrote, then ChatML
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen2(seed=0, **changes):
    """Random weights and biases, as large as in the other tests; embeddings tied, as in the small ones of the hub."""
    torch.manual_seed(seed)
    settings = {
        **SIZES,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        **changes,
    }
    return randomized(Qwen2ForCausalLM(Qwen2Config(**settings)), bias=0.3)


def save_tokenizer(folder):
    """As Qwen2's: NFC, a text split as it splits it, byte-level BPE, no BOS; an eos that is not what ends a turn."""
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated", invert=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT + [part for row in CONVERSATIONS for part in row], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=special[0], pad_token=special[0], extra_special_tokens=special[1:]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2")
    qwen2(eos_token_id=0, **MIXED).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, chat_rows, pair_rows, tmp_path_factory):
    """Both stages, the base unquantized, so that a merge rounds nothing."""
    out = tmp_path_factory.mktemp("runs") / "a"
    small = {"load_in_4bit": "false", "max_steps": 4, "learning_rate": 0.02}
    run_sft(load_config("sft", None, words(base, out, chat_rows, **small)))
    run_dpo(load_config("dpo", None, dpo_words(base, out, pair_rows, **small)))
    return out


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keep", KEEPS)
def test_the_layer_equals_autograd_over_the_hugging_face_layer(keep, p):
    """In float64: biases of q, k and v, and a window in one of two layers; every adapter's gradient with it."""
    decoder = Decoder(live_stack(qwen2(**MIXED), torch.float64), torch.float64)
    compare(decoder, keep, Dropout(p, seed=1, step=4) if p else None, 1e-11)


def test_the_layer_through_nf4_and_streamed(base):
    model = load_base(RunConfig(model_name_or_path=str(base))).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.1
    compare(Decoder(live_stack(model), torch.float32, scratch="small"), "attention", Dropout(0.3, seed=1, step=4), 1e-5)

    def fresh():
        return load_base(RunConfig(model_name_or_path=str(base))).model

    plan = plan_of(keep=("attention", "input"), offload=1, tile=10, stream=True)
    want = decoder_over(fresh(), plan=plan_of(keep=("attention", "input"), tile=10))
    got = decoder_over(fresh(), plan=plan)
    for steps in (sft_steps, dpo_steps):
        assert_bits(steps(got, ("attention", "input"), None), steps(want, ("attention", "input"), None))


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None, None)),
        ({"sliding_window": 9}, (None, None)),  # as in Qwen2.5's files, where use_sliding_window is false
        (MIXED, (None, 9)),
        ({**MIXED, "layer_types": ["sliding_attention", "full_attention"]}, (9, None)),
        (
            {"tie_word_embeddings": False, "head_dim": 24, "attention_bias": False},
            (None, None),
        ),  # a key that is ignored
    ],
)
def test_the_decoder_equals_the_hugging_face_model(changes, windows):
    model = qwen2(**changes)
    assert layer_windows(model.config) == windows
    decoder = Decoder(live_stack(model), torch.float32)
    example = conversation(0, 40)
    targets = example.mask[1:].nonzero()[0] + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_a_pair_with_its_shared_prompt_equals_two_sequences_with_a_window_in_one_layer():
    decoder = Decoder(live_stack(qwen2(**MIXED)), torch.float32)
    found = pair(0, 14, 12, 7)
    with torch.no_grad():
        logps = decoder.token_logps(collate_pairs([found]))
        rows = []
        for ids in (found.chosen_ids, found.rejected_ids):
            whole = torch.from_numpy(np.concatenate([found.prompt_ids, ids])).long()
            with decoder.stack.only(["sft", "dpo"]):
                table = decoder.stack.model(whole[None]).logits[0].log_softmax(-1)
            rows.append(table[13:-1].gather(1, whole[14:, None])[:, 0])
    assert apart(logps, torch.cat(rows)) < 1e-5


def test_inside_another_trainer():
    ids = torch.randint(3, 440, RIGHT.shape, generator=torch.Generator().manual_seed(0))
    model = peft_model(qwen2(**{**MIXED, "sliding_window": 5}))
    assert_same(both(model, input_ids=ids, attention_mask=RIGHT))


def test_the_recipe_starts_dpo_at_ln_2_and_learns(run):
    assert metrics(run / "sft")[-1] < metrics(run / "sft")[0]
    losses = metrics(run / "dpo")
    assert abs(losses[0] - LN2) < 1e-6 and losses[-1] != losses[0]


def test_merged_equals_live_and_talks_alike(base, run, tmp_path):
    """Logits, and the tokens of two turns that share a cache longer than a layer's window."""
    out = tmp_path / "merged"
    chain = chain_of_run(run)
    merge(base, chain.adapters, out, tokenizer_from=chain.tokenizer_from)
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    chat = load_chat(run)
    with torch.no_grad(), chat.stack.only(["sft", "dpo"]):
        assert off(plain, chat.stack.model) < 1e-5
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["tie_word_embeddings"] is True
    first = [{"role": "user", "content": "What do you like to cook on a rainy evening?"}]
    streamer = Streamer(chat, [["sft", "dpo"]])
    for messages in (
        first,
        [*first, {"role": "assistant", "content": "Soup."}, {"role": "user", "content": "And then?"}],
    ):
        ids = [int(i) for i in chat.template.prompt_ids(messages)]
        assert len(ids) > 30
        (drawn,) = streamer.draw([ids], [Sampling(temperature=0.0, max_new_tokens=12)])
        want = plain.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=chat.ends, use_cache=False
        )[0, len(ids) :].tolist()
        assert drawn.tokens == want[: len(drawn.tokens)] and drawn.tokens
    assert drawn.reused > 30


def test_the_template_of_the_base_is_taken(base):
    template = resolve_template("auto", AutoTokenizer.from_pretrained(base))
    assert template.bos_token_id is None and template.tokenizer.convert_ids_to_tokens(template.end_token_ids) == [
        "<|im_end|>"
    ]
    rendered = template.render([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    text, spans = rendered.text, rendered.spans.values()
    assert text.startswith("<|im_start|>system\nBe of help.<|im_end|>\n")
    assert [text[span.start : span.end] for span in spans] == ["Hello.<|im_end|>"]
    assert any("is not the tokenizer's eos <|endoftext|>" in note for note in template.notes)


def test_a_gguf_file_gives_the_model_and_its_ids_back(base, tmp_path):
    report = write_gguf(base, tmp_path / "m.gguf")
    model, tokenizer = read_back(report.out)
    own = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(model) is Qwen2ForCausalLM
    # transformers' reader knows no window of this architecture, as llama.cpp does not
    assert any("last 9 tokens" in note for note in report.notes)
    own.config.use_sliding_window, full = False, qwen2()
    full.load_state_dict(own.state_dict())
    assert off(full, model) < 1e-3 < off(own, model)
    told = fields(report.out)
    assert told["general.architecture"] == "qwen2" and told["qwen2.attention.head_count_kv"] == 2
    assert (told["tokenizer.ggml.pre"], told["tokenizer.ggml.eos_token_id"]) == ("qwen2", 0)
    state = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(report.out).tensors}
    assert "output.weight" not in state
    assert torch.equal(
        state["blk.1.attn_k.bias"], own.model.layers[1].self_attn.k_proj.bias.detach()
    )  # rows as they are
    plain = AutoTokenizer.from_pretrained(base)
    text = plain.apply_chat_template([{"role": "user", "content": "12345 soups,\n\n é 日本?"}], tokenize=False)
    assert tokenizer(text).input_ids == plain(text).input_ids
    decomposed = unicodedata.normalize("NFD", "é")
    assert plain(decomposed).input_ids == plain("é").input_ids and any("NFC" in note for note in report.notes)


def test_what_a_gguf_file_of_the_family_cannot_say_is_refused(base, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(base, folder)
    told = json.loads((folder / "config.json").read_text())
    told["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match="rotary embeddings of type linear; in the qwen2 family"):
        write_gguf(folder, tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "olmo2"}, "model_type is olmo2; the fused engine knows the families mistral, llama, qwen2"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types has chunked_attention; known are"),
        ({"use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
    ],
)
def test_other_families_and_variants_are_refused(base, tmp_path, changes, match):
    told = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, **changes}))
    with pytest.raises(UserError, match=match) as error:
        read_model_config(tmp_path)
    assert "engine=trl" in error.value.hint
    assert ("docs/extending.md" in error.value.hint) == (changes.get("model_type") not in {None, *FAMILIES})
