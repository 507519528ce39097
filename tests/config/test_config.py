"""The schema of a run: YAML, other tools' YAML, and the words of the command line."""

from __future__ import annotations

import pytest
import yaml

from zephyr_lite.config.load import RunConfig, dump_config, load_config, words_by_scope
from zephyr_lite.errors import UserError


def load(*words, method="sft", file=None):
    return load_config(method, file, list(words))


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "words",
    [["learning_rate=5e-6"], ["--learning_rate", "5e-6"], ["--learning-rate=5e-6"], ["--learning-rate", "0.000005"]],
)
def test_every_way_to_write_an_override(words):
    loaded = load(*words)
    assert loaded.config.learning_rate == 5e-6
    assert loaded.given == {"learning_rate"}


def test_the_stages_differ_in_their_defaults():
    sft, dpo = load().config, load(method="dpo").config
    assert (sft.stage, sft.lora_r, sft.max_length, sft.batch_size, sft.learning_rate) == ("sft", 16, 2048, 8, 2e-4)
    assert (dpo.stage, dpo.lora_r, dpo.max_length, dpo.batch_size, dpo.learning_rate) == ("dpo", 128, 1024, 16, 5e-6)
    assert dpo.dataset[0].split == "train_prefs" and dpo.lora_dropout == 0


@pytest.mark.parametrize(
    ("word", "place"),
    [
        ("batch_size=0", "batch_size"),
        ("engine=magic", "engine"),
        ("loss_type=sigmoid,kto", r"loss_type: expected .* without kto; .* \(found \['sigmoid', 'kto'\]\)\.\n`zephyr"),
        ("loss_type=simp", r"loss_type: expected a loss.* lists them \(found 'simp'\)\."),
        ("loss_type=ipo,ipo", "the command line: loss_type: expected a loss, or several different ones"),
        ("learning_rate=inf", "learning_rate"),
    ],
)
def test_a_value_that_does_not_fit_names_its_key(word, place):
    with pytest.raises(UserError, match=place):
        load(word, method="dpo" if "loss" in word else "sft")


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["loss_type=simpo"], (2.0, 5e-6, {"simpo": 1})),
        (["loss_type=simpo", "beta=10"], (10, 5e-6, {"simpo": 1})),
        (["loss_type=orpo"], (0.1, 5e-5, {"orpo": 1})),
        (["loss_type=ipo", "rpo_alpha=0.5"], (0.01, 5e-6, {"ipo": 1, "sft": 0.5})),
        (["loss_type=simpo,sft", "loss_weights=1,0.2"], (2.0, 5e-6, {"simpo": 1, "sft": 0.2})),
    ],
)
@pytest.mark.parametrize("file", [None, "zephyr-7b/dpo"])
def test_losses_and_the_values_that_go_with_them(words, settings, file):
    """The recipe's β and learning rate are sigmoid's: other losses have theirs, unless the user sets them."""
    config = load(*words, file=file, method="dpo").config
    assert (config.beta, config.learning_rate, config.losses) == settings


@pytest.mark.parametrize("key", ["loss_type=kto", "simpo_gamma=2", "pref_beta=0.1", "desirable_weight=2"])
def test_keys_of_dpo_are_refused_in_sft_where_typed_and_noted_where_in_a_file(key, tmp_path):
    name, value = key.split("=")
    ours = name.replace("pref_", "")
    with pytest.raises(UserError, match=f"the command line: {ours}: a key of dpo, which sft does not read"):
        load(key)
    loaded = load(file=write(tmp_path, f"{name}: {value}\n"))
    assert f"{ours} changes nothing here: only dpo reads it" in loaded.notes
    (tmp_path / "all.yaml").write_text(dump_config(RunConfig()))
    assert not any("changes nothing" in note for note in load(file=str(tmp_path / "all.yaml")).notes)
    assert words_by_scope([key, "seed=1", "rpo_alpha=1"]) == {"dpo": [key, "rpo_alpha=1"], "": ["seed=1"]}


def test_a_data_set_is_reached_into_whatever_the_order_of_words():
    for words in (["dataset.path=x.jsonl", "dataset.split=b"], ["dataset.split=b", "dataset.path=x.jsonl"]):
        spec = load(*words, file="zephyr-7b/overnight-sft").config.dataset[0]
        # the limit was the other data set's
        assert (spec.path, spec.split, spec.limit) == ("x.jsonl", "b", None)
    config = load("dataset.limit=5", "dataset.columns.prompt=question").config
    assert (config.dataset[0].path, config.dataset[0].limit) == ("HuggingFaceH4/ultrachat_200k", 5)
    assert config.dataset[0].columns == {"prompt": "question"}
    assert config.eval_dataset


def test_rows_of_ones_own_are_not_evaluated_on_the_recipes():
    for words in (["dataset=x.jsonl"], ["dataset.path=x.jsonl"]):
        loaded = load(*words, file="zephyr-7b/sft")
        assert loaded.config.eval_dataset == []
        assert any("held-out loss" in note for note in loaded.notes)
    assert (
        load("dataset=x.jsonl", "eval_dataset=y.jsonl", file="zephyr-7b/sft").config.eval_dataset[0].path == "y.jsonl"
    )
    assert load("dataset.limit=9", file="zephyr-7b/sft").config.eval_dataset


def test_several_data_sets(tmp_path):
    file = write(tmp_path, "dataset:\n- a.jsonl\n- {path: b.jsonl, weight: 0.5}\n")
    assert [(spec.path, spec.weight) for spec in load(file=file).config.dataset] == [("a.jsonl", 1.0), ("b.jsonl", 0.5)]
    with pytest.raises(UserError, match="2 entries"):
        load("dataset.limit=3", file=file)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_dumped_configuration_reads_back_to_the_same(method, tmp_path):
    config = load("lora_r=7", "dataset=[{path: a, columns: {prompt: q}}]", "memory.keep=input", method=method).config
    assert RunConfig.model_validate(yaml.safe_load(dump_config(config))) == config
    assert load(file=write(tmp_path, dump_config(config)), method=method).config == config


def test_transformers_switch_and_name_are_one_key(tmp_path):
    text = "push_to_hub: true\nhub_model_id: me/model\n"
    assert load(file=write(tmp_path, text)).config.push_to_hub == "me/model"
    assert load("hub_model_id=me/model").config.push_to_hub is None  # named, but not asked for
    assert load("assistant_only_loss=false").config.loss_on == "all"
    with pytest.raises(UserError, match="OWNER/NAME"):
        load("push_to_hub=true")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["my.yaml"], "Write --config 'my.yaml'."),
        (["--dryrun", "x"], "Did you mean --dry-run?"),
        (["compute=int8"], "Did you mean 'memory.compute'?"),
        (["precompute_ref_log_probs=maybe"], "expected 'auto' or true or false (found 'maybe')"),
        (["memory=8GiB"], "memory.vram=8GiB"),
        (
            ["model_name_or_path=https://huggingface.co/mistralai/Mistral-7B-v0.1"],
            "alone is read: mistralai/Mistral-7B-v0.1",
        ),
        (["dataset=https://hf.co/datasets/me/rows"], "alone is read: me/rows"),
    ],
)
def test_slips_on_the_command_line_are_told_what_was_meant(words, says):
    with pytest.raises(UserError) as told:
        load_config("dpo", None, words)
    assert says in str(told.value)


def test_a_text_that_reads_as_a_number_is_a_text_and_a_tilde_is_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config("sft", None, ["output_dir=2024", "revision=0012345", "dataset=~/rows.jsonl"]).config
    assert (config.output_dir, config.model_revision) == ("2024", "0012345")
    assert config.dataset[0].path == f"{tmp_path}/rows.jsonl"
    (tmp_path / "run.yaml").write_text("output_dir: ~/runs/mine\n")
    assert load_config("sft", str(tmp_path / "run.yaml")).config.output_dir == f"{tmp_path}/runs/mine"


def test_lists_with_commas_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["target_modules=q_proj,v_proj", "report_to=tensorboard, wandb", "dataset=a.jsonl,b.jsonl"]
    config = load(*words, "adapters=one,two", method="dpo").config
    assert (config.lora_target_modules, config.report_to) == (["q_proj", "v_proj"], ["tensorboard", "wandb"])
    assert config.adapters == ["one", "two"]
    assert load("dataset.columns=messages,tools").config.dataset[0].columns == ["messages", "tools"]
    assert [spec.path for spec in load(words[2]).config.dataset] == ["a.jsonl", "b.jsonl"]
    (tmp_path / "a.jsonl,b.jsonl").touch()
    assert [spec.path for spec in load(words[2]).config.dataset] == ["a.jsonl,b.jsonl"]


def test_an_unknown_key_of_a_file_names_the_file(tmp_path):
    file = write(tmp_path, "lora_rr: 8\n")
    with pytest.raises(UserError, match=r"run\.yaml.*lora_r'"):
        load(file=file)
    with pytest.raises(UserError, match=r"dataset\.0\.pathh|pathh"):
        load(file=write(tmp_path, "dataset: {path: a, pathh: b}\n"))
