"""memory.compute=int8 in a run: both stages, a killed one, what a resumed one compares, and the reference on the disk."""

import pytest
import torch

from tests.train.test_train import LN2, dpo_words, killed_at, metrics, words
from zephyr_lite.config.load import MemorySpec, load_config
from zephyr_lite.errors import UserError
from zephyr_lite.io.run_dir import StageDir
from zephyr_lite.memory.gpus import find_gpu
from zephyr_lite.memory.machine import of_card
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train import setup
from zephyr_lite.train.dpo import DpoObjective, run_dpo
from zephyr_lite.train.setup import setup_stage
from zephyr_lite.train.sft import run_sft

INT8 = {"memory.compute": "int8"}


def test_both_stages_in_int8(tiny_base, chat_rows, pair_rows, tmp_path, monkeypatch):
    """A killed and resumed run ends bit for bit as an undisturbed one: the outlier channels are the same at every start."""
    settings = {"max_steps": 2, "save_steps": 1}

    def sft(run, **changes):
        return load_config("sft", None, words(tiny_base, tmp_path / run, chat_rows, **settings, **changes))

    def dpo(**changes):
        changes = {**settings, "precompute_ref_log_probs": False, **changes}
        return load_config("dpo", None, dpo_words(tiny_base, tmp_path / "run", pair_rows, **changes))

    with killed_at(1):
        run_sft(sft("run", **INT8))
    with pytest.raises(UserError, match="memory: compute=int8 then, auto now"):
        run_sft(sft("run"))
    with monkeypatch.context() as patch:
        patch.setattr(setup, "this_machine", lambda *_, **__: of_card(find_gpu("t4"), torch.float16, MemorySpec()))
        with pytest.raises(UserError, match=r"T4 has compute capability 7\.5; int8 needs 8\.0"):
            setup_stage("sft", sft("run", **INT8))
    run_sft(sft("run", **INT8))
    run_sft(sft("other", **INT8))
    adapters = [read_adapter(tmp_path / run / "sft" / "adapter").sha256 for run in ("run", "other")]
    assert adapters[0] == adapters[1] and StageDir(tmp_path / "run" / "sft").info()["plan"]["int8"] is True
    cached = [
        DpoObjective(setup_stage("dpo", dpo(precompute_ref_log_probs=True, **changes))).cache.path.name
        for changes in (INT8, {})
    ]
    assert cached[0] != cached[1]
    run_dpo(dpo(**INT8))
    assert metrics(tmp_path / "run" / "dpo")[0] == pytest.approx(LN2, abs=1e-6)
