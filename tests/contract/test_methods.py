"""Claims 6 and 7 with rsLoRA, LoRA+, NEFTune, other betas and no clipping: the same bits after a kill, merged = live."""

import json
import math

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.contract.steps import PLAIN
from tests.contract.test_merged import live_logps
from tests.numeric import apart
from tests.train.test_train import dpo_words, killed_at, metrics, words
from zephyr_lite.audit.run import audit
from zephyr_lite.config.load import load_config
from zephyr_lite.config.strict_yaml import read_yaml
from zephyr_lite.merge import chain_of_run, merge
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

METHODS = {
    **{"use_rslora": True, "loraplus_lr_ratio": 4, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    **{"max_grad_norm": 0, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs.min_lr_rate": 0.1},
}


def test_both_stages_resume_and_merge_with_every_method(windowed, chat_rows, pair_rows, tmp_path):
    """8-bit states (rank 64 makes them large enough) of two parameter groups; both adapters have the scale 24 / √64."""
    keys = {**PLAIN, **METHODS, "lora_r": 64, "lora_alpha": 24, "optim": "adamw_8bit", "batch_size": 1}
    sft = {**keys, "neftune_noise_alpha": 5, "lora_dropout": 0.1}
    run_sft(load_config("sft", None, words(windowed, tmp_path / "whole", chat_rows, **sft)))
    run = tmp_path / "run"
    with killed_at(3):
        run_sft(load_config("sft", None, words(windowed, run, chat_rows, **sft)))
    run_sft(load_config("sft", None, words(windowed, run, chat_rows, **sft)))
    assert read_adapter(run / "sft/adapter").sha256 == read_adapter(tmp_path / "whole/sft/adapter").sha256
    assert metrics(run / "sft") == metrics(tmp_path / "whole" / "sft")
    assert read_yaml(run / "sft/config.yaml")["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    newest = max((run / "sft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    a, b = json.loads((newest / "state.json").read_text())["optimizer"]["param_groups"]
    assert b["lr"] == 4 * a["lr"] and a["betas"] == b["betas"] == [0.8, 0.95] and a["eps"] == b["eps"] == 1e-6
    assert metrics(run / "sft", "learning_rate")[1] == 5e-3  # A's, after one step of warm-up

    run_dpo(load_config("dpo", None, dpo_words(windowed, run, pair_rows, **keys, max_steps=3)))
    assert abs(metrics(run / "dpo")[0] - math.log(2)) < 1e-6
    chain = chain_of_run(run)
    for adapter in chain.adapters:
        assert (adapter.config["use_rslora"], adapter.config["lora_alpha"], adapter.config["r"]) == (True, 24, 64)
        assert {weights.scale for weights in adapter.modules.values()} == {3}
        found = audit(str(adapter.path), files_only=True)
        assert found.verdict() == "no fault found in the files" and "rank 64, scale 3" in str(found.findings)
    composed = read_adapter(run / "dpo" / "adapter")
    assert (composed.config["use_rslora"], composed.config["lora_alpha"], composed.config["r"]) == (False, 128, 128)
    example, live = live_logps(windowed, chain)
    merge(windowed, chain.adapters, tmp_path / "merged", tokenizer_from=chain.tokenizer_from)
    base = [AutoModelForCausalLM.from_pretrained(windowed) for _ in range(2)]
    stacked = PeftModel.from_pretrained(base[0], run / "sft" / "adapter", adapter_name="sft")
    stacked.load_adapter(run / "dpo" / "delta", adapter_name="dpo")
    stacked.base_model.set_adapter(["sft", "dpo"])
    folders = {
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "composed": PeftModel.from_pretrained(base[1], run / "dpo" / "adapter"),
        "PEFT's own stack": stacked,
    }
    ids = torch.from_numpy(example.ids[None].astype("int64"))
    for name, model in folders.items():
        with torch.no_grad():
            logps = model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert apart(logps, live) < 1e-5, name
