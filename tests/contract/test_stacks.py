"""Adapters given together: list of adapters -> an error, a note, or nothing; the same in every command."""

import shutil

import pytest
import torch

from tests.conftest import make_tokenizer, tiny_config
from tests.messages import messages_to
from zephyr_lite.cli.eval import say_models
from zephyr_lite.client.local_model import Weights
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.templates import ZEPHYR
from zephyr_lite.errors import UserError
from zephyr_lite.evaluate.judge import Answering
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model.chain import check_stack
from zephyr_lite.model.loaded import open_live
from zephyr_lite.model.peft_io import LoraWeights, compose, read_adapter, write_adapter
from zephyr_lite.train.below import adapters_below

MODULES = [f"model.layers.{layer}.mlp.{leaf}" for layer in range(2) for leaf in ("gate_proj", "up_proj")]
SFT_CARD = "---\ntags: [trl, sft]\n---\nThis model is a fine-tuned version of [org/Base-7B](https://huggingface.co/x)."


def drawn(seed, rank=4):
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape):
        return torch.randn(shape, generator=generator)

    return {name: LoraWeights(matrix(rank, 64), matrix(128, rank), 2.0) for name in MODULES}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder of adapters as other tools write them; see the table."""
    root = tmp_path_factory.mktemp("adapters")
    sft, other = drawn(0), drawn(1)
    noise = drawn(2)

    def write(name, modules, card=None):
        write_adapter(root / name, modules, base_model_name="org/Base-7B")
        if card is not None:
            (root / name / "README.md").write_text(card)

    write("sft", sft, SFT_CARD)
    write("dpo", other)
    continued = {n: LoraWeights(w.a + 0.01 * noise[n].a, w.b + 0.2 * noise[n].b, w.scale) for n, w in sft.items()}
    write("continued", continued)
    again = {n: LoraWeights(w.a, w.b + 0.2 * other[n].b, w.scale) for n, w in sft.items()}
    write("sibling", again)
    write("same-seed", {n: LoraWeights(w.a, other[n].b, w.scale) for n, w in sft.items()})
    write("other-scale", {n: LoraWeights(w.a, w.b, 1.0) for n, w in continued.items()})
    write(
        "more-modules",
        {**continued, "model.layers.0.mlp.down_proj": LoraWeights(noise[MODULES[0]].b.T, torch.ones(64, 4), 1)},
    )
    write("untrained", {n: LoraWeights(w.a, torch.zeros_like(w.b), w.scale) for n, w in sft.items()})
    write(
        "dpo-on-sft",
        other,
        "---\ntags: [trl, dpo]\n---\nThis is a fine-tuned version of [me/sft](https://hf.co/me/sft).",
    )
    write("dpo-on-none", other, "This model is a fine-tuned version of [None](https://huggingface.co/None).")
    write("dpo-on-unknown", other, "This model is a fine-tuned version of an unknown model on the None dataset.")
    write("dpo-base-model", other, "---\nbase_model: me/zephyr-sft-qlora\n---\n")
    shutil.copytree(root / "sft", root / "copy")
    write("composed", compose([read_adapter(root / "sft"), read_adapter(root / "dpo")]))
    return root


@pytest.mark.parametrize(
    ("names", "error", "note"),
    [
        (["sft"], None, None),
        (["sft", "dpo"], None, None),
        (["sft", "same-seed"], None, None),
        (["continued"], None, None),
        (["sft", "continued"], "count what they share twice", None),
        (["continued", "sft"], "count what they share twice", None),
        (["sft", "dpo", "continued"], "count what they share twice", None),
        (["continued", "sibling"], "count what they share twice", None),
        (["sft", "other-scale"], "count what they share twice", None),
        (["sft", "more-modules"], "count what they share twice", None),
        (["sft", "composed"], "count what they share twice", None),
        (["composed", "dpo"], "count what they share twice", None),
        (["sft", "copy"], "is the same adapter as", None),
        (["sft", "untrained"], "every lora_B is zero", None),
        (["sft", "dpo-on-sft"], None, None),
        (["dpo-on-sft"], None, "its card says that it was trained from me/sft"),
        (["dpo", "dpo-base-model"], "is the same adapter as", None),
        (["dpo-base-model"], None, "its card says that it was trained from me/zephyr-sft-qlora"),
        (["dpo-on-none"], None, None),
        (["dpo-on-unknown"], None, None),
    ],
)
def test_adapters_given_together(adapters, names, error, note):
    stack = [read_adapter(adapters / name) for name in names]
    if error is not None:
        with pytest.raises(UserError, match=error):
            check_stack(stack, "org/Base-7B")
        return
    notes = check_stack(stack, "org/Base-7B")
    assert len(notes) == (note is not None) and all(note in line for line in notes)


def test_a_delta_on_other_adapters_than_its_own_is_said(adapters, tmp_path):
    stage = StageDir(tmp_path / "run/dpo")
    shutil.copytree(adapters / "dpo", stage.delta)
    for below, said in (("sft", 0), ("same-seed", 1)):
        links = [{"path": "sft/adapter", "sha256": read_adapter(adapters / "sft").sha256}]
        stage.write_info({"status": "complete", "adapters": links})
        notes = check_stack([read_adapter(adapters / below), read_adapter(stage.delta)], "org/Base-7B")
        assert sum("trained on top of adapters that are not below it" in note for note in notes) == said


def test_a_base_that_the_sft_adapter_was_merged_into_is_what_the_card_says(adapters):
    assert "card" not in " ".join(check_stack([read_adapter(adapters / "dpo-on-sft")], "models/sft"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from transformers import MistralForCausalLM

    folder = tmp_path_factory.mktemp("bases") / "Base-7B"
    MistralForCausalLM(tiny_config()).save_pretrained(folder)
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = ZEPHYR
    tokenizer.save_pretrained(folder)
    return folder


def given_to(command, base, names, out):
    if command == "merge":
        run_merge(out, adapters=names, base=str(base), check=False)
    elif command == "chat and eval":
        open_live(adapters=names, base=str(base))
    else:
        config = RunConfig(model_name_or_path=str(base), adapters=names)
        adapters_below("dpo", config, StageDir(out / "dpo"))


@pytest.mark.parametrize("command", ["merge", "chat and eval", "dpo"])
def test_every_command_says_it(adapters, base, command, tmp_path):
    said = []
    with pytest.raises(UserError, match="twice"):
        given_to(command, base, [str(adapters / "sft"), str(adapters / "continued")], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    with messages_to(said.append):
        given_to(command, base, [str(adapters / "dpo-on-sft")], tmp_path / "b")
    assert sum("its card says that it was trained from me/sft" in line for line in said) == 1


def test_the_judged_evaluations_say_it_too(adapters, base, capsys):
    weights = Weights(adapters=[str(adapters / "dpo-on-sft")], base=str(base))
    say_models(Answering({}, weights, None))
    assert "note: adapter" in capsys.readouterr().out
    with pytest.raises(UserError, match="twice"):
        Weights(adapters=[str(adapters / "sft"), str(adapters / "continued")], base=str(base))
