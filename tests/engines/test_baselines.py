"""Engine trl end to end on tiny models: the same run as the fused engine's, in the same layout."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.conftest import make_tokenizer
from tests.messages import Logged, messages_to
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.model.chain import chain_of_run
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.resume import StageComplete
from zephyr_lite.train.sft import run_sft

RUN = {"sft": run_sft, "dpo": run_dpo}


def settings(method, base, rows, **changes):
    """A stage's configuration as JSON, which is YAML."""
    values = {
        "model_name_or_path": str(base),
        "chat_template": "zephyr",
        "dataset": {"path": str(rows)},
        "eval_dataset": {"path": str(rows), "limit": 4},
        "batch_size": 2 if method == "sft" else 3,
        "stage": method,
        "beta": 0.1,
    }
    values |= {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "max_length": 160, "max_prompt_length": 64}
    return json.dumps({**values, "learning_rate": 1e-3, "eval_steps": 2, "save_steps": 2, **changes})


@pytest.fixture
def run(tiny_base, chat_rows, pair_rows, tmp_path):
    """Runs a stage and returns its folder; keyword arguments are configuration keys."""

    def go(method, *, run="run", on_log=None, said=None, **changes):
        file = tmp_path / f"{method}.yaml"
        own = {"engine": "trl", "output_dir": str(tmp_path / run), "load_in_4bit": False, "num_train_epochs": 2}
        file.write_text(settings(method, tiny_base, chat_rows if method == "sft" else pair_rows, **own | changes))
        options = {"observers": [Logged(on_log)]} if on_log else {}
        with messages_to(said.append if said is not None else lambda _: None):
            RUN[method](load_config(method, str(file), []), **options)
        return tmp_path / run / method

    return go


def metrics(folder, prefix="loss"):
    return [record for line in (folder / "metrics.jsonl").open() if prefix in (record := json.loads(line))]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def assert_same_run(found, wanted, names, tolerance=2e-4):
    ours, theirs = metrics(wanted), metrics(found)
    assert [r["step"] for r in theirs] == [r["step"] for r in ours]
    assert len(ours) > 3
    for a, b in zip(theirs, ours):
        for name in names:
            if name == "rewards/accuracies" and b["rewards/margins"] == 0:
                assert (a[name], b[name]) == (0, 0.5)  # TRL counts a tie as wrong
                continue
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (a["step"], name)
        assert b.keys() <= a.keys() | {"num_targets"}
    for a, b in zip(metrics(found, "eval_loss"), metrics(wanted, "eval_loss"), strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=tolerance)


def test_sft_then_dpo_are_the_fused_engines_runs(run):
    """Losses, gradients, learning rates, evaluations of every step, over two epochs with partial last steps."""
    names = ["loss", "grad_norm", "learning_rate", "epoch"]
    trl, fused = run("sft"), run("sft", run="fused", engine="fused")
    assert_same_run(trl, fused, names)
    names += [f"rewards/{key}" for key in ("chosen", "rejected", "margins", "accuracies")] + [
        "logps/chosen",
        "num_pairs",
    ]
    trl, fused = run("dpo"), run("dpo", run="fused", engine="fused")
    assert_same_run(trl, fused, names, tolerance=2e-3)
    assert metrics(trl)[0]["loss"] == pytest.approx(0.693147, abs=2e-6)
    for name in ("adapter", "delta"):
        assert weights(trl / name).keys() == weights(fused / name).keys()


def test_the_methods_are_the_fused_engines(run):
    """rsLoRA, LoRA+, Adam's options and no clipping. NEFTune's noise is transformers' own, so it is another one."""
    keys = {"use_rslora": True, "loraplus_lr_ratio": 8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0}
    keys |= {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}}
    trl, fused = run("sft", **keys), run("sft", run="fused", engine="fused", **keys)
    assert_same_run(trl, fused, ["loss", "grad_norm", "learning_rate"])
    assert chain_of_run(trl.parent).adapters[0].config["use_rslora"]
    noisy = run("sft", run="noisy", neftune_noise_alpha=50, max_steps=1)
    assert metrics(noisy)[0]["loss"] > metrics(trl)[0]["loss"] + 1e-3


def test_the_folder_is_a_run_like_any_other(run, tiny_base):
    sft = run("sft", lora_dropout=0.1)
    info = json.loads((sft / "stage.json").read_text())
    assert (info["engine"], info["status"], info["adapters"]) == ("trl", "complete", [])
    assert (sft / "config.yaml").is_file() and (sft / "adapter/tokenizer_config.json").is_file()
    assert {p.name for p in sft.glob("checkpoint-*")} and not list(sft.glob("*.md"))
    with pytest.raises(StageComplete):
        run("sft", lora_dropout=0.1)
    dpo = run("dpo")
    chain = chain_of_run(dpo.parent)
    assert (chain.stage, len(chain.adapters)) == ("dpo", 2)
    # the composed adapter on the bare base is the trained policy
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), dpo / "adapter")(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tiny_base)
        for folder in (sft / "adapter", dpo / "delta"):
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
        assert (whole - model(ids).logits).norm() <= 1e-5 * whole.norm()


def test_nf4_continues_the_sft_adapter_at_its_own_rank(run):
    said = []
    sft = run("sft", load_in_4bit=True, lora_r=3)
    dpo = run("dpo", load_in_4bit=True, lora_r=8, said=said, precompute_ref_log_probs=True)
    assert metrics(dpo)[0]["loss"] == pytest.approx(0.693147, abs=2e-6)  # float32: the copy is exact
    assert not (dpo / "delta").exists()
    chain = chain_of_run(dpo.parent)
    assert (chain.stage, len(chain.adapters)) == ("dpo", 1)
    trained, before = weights(dpo / "adapter"), weights(sft / "adapter")
    assert trained.keys() == before.keys()
    assert all(trained[n].shape == before[n].shape and not torch.equal(trained[n], before[n]) for n in trained)
    line = next(s for s in said if "frozen copy" in s)
    assert "rank 3 instead of lora_r 8" in line
    info = json.loads((dpo / "stage.json").read_text())
    assert info["trl"]["continues"][0]["path"] == "sft/adapter"


def test_a_killed_run_is_resumed(run):
    """Dropout off, float32: the resumed run's losses are those of an undisturbed one. In 4 bits the checkpoint holds the
    policy and the reference, and both have to come back; the optimizer's state is that of LoRA+'s two groups."""
    keys = {"load_in_4bit": True, "loraplus_lr_ratio": 4}
    for name in ("run", "whole"):
        run("sft", run=name, **keys)

    class Killed(Exception):
        pass

    def kill(step, found):
        if step == 4:
            raise Killed

    with pytest.raises(Killed):
        run("dpo", on_log=kill, **keys)
    resumed, undisturbed = run("dpo", **keys), run("dpo", run="whole", **keys)
    a, b = metrics(resumed), metrics(undisturbed)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-5)


def test_killed_after_the_last_checkpoint_it_only_ends(run, monkeypatch):
    class Killed(Exception):
        pass

    def kill(*args, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("zephyr_lite.train.main.save_stage", kill)
        with pytest.raises(Killed):
            run("sft")
    resumed, undisturbed = run("sft"), run("sft", run="whole")
    told, expected = (json.loads((folder / "stage.json").read_text())["result"] for folder in (resumed, undisturbed))
    assert told["steps"] == expected["steps"] and told["best"] == expected["best"]
    assert [r["step"] for r in metrics(resumed)] == [r["step"] for r in metrics(undisturbed)]
    a, b = weights(resumed / "adapter"), weights(undisturbed / "adapter")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_any_architecture(run, tmp_path, chat_rows):
    """GPT-2: no rotary embeddings, Conv1D instead of Linear, positions that are learned."""
    torch.manual_seed(0)
    folder = tmp_path / "gpt2"
    config = GPT2Config(vocab_size=448, n_embd=32, n_layer=2, n_head=2, n_positions=256, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    trained = run("sft", model_name_or_path=str(folder))
    run("dpo", model_name_or_path=str(folder))
    assert metrics(trained)[-1]["loss"] < metrics(trained)[0]["loss"]
    with pytest.raises(UserError, match="engine=trl"):
        run("sft", run="fused", engine="fused", model_name_or_path=str(folder))
