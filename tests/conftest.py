"""Tiny models, a small real tokenizer and a few rows that tests share. Everything is made here; nothing is downloaded."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

from tests import isolation  # noqa: F401  # isort: skip

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    # Triton decides at its own import, and at each kernel's, whether they are for its interpreter. Whether an operation
    # runs them is decided at every call: the fixture ``kernels`` sets the variable again, everything else runs the twins.
    os.environ["TRITON_INTERPRET"] = "1"
    from zephyr_lite.ops import dispatch

    for operation in dispatch.OPERATIONS:
        import_module(f"zephyr_lite.ops.{operation}")
    del os.environ["TRITON_INTERPRET"]

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from tests.messages import messages_to
from zephyr_lite.cli import app
from zephyr_lite.train import general

general.CPU_EVERY = 64  # a stage of the tests measures one passage

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog answers with a question of its own.",
    "What do you like to cook on a rainy evening? I would make a pot of tomato soup and bread with cheese.",
    "<|system|> <|user|> <|assistant|> How can I help you today? Here are three ideas: walk, read, sleep.",
    "zephyr-lite trains a chat model on one graphics card; first with conversations, then with preferences.",
]

CONVERSATIONS = [
    ("What is a good soup for a rainy evening?", "Tomato soup. Roast the tomatoes first, then blend them with garlic."),
    ("Who are you?", "I am a small model that was trained in a test, and I answer in one line."),
    ("Name three rivers.", "The Rhine, the Nile and the Amazon."),
    ("How do I sleep better?", "Go to bed at the same hour, keep the room dark, and leave the phone outside."),
    ("Tell me a joke.", "Why did the fox jump over the dog? The dog would not move."),
    ("What is two plus two?", "Four."),
    ("Translate good morning into French.", "Bonjour."),
    ("How long do I boil an egg?", "Seven minutes for a soft yolk, ten for a firm one."),
]


# The files that take longest. They begin first, so that no worker is left with one of them at the end.
LONGEST = (
    "train/test_small_data",
    "contract/test_kill",
    "ops/test_dispatch",
    "engines/test_baselines",
    "contract/test_streaming",
    "ui/test_page",
    "merge/test_merge_measure",
    "io/test_faults",
    "contract/test_foreign_code",
    "recipe/test_ablations",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 400 tokens with <s> and </s>, as fast tokenizers of hub models are built."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = TEXT + [part for pair in CONVERSATIONS for part in pair]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


# of a model small enough for a unit test, with grouped queries
SIZES = {
    "vocab_size": 448,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_config(kind: str = "mistral", **changes):
    """A Mistral or Llama configuration of ``SIZES``."""
    settings = {
        **SIZES,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **({"sliding_window": None} if kind == "mistral" else {}),
        **changes,
    }
    return MistralConfig(**settings) if kind == "mistral" else LlamaConfig(**settings)


def make_model(kind: str = "mistral", seed: int = 0, **changes):
    """A model of random weights, larger than the usual initialization so that errors show."""
    torch.manual_seed(seed)
    config = tiny_config(kind, **changes)
    return randomized(MistralForCausalLM(config) if kind == "mistral" else LlamaForCausalLM(config))


def randomized(model, bias: float = 0.08):
    """The model with random weights. ``bias``: the biases' standard deviation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, bias if name.endswith("bias") else 0.08)
    return model.eval()


@pytest.fixture
def kernels(monkeypatch):
    """Operations run their Triton kernels, in triton's interpreter where there is no GPU."""
    torch.manual_seed(0)
    monkeypatch.setattr("zephyr_lite.ops.dispatch._failed", set())
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def working_folder(tmp_path_factory, monkeypatch) -> Path:
    """A new, empty working folder: no test sees the runs of the checkout."""
    folder = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def invoke(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        code = app.run([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """A folder in the hub's layout: a tiny random Mistral and its tokenizer, without a chat template."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory) -> Path:
    """A JSONL of small conversations in ``messages`` form; two of them have several turns, one a system turn."""
    rows = [_messages(*pair) for pair in CONVERSATIONS]
    rows[1] = [{"role": "system", "content": "Answer in one line."}, *rows[1]]
    rows[2] = rows[2] + _messages("And three more?", "The Danube, the Congo and the Mekong.")
    rows[5] = rows[5] + _messages("Times three?", "Twelve.")
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def pair_rows(tmp_path_factory) -> Path:
    """A JSONL of small preference pairs in the schema of ultrafeedback_binarized."""
    rows = []
    for question, answer in CONVERSATIONS:
        other = (
            "As a model I have no opinion on that."
            if len(answer) % 2
            else "Well. Hmm. It depends on many, many things."
        )
        rows.append({"prompt": question, "chosen": _messages(question, answer), "rejected": _messages(question, other)})
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def talk_run(tmp_path_factory, chat_rows, pair_rows):
    """A run of two stages whose adapters matter, on a base with a sliding window smaller than a conversation."""
    from tests.train.test_train import dpo_words, words
    from zephyr_lite.config.load import load_config
    from zephyr_lite.train.dpo import run_dpo
    from zephyr_lite.train.sft import run_sft

    base, out = tmp_path_factory.mktemp("windowed"), tmp_path_factory.mktemp("talk") / "run"
    make_model(sliding_window=24, max_position_embeddings=256).save_pretrained(base)
    make_tokenizer(base)
    small = {"load_in_4bit": "false", "max_steps": 4, "learning_rate": 0.02}
    run_sft(load_config("sft", None, words(base, out, chat_rows, **small)))
    run_dpo(load_config("dpo", None, dpo_words(base, out, pair_rows, **small)))
    return out


@pytest.fixture
def said():
    """The package's messages, as text."""
    lines = []
    with messages_to(lines.append):
        yield lines
