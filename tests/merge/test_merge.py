"""Merging: the folder is the live stack, whatever the base looks like, and nothing is half-written."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.test_merged import distance, live, load, logits, make_base, make_chain, read
from zephyr_lite.errors import UserError
from zephyr_lite.merge import adapter_only, chain_of_run, merge
from zephyr_lite.model.loaded import find_chain
from zephyr_lite.model.peft_io import LoraWeights, write_adapter


def test_an_earlier_merge_is_replaced_only_if_asked(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    chain = read(make_chain(base, tmp_path))
    out = tmp_path / "out"
    merge(base, chain, out)
    with pytest.raises(UserError, match="earlier merge") as caught:
        merge(base, chain, out)
    assert "--overwrite" in caught.value.hint
    merge(base, chain[:1], out, overwrite=True)
    assert distance(logits(load(out)), live(load(base), [tmp_path / "first"])) < 1e-5
    with pytest.raises(UserError, match="earlier merge"):
        adapter_only(chain, out, base_model_name="x")
    assert not list(tmp_path.glob(".*"))


def adapter_for(folder: Path, module: str, out_features: int, in_features: int, value: float = 0.1) -> list[Any]:
    weights = LoraWeights(torch.full((2, in_features), value), torch.full((out_features, 2), value), 1.0)
    write_adapter(folder, {module: weights}, base_model_name="another")
    return read([folder])


@pytest.mark.parametrize(
    ("module", "shape", "said"),
    [
        ("model.layers.0.self_attn.q_proj", (64, 32), r"q_proj is \[64, 64\] in .*\[64, 32\]"),
        ("model.layers.7.self_attn.q_proj", (64, 64), r"layers\.7\.self_attn\.q_proj"),
        ("lm_head", (128, 64), "ties to its embeddings"),
    ],
)
def test_adapter_of_another_base(tmp_path: Path, module: str, shape: tuple[int, int], said: str) -> None:
    base = make_base(tmp_path / "base", tied=True)
    with pytest.raises(UserError, match=said):
        merge(base, adapter_for(tmp_path / "adapter", module, *shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_overflows_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float16)
    module = "model.layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=rf"{module}\.weight.*F16"):
        merge(base, adapter_for(tmp_path / "adapter", module, 128, 64, 1e3), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_newest_run_and_its_last_complete_stage(talk_run: Path) -> None:
    run = Path("runs") / "new"
    shutil.copytree(talk_run, run)
    shutil.copytree(talk_run / "sft", "runs/old/sft")
    os.utime("runs/old/sft/stage.json", (0, 0))
    chain = find_chain(None)
    assert (chain.run, chain.stage) == (run, "dpo")
    assert [adapter.path for adapter in chain.adapters] == [run / "sft" / "adapter", run / "dpo" / "delta"]
    stage = run / "dpo" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "status": "running"}))
    assert chain_of_run(run).stage == "sft"
