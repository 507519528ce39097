"""The measure after a merge: KL, top token and held-out loss are what whole distributions give, for both ways."""

from __future__ import annotations

import json

import pytest
import torch

from tests.contract.test_merged import in_4bit, make_adapter, make_base, save_tokenizer
from tests.messages import messages_to
from zephyr_lite.cli.app import run
from zephyr_lite.evaluate.likelihood import chat_loss
from zephyr_lite.evaluate.rows import held_out
from zephyr_lite.merge import command
from zephyr_lite.merge import measure as measuring
from zephyr_lite.merge.command import run_merge
from zephyr_lite.model.loaded import open_live

SMALL = ["max_steps=3", "lora_r=4", "batch_size=4", "learning_rate=1e-2", "max_length=96"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_base, chat_rows, pair_rows):
    """In 4 bits, two stages; the second holds out pairs."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    common = [f"output_dir={folder}", *SMALL]
    first = ["sft", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}", f"eval_dataset={chat_rows}", *common]
    assert run(first) == 0
    assert run(["dpo", f"dataset={pair_rows}", f"eval_dataset={pair_rows}", "max_prompt_length=48", *common]) == 0
    return folder


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """Merged onto the base, both ways measured."""
    out = tmp_path_factory.mktemp("merged") / "model"
    lines: list[str] = []
    with messages_to(lines.append):
        found = run_merge(out, run=trained, onto="base", both=True)
    return out, found, lines


def test_the_numbers_are_those_of_whole_distributions(trained, merged):
    """In float64, row by row, from the live stack and from the folder by plain transformers."""
    out, found, _ = merged
    live = open_live(trained)
    data = held_out(live.chain, live.template, "sft").data
    sums = dict.fromkeys(("kl", "same", "loss", "live"), 0.0)
    tokens = 0
    with measuring.open_folder(out) as model, torch.no_grad():
        for example in data.examples:
            ids, mask = torch.tensor(example.ids[None].tolist()), torch.from_numpy(example.mask[1:])
            p, q = (m(input_ids=ids).logits[0, :-1].double().log_softmax(-1)[mask] for m in (live.stack.model, model))
            at = ids[0, 1:][mask][:, None]
            sums["kl"] += (p.exp() * (p - q)).sum().item()
            sums["same"] += (p.argmax(-1) == q.argmax(-1)).sum().item()
            sums["loss"] -= q.gather(1, at).sum().item()
            sums["live"] -= p.gather(1, at).sum().item()
            tokens += len(at)
    way = found.numbers["base"]
    loss = found.numbers["live"]["loss"].value
    assert (found.rows, found.tokens) == (len(data.lengths), tokens)
    assert way["kl"].value == pytest.approx(sums["kl"] / tokens, rel=1e-4)
    assert way["top1_agreement"].value == pytest.approx(sums["same"] / tokens, abs=1e-9)
    assert way["loss"].value == pytest.approx(sums["loss"] / tokens, rel=1e-6)
    assert loss == pytest.approx(sums["live"] / tokens, rel=1e-6)
    assert way["loss_minus_live"].value == pytest.approx((sums["loss"] - sums["live"]) / tokens, rel=1e-3)
    # the number that `eval loss` gives
    assert loss == pytest.approx(chat_loss(live.decoder("dpo"), data), rel=1e-5)


def test_nf4_is_the_live_stack_and_base_is_not(merged):
    _, found, lines = merged
    assert 0 < found.numbers["nf4"]["kl"].value < 1e-6 < 1e-3 < found.numbers["base"]["kl"].value
    assert found.numbers["nf4"]["top1_agreement"].value == 1.0 > found.numbers["base"]["top1_agreement"].value
    assert abs(found.numbers["nf4"]["loss_minus_live"].value) < 1e-5
    between = found.numbers["base"]["loss"].value - found.numbers["nf4"]["loss"].value
    assert found.numbers["base_minus_nf4"]["loss"].value == pytest.approx(between, abs=1e-9)
    said = [line.split(":")[0] for line in lines if line.startswith(("loss ", "merged onto", "--onto"))][-5:]
    assert said[:2] == ["loss as trained", "merged onto the 16-bit base"]
    assert said[2:] == ["merged onto the 4-bit weights", "--onto base", "--onto nf4"]


def test_it_is_kept_in_the_folder_and_the_other_one_is_gone(merged):
    out, found, _ = merged
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    told = json.loads((out / "zephyr_lite.json").read_text())
    assert told["onto"] == "base" and told["measured"] == json.loads(json.dumps(found.as_dict()))
    assert told["measured"]["nf4"]["kl"]["value"] == found.numbers["nf4"]["kl"].value
    assert told["measured"]["data"]["rows"] == 8


def test_the_better_way_is_kept(tiny_base, chat_rows, tmp_path, monkeypatch):
    """What was trained for long has learned to correct the rounding; never are there two folders."""
    words = [f"output_dir={tmp_path / 'run'}", *SMALL, "max_steps=60", "samples=0", f"eval_dataset={chat_rows}"]
    assert run(["sft", f"model_name_or_path={tiny_base}", f"dataset={chat_rows}", *words]) == 0
    out, made, lines = tmp_path / "model" / "m", [], list[str]()

    def watched(*arguments, onto, **settings):
        assert not out.exists()
        made.append(onto)
        merge(*arguments, onto=onto, **settings)

    merge = command.merge
    monkeypatch.setattr(command, "merge", watched)
    with messages_to(lines.append):
        found = run_merge(out, run=tmp_path / "run")
    told = json.loads((out / "zephyr_lite.json").read_text())
    losses = {name: told["measured"][name]["loss"]["value"] for name in ("live", *made)}
    assert [path.name for path in out.parent.iterdir()] == ["m"]
    assert made == ["base", "nf4"] and told["onto"] == "nf4"
    assert losses["base"] > losses["live"] + 0.05 and losses["nf4"] == pytest.approx(losses["live"], abs=1e-4)
    assert f"{losses['base']:.3f}" in lines[-3] and lines[-3].endswith("worse, removed")
    assert lines[-1] == f"{found.line('nf4')}: kept"
    with messages_to(lines.append):
        assert run_merge(out, run=tmp_path / "run") is None
    assert lines[-1] == f"{out} is complete already, onto the 4-bit weights." and len(made) == 2


def test_a_base_stored_in_nf4_has_one_way(tmp_path):
    plain = make_base(tmp_path / "plain")
    adapter = make_adapter(plain, tmp_path / "adapter", 1)
    in_4bit(plain, True).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", template=True)
    run_merge(tmp_path / "m", adapters=[str(adapter)], base=str(tmp_path / "base"), check=False)
    assert json.loads((tmp_path / "m" / "zephyr_lite.json").read_text())["onto"] == "nf4"
