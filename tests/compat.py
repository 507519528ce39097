"""``make test-compat``: what the installed transformers trained and merged is loaded by transformers 4, and gives the same.

python -m tests.compat make FOLDER     with the project's environment
python -m tests.compat load FOLDER     with an environment that has transformers 4
"""

import json
import sys
from pathlib import Path

import torch

IDS = torch.arange(24).view(2, 12) + 5
TEXT = "<|user|>\nHow can I help?</s>\n<|assistant|>\nWalk, read, sleep.</s>"
PARTS = ("plain", "padded", "scaled", "sentencepiece")


def make(root: Path) -> None:
    """For each kind of base: a base, an SFT run's adapter/ on it, and the merged folder; what they give, in expected.pt."""
    from tests.conftest import CONVERSATIONS, make_model, make_tokenizer
    from tests.contract.test_gguf import spm_tokenizer
    from zephyr_lite.config.load import load_config
    from zephyr_lite.merge.command import run_merge
    from zephyr_lite.model.loaded import open_live
    from zephyr_lite.train.sft import run_sft

    rows = root / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in CONVERSATIONS
        )
    )
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    for part in PARTS:
        base, run = root / part / "base", root / part / "run"
        make_model("llama", **({"rope_parameters": rope} if part == "scaled" else {})).save_pretrained(base)
        tokenizer = make_tokenizer(base)
        if part == "padded":
            tokenizer.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<|im_end|>"]})
            tokenizer.save_pretrained(base)
        if part == "sentencepiece":  # as Mistral's is published
            spm_tokenizer(base, legacy=True)
            path = base / "tokenizer_config.json"
            told = {**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
            path.write_text(json.dumps(told))
        words = {
            "model_name_or_path": base,
            "output_dir": run,
            "dataset.path": rows,
            "max_length": 128,
            "lora_r": 4,
            "max_steps": 3,
            "learning_rate": 1e-2,
            "load_in_4bit": "false",
            "samples": 0,
        }
        run_sft(load_config("sft", None, [f"{key}={value}" for key, value in words.items()]))
        run_merge(root / part / "merged", run=run, check=False)
        live = open_live(run)
        with torch.no_grad():
            logits = live.stack.model(input_ids=IDS).logits
        talk = [{"role": "user", "content": "Who are you?"}]
        torch.save(
            {
                "logits": logits,
                "ids": live.template.tokenizer(TEXT)["input_ids"],
                "talk": live.template.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True),
            },
            root / part / "expected.pt",
        )


def load(root: Path) -> None:
    """Compare what transformers 4 makes of the folders."""
    import peft
    import transformers

    assert transformers.__version__.startswith("4."), transformers.__version__
    for part in PARTS:
        wanted = torch.load(root / part / "expected.pt")
        merged, adapter = root / part / "merged", root / part / "run/sft/adapter"
        for folder in (merged, adapter):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            assert tokenizer(TEXT)["input_ids"] == wanted["ids"], folder
            talk = [{"role": "user", "content": "Who are you?"}]
            assert tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == wanted["talk"]
        model = transformers.AutoModelForCausalLM.from_pretrained(merged, torch_dtype="auto")
        # of the base only the weights: its config.json is its own, and may be transformers 5's
        bare = transformers.AutoModelForCausalLM.from_pretrained(root / part / "base", config=model.config)
        for name, found in (("merged", model), ("adapter", peft.PeftModel.from_pretrained(bare, adapter))):
            with torch.no_grad():
                off = (found(input_ids=IDS).logits - wanted["logits"]).norm() / wanted["logits"].norm()
            assert off < 1e-5, (part, name, off)
            print(f"transformers {transformers.__version__}, peft {peft.__version__}: {part}/{name}: off by {off:.1e}")


if __name__ == "__main__":
    {"make": make, "load": load}[sys.argv[1]](Path(sys.argv[2]))
