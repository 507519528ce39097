"""Merging: the folder is the live stack, whatever the base looks like, and nothing is half-written."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.test_merged import (
    distance,
    live,
    load,
    logits,
    make_adapter,
    make_base,
    make_chain,
    read,
    save_tokenizer,
)
from zephyr_lite.errors import UserError
from zephyr_lite.merge import adapter_only, chain_of_run, merge, weights
from zephyr_lite.model.loaded import find_chain
from zephyr_lite.model.peft_io import LoraWeights, compose, read_adapter, write_adapter


def test_output_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    chain = read(make_chain(base, tmp_path))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        merge(base, chain, foreign, overwrite=True)
    assert (foreign / "thesis.tex").read_text() == "years of work"
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


def test_killed_in_the_middle_there_is_no_folder(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", sharded=True)
    chain = make_chain(base, tmp_path)
    if not (child := os.fork()):
        plain, written = weights._write_rows, []

        def write(*arguments):
            written.append(arguments)
            if len(written) > 3:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(*arguments)

        weights._write_rows = write
        merge(base, read(chain), tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out.*/*.safetensors")), "it was not killed in the middle"
    merge(base, read(chain), tmp_path / "out")
    assert distance(logits(load(tmp_path / "out")), live(load(base), chain)) < 1e-5


# ---- chains -------------------------------------------------------------------------------------------------------


def make_run(run: Path, base: Path) -> list[Path]:
    """A run of two stages as the training rooms leave it: sft/adapter, dpo/delta, dpo/adapter (composed)."""
    sft = make_adapter(base, run / "sft" / "adapter", 1)
    delta = make_adapter(base, run / "dpo" / "delta", 2, r=8)
    write_adapter(run / "dpo" / "adapter", compose(read([sft, delta])), base_model_name=str(base))
    about = {"name_or_path": str(base), "load_in_4bit": False, "dtype": "float32"}
    for stage, own, below in (("sft", "adapter", []), ("dpo", "delta", [("sft/adapter", sft)])):
        save_tokenizer(run / stage / "adapter", template=True)
        info = {
            "method": stage,
            "stage": stage,
            "status": "complete",
            "base": about,
            "adapters": [{"path": path, "sha256": read_adapter(folder).sha256} for path, folder in below],
            "own": {"path": own, "sha256": read_adapter(run / stage / own).sha256},
        }
        (run / stage / "stage.json").write_text(json.dumps(info))
    return [sft, delta]


def test_newest_run_and_its_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "base")
    make_run(tmp_path / "runs" / "old", base)
    for stage in Path("runs/old").glob("*/stage.json"):
        os.utime(stage, (0, 0))
    folders = make_run(tmp_path / "runs" / "new", base)
    chain = find_chain(None)
    assert (chain.run, chain.stage) == (Path("runs") / "new", "dpo")
    assert [tmp_path / a.path for a in chain.adapters] == folders
    merge(
        chain.base["name_or_path"],
        chain.adapters,
        tmp_path / "out",
        tokenizer_from=chain.tokenizer_from,
        lineage=chain.lineage(),
    )
    want = live(load(base), folders)
    assert distance(logits(load(tmp_path / "out")), want) < 1e-5
    assert distance(live(load(base), [tmp_path / "runs" / "new" / "dpo" / "adapter"]), want) < 1e-5
    told = json.loads((tmp_path / "out" / "zephyr_lite.json").read_text())
    assert [a["sha256"] for a in told["adapters"]] == [a.sha256 for a in chain.adapters]
    assert [a.path for a in chain_of_run(tmp_path / "runs" / "old", stage="sft").adapters] == [
        tmp_path / "runs" / "old" / "sft" / "adapter"
    ]

    stage = tmp_path / "runs" / "new" / "dpo" / "stage.json"
    stage.write_text(json.dumps({**json.loads(stage.read_text()), "status": "running"}))
    assert chain_of_run(tmp_path / "runs" / "new").stage == "sft"
