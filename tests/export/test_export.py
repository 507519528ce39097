"""A trained run taken elsewhere: its card, the hub, what vLLM asks for, and PEFT."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.fake_hub import FakeHub
from tests.messages import messages_to
from zephyr_lite.cli.app import run
from zephyr_lite.config.strict_yaml import read_yaml
from zephyr_lite.errors import UserError
from zephyr_lite.export import model_card as card
from zephyr_lite.export import push as pushing
from zephyr_lite.export.model_card import write_card
from zephyr_lite.export.push import prepare, push
from zephyr_lite.io import sync
from zephyr_lite.model.loaded import open_live

SMALL = [
    *("max_length=128", "samples=0", "batch_size=3", "lora_r=4", "lora_alpha=8", "learning_rate=5e-3"),
    *("save_steps=2", "eval_steps=2", "num_train_epochs=2", "optim=adamw_torch", "load_in_4bit=false"),
]
IDS = torch.arange(24).view(2, 12) % 300 + 10


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base, chat_rows, pair_rows) -> Path:
    """A run of two stages (of different ranks), its evaluation, the model merged from it and the chain as one adapter."""
    place = tmp_path_factory.mktemp("exported")
    shutil.copytree(tiny_base, place / "base")
    (place / "base" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A base\n")
    out, base = place / "run", place / "base"
    some = place / "chat rows.jsonl"
    odd = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a </s> in it"}]}
    some.write_text(chat_rows.read_text() + json.dumps(odd) + "\n")
    rows = [f"dataset.path={some}", f"eval_dataset={chat_rows}"]
    assert run(["sft", f"model_name_or_path={base}", f"output_dir={out}", *rows, *SMALL]) == 0
    pairs = [f"dataset={pair_rows}", f"eval_dataset={pair_rows}", "max_prompt_length=64"]
    assert run(["dpo", f"output_dir={out}", *pairs, *SMALL, "lora_r=6"]) == 0
    assert run(["eval", "loss", str(out), "--data", str(chat_rows)]) == 0
    assert run(["merge", "--run", str(out), "--out", str(place / "my-model")]) == 0
    assert run(["merge", "--run", str(out), "--out", str(place / "my-adapter"), "--adapter-only"]) == 0
    return place


def front(text: str) -> dict:
    path_text = text.split("---\n")[1]
    return {line.split(": ", 1)[0]: json.loads(line.split(": ", 1)[1]) for line in path_text.splitlines()}


def test_the_card_says_what_was_done(place, tmp_path):
    model = place / "my-model"
    info = {name: json.loads((place / "run" / name / "stage.json").read_text()) for name in ("sft", "dpo")}
    text = write_card(model).read_text()
    (tmp_path / "front.yaml").write_text(text.split("---\n")[1])
    assert front(text) == read_yaml(tmp_path / "front.yaml")  # JSON's values are YAML's
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["zephyr-lite", "lora", "sft", "dpo", "conversational"],
    }  # neither the base nor the rows are the hub's, and folders of this machine are nobody's business
    assert str(place) not in text and "base (a local folder)" in text and "chat rows.jsonl (local)" in text
    for told in info.values():
        assert f"`{told['own']['sha256']}`" in text and f"`{told['data']['fingerprint']}`" in text
    assert f"`{info['sft']['base']['fingerprint']}`" in text
    assert "| `lora_r` | 4 | 6 |" in text and "| `beta` | - | 0.01 |" in text
    last = info["dpo"]["result"]["evaluations"][-1]
    assert f"| rewards/accuracies | {last['eval_rewards/accuracies']:.4g} |" in text
    loss = json.loads((place / "run" / "dpo" / "eval" / "loss-chat.json").read_text())["models"]
    assert list(loss) == ["base", "sft", "dpo"] and "|  | base | sft | dpo |" in text
    assert f"{loss['dpo']['loss']['value']:.4g} [{loss['dpo']['loss']['low']:.4g}, " in text
    measured = json.loads((model / "zephyr_lite.json").read_text())["measured"]
    assert f"| same likeliest token | - | {measured['base']['top1_agreement']['value']:.4g}" in text
    assert (
        "8 of 9 rows kept" in text
        and "left out: 1 (a turn's text contains the control token" in text
        and "vllm serve my-model" in text
        and "ollama create my-model" in text
    )
    for name in ("sft", "dpo"):
        assert f"(plots/{name}.png)" in text
        assert matplotlib.image.imread(model / "plots" / f"{name}.png").std() > 0.02  # something is drawn
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace('"my-model"', repr(str(model)), 1)
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=2"), "card", "exec"), {})


def test_a_card_claims_nothing_that_was_not_found(place, tmp_path, monkeypatch):
    model, moved = tmp_path / "m", tmp_path / "elsewhere"
    shutil.copytree(place / "my-model", model, ignore=shutil.ignore_patterns("README.md", "plots"))
    shutil.copytree(place / "run", moved)
    mark = json.loads((model / "zephyr_lite.json").read_text())
    # trained in 16 bits: there is one way to merge
    assert mark["onto"] == "base" and {"live", "base"} <= mark["measured"].keys() and "nf4" not in mark["measured"]
    for link in mark["adapters"]:
        link["path"] = link["path"].replace(str(place / "run"), str(tmp_path / "gone"))
    (model / "zephyr_lite.json").write_text(json.dumps(mark))
    monkeypatch.setattr(card, "have_matplotlib", lambda: False)
    text = write_card(model).read_text()
    assert "## Training" not in text and "its run is not here" in text and mark["adapters"][0]["sha256"] in text
    assert "Only the merge was measured on held-out rows" in text and "![" not in text
    # --run says where it went; neither an evaluation of other adapters nor a trial is this model's result
    folder = moved / "dpo" / "eval"
    told = json.loads((folder / "loss-chat.json").read_text())
    judged = {
        **told,
        "models": {"sft": {"score": 5.25}, "dpo": {"score": 6.5}},
        "differences": {"dpo - sft": {"difference": 1.25, "standard_error": 0.3}},
        "settings": {"judge": {"name": "judge", "model": "some-judge"}},
        "notes": ["asked in this project's own words: not comparable with published scores"],
    }
    (folder / "mt-bench.json").write_text(json.dumps(judged))
    (folder / "mt-bench-limit-8.json").write_text(json.dumps({**judged, "models": {"dpo": {"score": 9.75}}}))
    (folder / "loss-chat.json").write_text(json.dumps({**told, "adapters": told["adapters"][:1]}))
    said: list[str] = []
    with messages_to(said.append):
        text = write_card(model, run=moved, license="mit").read_text()
    assert "## Training" in text and front(text)["license"] == "mit"
    assert "### loss-chat" not in text and "9.75" not in text
    assert sum("left out of the card" in line for line in said) == 2
    assert "- dpo - sft: difference 1.25; standard_error 0.3" in text and "Judge: some-judge." in text
    assert "Note: asked in this project's own words: not comparable with published scores" in text


def test_the_chain_as_one_adapter_is_the_model_and_its_card_serves_it_with_vllm(place):
    live = open_live(place / "run")
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, place / "my-adapter")
    with torch.no_grad():
        wanted, found = live.stack.model(IDS).logits, adapter(IDS).logits
    assert float((wanted - found).norm() / wanted.norm()) < 1e-5
    text = write_card(place / "my-adapter").read_text()
    assert "--enable-lora" in text and "--max-lora-rank 16 " in text  # 4 + 6, and the next that vLLM takes
    assert front(text)["library_name"] == "peft" and str(place) not in text


def test_push_lists_first_and_uploads_a_model_and_nothing_else(place, tmp_path, monkeypatch, capsys):
    hub, model = FakeHub(), tmp_path / "m"
    monkeypatch.setattr(pushing, "HfApi", hub)
    monkeypatch.setattr(sync, "get_token", lambda: "t")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    shutil.copytree(place / "my-model", model)
    write_card(model)
    strays = ["checkpoint-2/model.safetensors", "notes.txt", ".env", "optimizer.pt", "plots/x.svg"]
    for name in strays:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    (model / "LICENSE").symlink_to("/etc/passwd")
    assert run(["export", "push", str(model), "me/model"]) == 0
    shown = capsys.readouterr().out
    assert hub.calls == [] and "Nothing was uploaded" in shown and "model.safetensors" in shown
    assert run(["export", "push", str(model), "me/model", "--private", "--yes"]) == 0
    assert hub.private == {"me/model"} and hub.calls == ["create_repo", "repo_info", "upload_folder"]
    tree = hub.tree("me/model")
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "plots/sft.png",
        "zephyr_lite.json",
    } <= set(tree)
    assert not {*strays, "LICENSE"} & set(tree) and tree["config.json"] == (model / "config.json").read_bytes()

    # a public repository is not taken for a private one; errors leave it as it was
    hub.private.clear()
    with pytest.raises(UserError, match="is there already, and public"):
        push(prepare(model, "me/model"), private=True)
    hub.breaks = [(1, OSError("the network is away"))]
    with pytest.raises(UserError, match="the network is away"):
        push(prepare(model, "me/model"))
    assert len(hub.repos["me/model"]) == 2
    monkeypatch.setattr(sync, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token"):
        push(prepare(model, "me/model"))


def test_what_is_not_pushed(place, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a repository's name"):
        push(prepare(place / "my-model", "model"))
    with pytest.raises(UserError, match="neither a model nor an adapter"):
        prepare(place / "run", "me/model")
    notes = prepare(place / "my-adapter", "me/adapter").notes
    assert {note.split()[0] for note in notes} >= {"zephyr_lite.json", "adapter_config.json"}
    assert run(["merge", "--run", str(place / "run"), "--out", str(tmp_path / "x"), "--private"]) == 2
    assert not (tmp_path / "x").exists()
    model = tmp_path / "m"
    shutil.copytree(place / "my-model", model, ignore=shutil.ignore_patterns("README.md"))
    assert any("export card" in note for note in prepare(model, "me/model").notes)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    (model / "README.md").write_text("use it with hf_abcdefghijklmnop1234\n")
    with pytest.raises(UserError, match="environment variable HF_TOKEN"):
        prepare(model, "me/model")
