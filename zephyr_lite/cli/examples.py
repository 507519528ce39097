"""An example or two of every command, which its help ends with."""

from __future__ import annotations

import typer

EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "zephyr-lite sft --config zephyr-7b/overnight-sft",
        "zephyr-lite dpo --config zephyr-7b/overnight-dpo",
        "zephyr-lite merge --out model/",
    ),
    "sft": (
        "zephyr-lite sft --config zephyr-7b/overnight-sft",
        "zephyr-lite sft dataset=my/chats.jsonl output_dir=runs/mine --smoke",
    ),
    "dpo": (
        "zephyr-lite dpo --config zephyr-7b/overnight-dpo",
        "zephyr-lite dpo dataset=my/pairs.jsonl output_dir=runs/mine beta=0.1",
    ),
    "plan": (
        "zephyr-lite plan",
        "zephyr-lite plan dpo --gpu 3060 --price 0.2 optim=adamw_8bit",
    ),
    "merge": (
        "zephyr-lite merge --out model/",
        "zephyr-lite merge --run runs/mine --stage sft --out model-sft/",
    ),
    "demo": ("zephyr-lite demo --out runs/demo",),
    "env": ("zephyr-lite env",),
    "ablate": (
        "zephyr-lite ablate recipe --dry-run",
        "zephyr-lite ablate recipe --only dsft --out runs/ablate max_steps=200 dpo.beta=0.1",
    ),
    "feedback": (
        "zephyr-lite feedback --config on-policy --model runs/mine/sft --dry-run",
        "zephyr-lite feedback --config local --prompts my/questions.txt --out data/rated",
    ),
    "distill": (
        "zephyr-lite distill --config distill --dry-run",
        "zephyr-lite distill --teacher http://localhost:8000/v1#teacher --count 1000 --out data/grown",
    ),
    "chat": (
        "zephyr-lite chat",
        "zephyr-lite chat runs/mine --compare --vote votes.jsonl",
    ),
    "report": (
        "zephyr-lite report",
        "zephyr-lite report runs/mine runs/other --out compared.html",
    ),
    "reproduce": (
        "zephyr-lite reproduce overnight",
        "zephyr-lite reproduce overnight sft.optim=adamw_8bit dpo.beta=0.1",
    ),
    "check": (
        "zephyr-lite check runs/mine/dpo",
        "zephyr-lite check their-dpo --below their-sft --pairs my/pairs.jsonl",
    ),
    "data chat": ("zephyr-lite data chat stingning/ultrachat --out data/ultrachat",),
    "data pairs": ("zephyr-lite data pairs openbmb/UltraFeedback --out data/pairs --rejected worst",),
    "data show": (
        "zephyr-lite data show sft dataset=my/chats.jsonl",
        "zephyr-lite data show dpo --row 3 --table",
    ),
    "data stats": ("zephyr-lite data stats sft dataset=my/chats.jsonl max_length=1024",),
    "eval loss": ("zephyr-lite eval loss runs/mine --limit 200",),
    "eval preference": ("zephyr-lite eval preference runs/mine --data my/pairs.jsonl",),
    "eval mt-bench": ("zephyr-lite eval mt-bench --judge http://localhost:8000/v1#judge --limit 8",),
    "eval alpaca": ("zephyr-lite eval alpaca --instructions my/baseline.json --judge http://localhost:8000/v1#judge",),
    "eval harness": ("zephyr-lite eval harness model/ --tasks arc_challenge,hellaswag --limit 100",),
    "export gguf": ("zephyr-lite export gguf model/ --type q8_0",),
    "export ollama": ("zephyr-lite export ollama model/ --gguf model-q8_0.gguf",),
    "export card": ("zephyr-lite export card model/ --license apache-2.0",),
    "export push": ("zephyr-lite export push model/ me/my-zephyr --private --yes",),
    "data": ("zephyr-lite data stats sft dataset=my/chats.jsonl",),
    "eval": ("zephyr-lite eval loss runs/mine",),
    "export": ("zephyr-lite export gguf model/",),
}


def add_examples(app: typer.Typer, prefix: str = "") -> None:
    """Put the examples behind what the help of every command of ``app`` ends with, and of the groups of commands within.

    Raises:
        KeyError: a command without an example.
    """
    app.info.epilog = _with(app.info.epilog, prefix.strip())
    for command in app.registered_commands:
        name = command.name or command.callback.__name__.strip("_").replace("_", "-")  # type: ignore[union-attr]
        command.epilog = _with(command.epilog, prefix + name)
    for group in app.registered_groups:
        add_examples(group.typer_instance, f"{prefix}{group.name} ")  # type: ignore[arg-type]


def _with(epilog: str | None, name: str) -> str:
    lines = EXAMPLES[name]
    head = "Example:" if len(lines) == 1 else "Examples:"
    # a paragraph a line: typer may join the lines of a paragraph
    return "\n\n".join([*([epilog] if epilog else []), head, *lines])
