"""``check``: adapters that were trained wrongly in the known ways are found, and right ones are sound."""

import json
import math
import shutil

import pytest
import torch

from tests.conftest import CONVERSATIONS, make_model
from tests.train.test_train import dpo_words, words
from zephyr_lite.audit.files import Level, gather
from zephyr_lite.audit.measure import with_bos
from zephyr_lite.audit.run import audit
from zephyr_lite.cli import app as cli
from zephyr_lite.config.load import load_config
from zephyr_lite.data.batch import collate_conversations
from zephyr_lite.data.chat_template import Example, resolve_template
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.base import load_tokenizer
from zephyr_lite.model.decoder import Decoder
from zephyr_lite.model.peft_io import LoraWeights, read_adapter, write_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

PLAIN = {"load_in_4bit": "false"}
LN2 = math.log(2)


@pytest.fixture(scope="module")
def run(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    """Both stages."""
    out = tmp_path_factory.mktemp("runs") / "a"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, batch_size=1, num_train_epochs=12, **PLAIN)))
    run_dpo(load_config("dpo", None, dpo_words(tiny_base, out, pair_rows, **PLAIN)))
    return out


def found(topic, adapter, **options):
    """The findings on a topic: level and text."""
    return [(f.level, f.text) for f in audit(str(adapter), **options).findings if f.topic == topic]


def files(topic, adapter, **options):
    return found(topic, adapter, files_only=True, **options)


def save(folder, modules, base="mistralai/Mistral-7B-v0.1"):
    write_adapter(folder, dict(modules), base_model_name=base)
    return folder


def by_hand(base, folder, change=lambda example, tokenizer: example, *, saved=None, steps=40):
    """An adapter trained on the conversations, each changed as told, and saved with tokenizer and template."""
    tokenizer = load_tokenizer(base)
    chosen = resolve_template("zephyr", tokenizer)
    examples = []
    for place, (question, answer) in enumerate(CONVERSATIONS):
        ids, mask = chosen.encode([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        examples.append(change(Example(ids, mask, "", place), tokenizer))
    stack = AdapterStack(make_model())
    stack.add_trainable("own", r=4, alpha=8, targets="all-linear", seed=1)
    decoder = Decoder(stack, torch.float32)
    optimizer = torch.optim.AdamW(stack.parameters().values(), lr=1e-2)
    batch = collate_conversations(examples)
    for _ in range(steps):
        optimizer.zero_grad()
        (-decoder.token_logps(batch).mean()).backward()
        optimizer.step()
    save(folder, stack.weights("own"), str(base))
    tokenizer.chat_template = saved or chosen.text
    tokenizer.save_pretrained(folder)
    return folder


# Adapters of this program


def test_a_run_of_this_program_is_sound(run, pair_rows, chat_rows):
    for stage in ("sft", "dpo"):
        result = audit(str(run / stage), rows=str(chat_rows), pairs=str(pair_rows) if stage == "dpo" else None)
        assert result.level <= Level.note, [f for f in result.findings if f.level > Level.note]
        assert result.tool == "zephyr-lite" and result.method == stage
    told = {f.topic: f.text for f in result.findings if f.level == Level.right}
    assert told["below"] and f"ln 2 against the start of training ({run}/sft/adapter)" in told["reference"]
    assert result.numbers["pairs"]["start"]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert result.numbers["pairs"]["start"]["accuracy"] > 0.5


def test_a_claimed_reference_that_is_not_the_start_is_wrong(run, pair_rows, chat_rows):
    given = {"rows": str(chat_rows), "pairs": str(pair_rows)}
    result = audit(str(run / "dpo"), **given, reference="base")
    worst = [f for f in result.findings if f.level == Level.wrong]
    assert [f.topic for f in worst] == ["reference"] and "against the bare base, not ln 2" in worst[0].text
    assert abs(result.numbers["pairs"]["base"]["loss"] - LN2) > 1e-3
    result = audit(str(run / "dpo"), **given, reference=str(run / "sft"))
    assert result.verdict() == "sound" and str(run / "sft") in result.numbers["pairs"]


def test_a_delta_needs_the_adapters_below_it(run, chat_rows, tmp_path):
    result = audit(str(run / "dpo" / "delta"), rows=str(chat_rows))
    assert result.level <= Level.note and any("right only with sft/adapter below" in f.text for f in result.findings)
    rows = result.numbers["rows"]
    assert rows["policy"]["loss"] < rows["alone"]["loss"] - 0.1
    # copied out of its run it is an adapter of an unknown tool
    shutil.copytree(run / "dpo" / "delta", tmp_path / "copy")
    for file in (run / "sft" / "adapter").iterdir():
        if not file.name.startswith("adapter_"):
            shutil.copy(file, tmp_path / "copy")
    bare = audit(str(tmp_path / "copy"), files_only=True)
    assert bare.verdict() == "no fault found in the files"
    assert bare.not_checked == ["base", "below", "bos", "end", "template"]
    lone = audit(str(tmp_path / "copy"), rows=str(chat_rows), below=[str(run / "sft")], load_in_4bit=False)
    assert any(f.level == Level.right and "are likelier on the adapters below it" in f.text for f in lone.findings)
    assert lone.numbers["rows"]["policy"]["loss"] == pytest.approx(rows["policy"]["loss"], rel=1e-6)


# Adapters of other tools


@pytest.mark.parametrize(
    ("change", "continued"),
    [
        (lambda w: LoraWeights(w.a + 0.01 * torch.randn_like(w.a), w.b * 1.5, w.scale), True),
        (lambda w: LoraWeights(torch.randn_like(w.a), w.b, w.scale), False),
        # scripts set one seed for every stage: a fresh adapter has the first one's A, and a B of its own
        (lambda w: LoraWeights(w.a + 0.01, torch.randn_like(w.b) * w.b.std(), w.scale), False),
    ],
    ids=["continued", "fresh", "the same seed"],
)
def test_a_continued_adapter_is_told_from_a_stacked_one(run, tmp_path, change, continued):
    torch.manual_seed(0)
    modules = read_adapter(run / "sft/adapter").modules
    folder = save(tmp_path / "a", {name: change(weights) for name, weights in modules.items()})
    ((as_below, _),) = files("below", folder, below=[str(run / "sft")])
    ((as_start, _),) = files("below", folder, start=str(run / "sft"))
    assert (as_below, as_start) == ((Level.wrong, Level.right) if continued else (Level.right, Level.wrong))


def test_an_untrained_adapter_is_found(tiny_base, tmp_path):
    stack = AdapterStack(make_model())
    stack.add_trainable("own", r=4, alpha=8, targets="all-linear", seed=1)
    assert files("weights", save(tmp_path / "a", stack.weights("own")))[0][0] == Level.wrong


@pytest.mark.parametrize(
    ("record", "level"),
    [
        ({"step": 1, "loss": 0.6931, "rewards/margins": 0.0, "rewards/accuracies": 0.0}, Level.right),
        ({"step": 1, "loss": 0.61, "rewards/margins": 0.2, "rewards/accuracies": 0.8}, Level.wrong),
        ({"step": 10, "loss": 0.41, "rewards/accuracies": 0.8}, Level.doubtful),
    ],
)
def test_a_trainers_log_shows_where_dpo_began(run, tmp_path, record, level):
    save(tmp_path / "a", read_adapter(run / "sft/adapter").modules, "org/Base-7B")
    for number, history in ((9, [{"step": 1, "loss": 5.0}]), (10, [record])):
        (tmp_path / f"a/checkpoint-{number}").mkdir()
        (tmp_path / f"a/checkpoint-{number}/trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert gather(str(tmp_path / "a")).method == "dpo"
    assert files("reference", tmp_path / "a")[0][0] == level


# Measurements


def test_rows_with_bos_twice_are_found(tiny_base, chat_rows, tmp_path):
    twice = by_hand(tiny_base, tmp_path / "twice", lambda e, t: with_bos(e, t.bos_token_id, 2))
    for folder, level in ((twice, Level.doubtful), (by_hand(tiny_base, tmp_path / "once"), Level.right)):
        told = found("bos", folder, rows=str(chat_rows), load_in_4bit=False)
        assert told[0][0] == level and ("BOS twice" in told[0][1]) == (level == Level.doubtful), told


def test_a_masked_end_token_is_found(tiny_base, chat_rows, tmp_path):
    def no_end(example, tokenizer):
        return Example(example.ids, example.mask & (example.ids != tokenizer.eos_token_id), "", example.index)

    folder = by_hand(tiny_base, tmp_path / "a", no_end)
    assert found("end", folder, rows=str(chat_rows), load_in_4bit=False)[0][0] == Level.wrong


def test_another_template_than_the_saved_one_is_found(run, tiny_base, chat_rows, tmp_path):
    other = (
        "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    )
    folder = by_hand(tiny_base, tmp_path / "a", saved=other, steps=80)
    told = found("template", folder, rows=str(chat_rows), load_in_4bit=False)
    assert told[-1][0] == Level.doubtful and "under the template zephyr" in told[-1][1]
    # a stage that records the saved one was trained with it, however its few rows turned out
    shutil.copytree(run / "sft", tmp_path / "run/sft", ignore=shutil.ignore_patterns("adapter"))
    shutil.copytree(folder, tmp_path / "run/sft/adapter")
    recorded = json.loads((run / "sft/stage.json").read_text()) | {"chat_template": other}
    (tmp_path / "run/sft/stage.json").write_text(json.dumps(recorded))
    told = found("template", tmp_path / "run/sft", rows=str(chat_rows), load_in_4bit=False)
    assert [level for level, _ in told] == [Level.note, Level.right] and "under the template zephyr" in told[0][1]
    (folder / "chat_template.jinja").unlink()
    told = found("template", folder, rows=str(chat_rows), load_in_4bit=False)
    assert [t[0] for t in told] == [Level.doubtful, Level.note] and "zephyr fits it best" in told[1][1]


# Mistakes


def test_a_missing_base_is_a_finding_and_another_base_is_wrong(run, tmp_path):
    shutil.copytree(run / "sft" / "adapter", tmp_path / "a")
    assert "nothing could be measured" in found("base", tmp_path / "a", base="nobody/nothing")[-1][1]
    make_model(hidden_size=32, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path / "b")
    for file in (run / "sft/adapter").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "b")
    told = found("base", run / "sft/adapter", base=str(tmp_path / "b"), load_in_4bit=False)
    assert told[-1][0] == Level.wrong and "does not fit" in told[-1][1]


def test_the_command_prints_a_verdict_and_writes_it(run, chat_rows, pair_rows, tmp_path, capsys):
    given = ["--rows", str(chat_rows), "--pairs", str(pair_rows), "--out", str(tmp_path / "sub/check.json")]
    assert cli.run(["check", str(run / "dpo/delta"), "--files-only"]) == 0
    assert capsys.readouterr().out.endswith(
        "not checked: base, below, bos, end, template\nverdict: no fault found in the files\n"
    )
    assert cli.run(["check", str(run / "dpo"), *given]) == 0
    out = capsys.readouterr().out
    assert "verdict: sound" in out and "not checked" not in out
    told = json.loads((tmp_path / "sub/check.json").read_text())
    assert told["verdict"] == "sound" and told["numbers"]["pairs"]["start"]["pairs"] == 8
    assert cli.run(["check", str(run / "dpo"), *given, "--reference", "base"]) == 2
    said = capsys.readouterr()
    assert "verdict: WRONG (reference)" in said.out and not said.err  # the finding is in the table
