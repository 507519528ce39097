"""SFT and DPO of SmolLM2-135M with `memory.compute=16bit` (in float32, which is stricter) and `int8`: curves, held-out losses,
preference accuracy, and one step's gradient.

    python -m bench.int8 DATA --runs DIR [--out int8.json]

DATA: a folder with ultrachat_200k and ultrafeedback_binarized in the hub's layout. A stage that is complete in DIR is not trained
again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.command import header, run, save
from bench.mistral import tiny_base
from zephyr_lite.config.load import Method, load_config

COMPUTES = ("16bit", "int8")
STAGES: tuple[Method, ...] = ("sft", "dpo")


def settings(method: Method, compute: str, args: argparse.Namespace, base: Path) -> list[str]:
    """A stage's words: about 512 tokens a step."""
    data = {"sft": ("ultrachat_200k", "sft"), "dpo": ("ultrafeedback_binarized", "prefs")}[method]
    common = {
        "model_name_or_path": base,
        "output_dir": args.runs / compute,
        "memory.compute": compute,
        "samples": 0,
        "dataset.path": args.data / data[0],
        "dataset.split": f"train_{data[1]}",
        "eval_dataset.path": args.data / data[0],
        "eval_dataset.split": f"test_{data[1]}",
        "eval_steps": 100,
    }
    own: dict[str, Any] = {"max_length": 512, "batch_size": 1, "learning_rate": 5e-4, "eval_dataset.limit": 24}
    if method == "dpo":
        own = {"max_length": 160, "max_prompt_length": 64, "batch_size": 2, "learning_rate": 5e-5, "beta": 0.1}
        own |= {"lora_r": 32, "lora_alpha": 32, "precompute_ref_log_probs": "false"}
    steps = dict(zip(STAGES, args.steps))[method]
    return [f"{key}={value}" for key, value in (common | own | {"max_steps": steps, "save_steps": steps}).items()]


def curves(stage: Path) -> dict[str, Any]:
    """Every logged number of a stage that the comparison needs, in the order of steps."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text("utf-8").splitlines()]
    names = (
        "loss",
        "eval_loss",
        "rewards/accuracies",
        "eval_rewards/accuracies",
        "rewards/margins",
        "eval_rewards/margins",
    )
    found = {name: [line[name] for line in lines if name in line] for name in names}
    result = json.loads((stage / "stage.json").read_text("utf-8"))["result"]
    return {name: values for name, values in found.items() if values} | {"general_loss": result.get("general_loss")}


def gradients(args: argparse.Namespace, base: Path) -> dict[str, float]:
    """Of the trained SFT adapter on held-out rows, int8 against 16bit: the gradient's cosine and relative error, and the
    difference of the losses."""
    from zephyr_lite.data.batch import collate_conversations
    from zephyr_lite.model.decoder import Decoder
    from zephyr_lite.model.peft_io import read_adapter
    from zephyr_lite.train.setup import setup_stage

    stage = setup_stage(
        "sft", load_config("sft", None, [*settings("sft", "int8", args, base), "stage=probe"]), claim=False
    )
    stage.stack.load("probe", read_adapter(args.runs / "16bit" / "sft" / "adapter").modules)
    assert stage.eval_data is not None
    batch = collate_conversations(list(stage.eval_data.examples[:4]))
    found = []
    for decoder in (Decoder(stage.stack, stage.base.dtype), stage.decoder):
        stage.stack.model.zero_grad()
        loss = -decoder.token_logps(batch).mean()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in stage.stack.parameters().values()])))
    (loss, exact), (other, ours) = found
    return {
        "loss_16bit": loss,
        "loss_int8": other,
        "cosine": torch.nn.functional.cosine_similarity(exact, ours, 0).item(),
        "relative_error": ((ours - exact).norm() / exact.norm()).item(),
    }


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, required=True, help="the runs' folder")
    parser.add_argument("--steps", type=int, nargs=2, default=[300, 100], help="of SFT and of DPO")
    parser.add_argument("--tiny", type=Path, help="an empty folder for a tiny random model: does the bench run?")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(words)
    from zephyr_lite.demo.base import demo_base
    from zephyr_lite.train.dpo import run_dpo
    from zephyr_lite.train.sft import run_sft

    base = tiny_base(args.tiny) if args.tiny else demo_base()
    result = {**header(), "steps": dict(zip(STAGES, args.steps))}
    for compute in COMPUTES:
        for method, train in zip(STAGES, (run_sft, run_dpo)):
            if not (args.runs / compute / method / "adapter").is_dir():
                train(load_config(method, None, settings(method, compute, args, base)))
            result[f"{method} {compute}"] = curves(args.runs / compute / method)
    for method in STAGES:
        last = [result[f"{method} {compute}"]["eval_loss"][-1] for compute in COMPUTES]
        result[f"{method} held-out loss, int8 over 16bit"] = last[1] / last[0] - 1
    result["gradient"] = gradients(args, base)
    print(json.dumps({key: value for key, value in result.items() if not isinstance(value, dict)}, indent=1))
    save(args.out, result)
    return result


if __name__ == "__main__":
    run(main)
