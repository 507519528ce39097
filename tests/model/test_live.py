"""What is opened to be evaluated or talked to: a run, a stage, a model's folder, adapters; and what is refused."""

import shutil

import pytest
import torch

from zephyr_lite.errors import UserError
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.loaded import open_live


def test_one_base_and_the_models_along_the_chain(talk_run, tmp_path):
    live = open_live(talk_run)
    assert live.models == {"base": [], "sft": ["sft"], "dpo": ["sft", "dpo"]}
    assert (live.policy, live.reference, live.source) == ("dpo", "sft", str(talk_run / "dpo"))
    assert open_live(talk_run, stage="sft").models == open_live(talk_run / "sft").models == {"base": [], "sft": ["sft"]}
    chain = chain_of_run(talk_run)
    merge(live.base.path, chain.adapters, tmp_path / "m", tokenizer_from=chain.tokenizer_from)
    merged = open_live(tmp_path / "m")
    assert merged.models == {"model": []} and merged.policy == merged.reference == "model"
    named = open_live(adapters=[str(talk_run / "dpo/adapter")], base=str(live.base.path))
    assert list(named.models) == ["base", "dpo"] and named.chain.run is None
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    with torch.no_grad(), live.stack.only(live.models["dpo"]):
        wanted = live.stack.model(input_ids=ids).logits
        found = merged.stack.model(input_ids=ids).logits
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_what_cannot_be_opened_is_refused_with_what_to_do(talk_run, tiny_base, tmp_path):
    chain = chain_of_run(talk_run)
    for given, words_of_it in (
        ({"source": tmp_path / "none"}, "no such folder"),
        ({"source": talk_run / "sft", "stage": "dpo"}, "is the stage sft, and --stage says dpo"),
        ({"source": tiny_base, "stage": "dpo"}, "without stages"),
        ({"source": tiny_base}, "no chat template"),
        ({"source": talk_run, "adapters": ["x"]}, "--adapter names the chain itself"),
        ({"source": talk_run, "base": "x"}, "model x: there is no such folder"),
        ({"source": tiny_base, "base": "x"}, "without stages or a base"),
        ({"source": talk_run, "stage": "dpo2"}, "no complete stage dpo2"),
    ):
        with pytest.raises(UserError, match=words_of_it) as refused:
            open_live(**given)
        assert refused.value.hint
    assert open_live(tiny_base, chat_template="zephyr").template.name == "zephyr"
    shutil.copytree(talk_run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r/dpo/delta")
    with pytest.raises(UserError, match=r"delta: no adapter_config\.json there"):
        open_live(tmp_path / "r")
    assert len(chain.adapters) == 2
