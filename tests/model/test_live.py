"""What is opened to be evaluated or talked to: a run, a stage, a model's folder, adapters; and what is refused."""

import shutil

import pytest
import torch

from tests.train.test_train import dpo_words, words
from zephyr_lite.config.load import load_config
from zephyr_lite.errors import UserError
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.loaded import open_live
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

PLAIN = {"load_in_4bit": "false", "max_steps": 2}


@pytest.fixture(scope="module")
def run(tiny_base, chat_rows, pair_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("live") / "a"
    run_sft(load_config("sft", None, words(tiny_base, out, chat_rows, **PLAIN)))
    run_dpo(load_config("dpo", None, dpo_words(tiny_base, out, pair_rows, **PLAIN)))
    return out


def test_one_base_and_the_models_along_the_chain(run, tmp_path):
    live = open_live(run)
    assert live.models == {"base": [], "sft": ["sft"], "dpo": ["sft", "dpo"]}
    assert (live.policy, live.reference, live.source) == ("dpo", "sft", str(run / "dpo"))
    assert open_live(run, stage="sft").models == open_live(run / "sft").models == {"base": [], "sft": ["sft"]}
    chain = chain_of_run(run)
    merge(live.base.path, chain.adapters, tmp_path / "m", tokenizer_from=chain.tokenizer_from)
    merged = open_live(tmp_path / "m")
    assert merged.models == {"model": []} and merged.policy == merged.reference == "model"
    named = open_live(adapters=[str(run / "dpo/adapter")], base=str(live.base.path))
    assert list(named.models) == ["base", "dpo"] and named.chain.run is None
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad(), live.stack.only(live.models["dpo"]):
        wanted = live.stack.model(input_ids=ids).logits
        found = merged.stack.model(input_ids=ids).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_what_cannot_be_opened_is_refused_with_what_to_do(run, tiny_base, tmp_path):
    chain = chain_of_run(run)
    for given, words_of_it in (
        ({"source": tmp_path / "none"}, "no such folder"),
        ({"source": run / "sft", "stage": "dpo"}, "is the stage sft, and --stage says dpo"),
        ({"source": tiny_base, "stage": "dpo"}, "without stages"),
        ({"source": tiny_base}, "no chat template"),
        ({"source": run, "adapters": ["x"]}, "--adapter names the chain itself"),
        ({"source": run, "base": "x"}, "model x: there is no such folder"),
        ({"source": tiny_base, "base": "x"}, "without stages or a base"),
        ({"source": run, "stage": "dpo2"}, "no complete stage dpo2"),
    ):
        with pytest.raises(UserError, match=words_of_it) as refused:
            open_live(**given)
        assert refused.value.hint
    assert open_live(tiny_base, chat_template="zephyr").template.name == "zephyr"
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/dpo/delta")
    with pytest.raises(UserError, match=r"delta: no adapter_config\.json there"):
        open_live(tmp_path / "r")
    assert len(chain.adapters) == 2
