"""One or two examples of every command, at the end of its help."""

from __future__ import annotations

from typing import Any

import typer

# command → examples, without the program's name
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": ("sft --config zephyr-7b/overnight-sft", "dpo --config zephyr-7b/overnight-dpo", "merge --out model/"),
    "sft": ("sft --config zephyr-7b/overnight-sft", "sft dataset=my/chats.jsonl output_dir=runs/mine --smoke"),
    "dpo": ("dpo --config zephyr-7b/overnight-dpo", "dpo dataset=my/pairs.jsonl output_dir=runs/mine beta=0.1"),
    "plan": ("plan", "plan dpo --gpu 3060 --price 0.2 optim=adamw_8bit"),
    "suggest": ("suggest sft dataset=my/chats.jsonl", "suggest sft dataset=my/chats.jsonl --probe -o my.yaml"),
    "keys": ("keys", "keys learning_rate", "keys per_device_train_batch_size"),
    "merge": ("merge --out model/", "merge --run runs/mine --stage sft --out model-sft/"),
    "demo": ("demo", "demo --out my-demo"),
    "env": ("env",),
    "ablate": ("ablate recipe --dry-run", "ablate recipe --only dSFT-1 --only dSFT-2 max_steps=200"),
    "feedback": (
        "feedback --config on-policy --model runs/mine/sft --dry-run",
        "feedback --config local --prompts my/questions.txt --out data/rated",
    ),
    "distill": (
        "distill --config distill --dry-run",
        "distill --teacher http://localhost:8000/v1#teacher --count 1000 --out data/grown",
    ),
    "chat": ("chat", "chat runs/mine --compare", "chat runs/mine --vote votes.jsonl"),
    "serve": ("serve", "serve model/ --port 8080"),
    "ui": ("ui",),
    "report": ("report", "report runs/mine runs/other --out compared.html"),
    "reproduce": ("reproduce overnight", "reproduce overnight sft.optim=adamw_8bit dpo.beta=0.1"),
    "check": ("check runs/mine/dpo", "check their-dpo --below their-sft --pairs my/pairs.jsonl"),
    "data chat": ("data chat stingning/ultrachat --out data/ultrachat",),
    "data pairs": ("data pairs openbmb/UltraFeedback --out data/pairs --rejected worst",),
    "data show": ("data show sft dataset=my/chats.jsonl", "data show dpo --row 3 --table"),
    "data stats": ("data stats sft dataset=my/chats.jsonl max_length=1024",),
    "eval loss": ("eval loss runs/mine --limit 200",),
    "eval preference": ("eval preference runs/mine --data my/pairs.jsonl",),
    "eval mt-bench": ("eval mt-bench --judge http://localhost:8000/v1#judge --limit 8",),
    "eval alpaca": ("eval alpaca --instructions my/baseline.json --judge http://localhost:8000/v1#judge",),
    "eval harness": ("eval harness model/ --tasks arc_challenge,hellaswag --limit 100",),
    "export gguf": ("export gguf model/ --type q8_0",),
    "export ollama": ("export ollama model/ --gguf model-q8_0.gguf",),
    "export card": ("export card model/ --license apache-2.0",),
    "export push": ("export push model/ me/my-zephyr --private --yes",),
    "data": ("data stats sft dataset=my/chats.jsonl",),
    "eval": ("eval loss runs/mine",),
    "export": ("export gguf model/",),
}


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """Append the examples to the help of every command and group of ``app``."""
    entries: dict[str, Any] = {prefix.strip(): app.info}
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        entries[prefix + name.replace("_", "-")] = command
    for name, entry in entries.items():
        lines = EXAMPLES[name]
        head = "Example:" if len(lines) == 1 else "Examples:"
        # one paragraph per line: typer may join the lines of a paragraph
        others = [entry.epilog] if entry.epilog else []
        paragraphs = [
            "--verbose adds the traceback of an error.",
            *others,
            head,
            *(f"zephyr-lite {each}" for each in lines),
        ]
        entry.epilog = "\n\n".join(paragraphs)
    for group in app.registered_groups:
        add_examples(group.typer_instance, f"{prefix}{group.name} ")  # type: ignore[arg-type]
