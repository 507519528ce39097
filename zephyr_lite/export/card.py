"""A model card: README.md in a merged model's (or a composed adapter's) folder, and the pictures that it shows."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UserError
from ..evaluate.plotting import have_matplotlib
from ..io.atomic import copy_file, make_folder, write_text
from .facts import Facts, StageFacts, gather, hub_id
from .plots import draw_stage
from .vllm import serve_adapter, serve_model

Say = Callable[[str], None]
CARD = "README.md"
PLOTS = "plots"
OURS = "<!-- made by zephyr-lite; `zephyr-lite export card` replaces this file as long as this line stands here -->"
_METHODS = {"sft": "supervised fine-tuning on conversations", "dpo": "direct preference optimization"}
_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "load_in_4bit",
    "bnb_4bit_use_double_quant",
    "max_length",
    "batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "loss_on",
    "seed",
)
_MEASURED = {
    "kl": "KL(live ‖ merged), nats a token",
    "top1_agreement": "same likeliest token",
    "loss": "held-out loss, nats a token",
    "loss_minus_live": "minus the live stack's",
}
_DPO_KEYS = ("max_prompt_length", "beta", "loss_type", "label_smoothing")


def write_card(
    folder: str | Path,
    *,
    run: Path | None = None,
    license: str | None = None,
    plots: bool | None = None,
    overwrite: bool = False,
    say: Say = lambda line: None,
) -> Path:
    """Write README.md into a folder that ``merge`` made.

    Args:
        folder: a merged model, or an adapter of ``merge --adapter-only``.
        run: the run's folder, where it was moved since.
        license: its SPDX name as the hub writes it; the base's by default, where the base's files say.
        plots: draw the curves; None: where matplotlib is installed.
        overwrite: replace a README.md that is somebody else's.

    Returns:
        the card.
    Raises:
        UserError: the folder is none that ``merge`` made, or has a README.md that zephyr-lite did not write.
    """
    folder = Path(folder).expanduser()
    facts = gather(folder, run=run, say=say)
    card = folder / CARD
    if card.exists() and not overwrite and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{card}: is there already, and not one of ours.", "Add --overwrite to replace it.")
    pictures = _pictures(facts, have_matplotlib() if plots is None else plots)
    if plots is None and not pictures and not have_matplotlib():
        say('the card has no curves: pip install "zephyr-lite[plots]" draws them')
    write_text(card, card_text(facts, pictures, license or facts.license))
    return card


def _pictures(facts: Facts, curves: bool) -> dict[str, str]:
    """Title → file, relative to the folder."""
    place, made = facts.folder / PLOTS, dict[str, str]()
    if curves or facts.pictures:
        make_folder(place)
    if curves:
        for stage in facts.stages:
            if draw_stage(place / f"{stage.name}.png", stage):
                made[f"{stage.name}: what training logged"] = f"{PLOTS}/{stage.name}.png"
    for kind, picture in facts.pictures.items():
        copy_file(picture, place / f"eval-{kind}.png")
        made[f"eval {kind}"] = f"{PLOTS}/eval-{kind}.png"
    return made


def card_text(facts: Facts, pictures: dict[str, str], license: str | None) -> str:
    """The card's whole text."""
    name = facts.folder.resolve().name
    stages = " and then ".join(f"{_METHODS[stage.method]} ({stage.name})" for stage in facts.stages)
    how = f" by {stages}" if stages else ""
    in_four = any(stage.config.load_in_4bit for stage in facts.stages)
    kind = "A PEFT LoRA adapter, the whole chain in one," if facts.adapter else "A chat model"
    parts = [
        _front(facts, license),
        OURS,
        f"# {_text(name)}",
        f"{kind} made from {_named(facts.base, facts.base_id)}{how} with zephyr-lite {__version__}"
        + (": QLoRA, that is LoRA on a base in 4 bits." if in_four else "."),
        *_use(facts, name),
        *_results(facts),
        *(f"![{_text(title)}]({place})" for title, place in pictures.items()),
        *_training(facts.stages),
        *_merge(facts),
        *_lineage(facts),
        *_limits(facts, license),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front(facts: Facts, license: str | None) -> str:
    """YAML for the hub; every value as JSON writes it, which YAML reads the same."""
    datasets = list(dict.fromkeys(filter(None, (hub_id(d.path) for s in facts.stages for d in s.config.dataset))))
    tags = ["zephyr-lite", "lora", *dict.fromkeys(stage.method for stage in facts.stages)]
    head: dict[str, Any] = {
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"license": license} if license else {}),
        **({"base_model": facts.base_id} if facts.base_id else {}),
        **({"base_model_relation": "adapter" if facts.adapter else "finetune"} if facts.base_id else {}),
        **({"datasets": datasets} if datasets else {}),
        "tags": [*tags, "conversational"],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---"])


def _use(facts: Facts, name: str) -> Iterator[str]:
    yield "## How to use it"
    load = (
        f'model = AutoModelForCausalLM.from_pretrained({json.dumps(facts.base_id or "PATH/TO/BASE")}, dtype="auto")\n'
        "model = PeftModel.from_pretrained(model, path)"
        if facts.adapter
        else 'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto")'
    )
    imports = "from peft import PeftModel\n" if facts.adapter else ""
    yield (
        f"```python\n{imports}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"path = {json.dumps(name)}  # this folder, or its name on the hub\n"
        f"tokenizer = AutoTokenizer.from_pretrained(path)\n{load}\n"
        'messages = [{"role": "user", "content": "What is a good soup for a rainy evening?"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n).to(model.device)\n'
        "answer = model.generate(**inputs, max_new_tokens=256, do_sample=True, temperature=0.7)\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```'
    )
    if facts.adapter:
        try:
            line = serve_adapter(facts.folder).replace(str(facts.folder), name)
        except UserError as error:
            yield f"vLLM does not serve this adapter: {_text(error.message)}"
            return
        if facts.base_id is None:
            line = line.replace(str(facts.mark["base"].get("name_or_path")), "PATH/TO/BASE")
        yield f"With vLLM:\n\n```sh\n{line}\n```"
        return
    yield f"With vLLM, or with transformers' own server:\n\n```sh\n{serve_model(name)}\ntransformers serve {name}\n```"
    yield (
        "With Ollama or llama.cpp (Llama, Mistral and Qwen2 families):\n\n```sh\n"
        f"zephyr-lite export gguf {name} --type q8_0 --out {name}-q8_0.gguf\n"
        f"zephyr-lite export ollama {name} --gguf {name}-q8_0.gguf --out Modelfile\n"
        f"ollama create {name.lower()} -f Modelfile\n```"
    )
    yield (
        "The chat template writes what stands before a conversation itself (BOS and an empty system turn, where training "
        "saw them), so tokenize its text without adding special tokens."
    )


def _results(facts: Facts) -> Iterator[str]:
    last = [(stage, evaluation) for stage in facts.stages if (evaluation := _last(stage))]
    if not last and not facts.results:
        yield "## Results"
        yield "Nothing was measured on held-out rows."
        return
    yield "## Results"
    for stage, evaluation in last:
        rows = [[key.removeprefix("eval_"), _number(value)] for key, value in evaluation.items() if key != "step"]
        yield f"Held-out rows at the end of {_text(stage.name)} (step {evaluation.get('step', '?')}):"
        yield _table(["", stage.name], rows)
    for kind, told in facts.results.items():
        yield f"### {_text(kind)}"
        models = {str(name): dict(leaves(body)) for name, body in told["models"].items() if isinstance(body, dict)}
        keys = list(dict.fromkeys(key for found in models.values() for key in found))
        yield _table(["", *models], [[key, *(found.get(key, "-") for found in models.values())] for key in keys])
        yield from _circumstances(told)
        for names, entry in _compared(told):
            found = "; ".join(f"{_text(key)} {value}" for key, value in leaves(entry))
            yield f"- {_text(names)}: {found}"
    if facts.results:
        yield "In brackets: bootstrap confidence intervals. `base` is the untrained model."


def _circumstances(told: dict[str, Any]) -> Iterator[str]:
    """On which rows, by which judge, and what the result itself says of its worth."""
    data, settings = told.get("data") or {}, told.get("settings") or {}
    paths = [str(spec.get("path")) for spec in data.get("datasets") or [] if isinstance(spec, dict)]
    names = ", ".join(hub_id(path) or Path(path).name for path in paths)
    if isinstance(data.get("rows"), int) and names:
        yield f"On {data['rows']:,} rows of {_text(names)}."
    judge = settings.get("judge")
    if isinstance(judge, dict) and isinstance(judge.get("model") or judge.get("name"), str):
        yield f"Judge: {_text(judge.get('model') or judge['name'])}."
    for note in told.get("notes") or []:
        yield f"Note: {_text(str(note))}"


def _compared(told: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(which two models, how far apart): a list of both names and the numbers, or the numbers by a text of both names."""
    for pairs in (told.get("differences"), told.get("comparisons")):
        if isinstance(pairs, dict):
            yield from ((str(names), entry) for names, entry in pairs.items() if isinstance(entry, dict))
        for entry in pairs if isinstance(pairs, list) else []:
            yield " against ".join(str(value) for value in entry.values() if isinstance(value, str)), entry


def _last(stage: StageFacts) -> dict[str, Any]:
    """The stage's last evaluation: its numbers."""
    found = (stage.info.get("result") or {}).get("evaluations") or []
    last = found[-1] if found and isinstance(found[-1], dict) else {}
    keep = {k: v for k, v in last.items() if isinstance(v, int | float) and "second" not in k and "runtime" not in k}
    return keep if len(keep) > ("step" in keep) else {}


def leaves(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested result: (path, text); an interval is one of them."""
    for key, value in body.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(value.get("value"), int | float):
            low, high, error = value.get("low"), value.get("high"), value.get("stderr")
            text = _number(value["value"])
            if isinstance(low, int | float) and isinstance(high, int | float):
                text += f" [{_number(low)}, {_number(high)}]"
            elif isinstance(error, int | float):
                text += f" ± {_number(error)}"
            yield name, text
        elif isinstance(value, dict):
            yield from leaves(value, f"{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, _number(value)


def _training(stages: Sequence[StageFacts]) -> Iterator[str]:
    if not stages:
        return
    yield "## Training"
    rows = []
    for key in (*_KEYS, *(_DPO_KEYS if any(stage.method == "dpo" for stage in stages) else ())):
        cells = ["-" if key in _DPO_KEYS and s.method != "dpo" else _value(getattr(s.config, key)) for s in stages]
        rows.append([f"`{key}`", *cells])
    results = [stage.info.get("result") or {} for stage in stages]
    rows.append(["steps", *(_number(r.get("steps")) for r in results)])
    rows.append(["engine", *(stage.engine for stage in stages)])
    yield _table(["", *(f"{stage.name} ({stage.method})" for stage in stages)], rows)
    yield "## Data"
    for stage in stages:
        data = stage.info.get("data") or {}
        for spec in stage.config.dataset:
            what = ", ".join(f"{k} {_text(str(v))}" for k, v in (("split", spec.split), ("limit", spec.limit)) if v)
            share = f", weight {spec.weight:g}" if spec.weight != 1 else ""
            place = hub_id(spec.path)
            named = (
                f"[{place}](https://huggingface.co/datasets/{place})"
                if place
                else f"{_text(Path(spec.path).name)} (local)"
            )
            yield f"- {_text(stage.name)}: {named}{f' ({what}{share})' if what or share else ''}"
        told = [f"{_number(data['cut'])} cut to max_length"] if data.get("cut") else []
        for title, key in (("left out", "dropped"), ("changed", "changed")):
            told += [
                f"{title}: {_number(found.get('count'))} ({_text(why)})" for why, found in (data.get(key) or {}).items()
            ]
        yield (
            f"  {_number(data.get('kept'))} of {_number(data.get('read'))} rows kept, {_number(data.get('tokens'))} tokens, "
            f"{_number(data.get('supervised'))} of them supervised" + "".join(f"; {line}" for line in told) + "."
        )


def _merge(facts: Facts) -> Iterator[str]:
    if facts.adapter:
        return
    onto = {"base": "the base in its own precision", "nf4": "the base as NF4 rounded it, which is what training saw"}
    yield "## Merge"
    yield f"The adapters were merged onto {onto.get(str(facts.mark.get('onto')), str(facts.mark.get('onto')))}."
    models = {"live": "live stack", "base": "merged onto base", "nf4": "merged onto nf4"}
    told = {
        title: dict(leaves(facts.measure[key]))
        for key, title in models.items()
        if isinstance(facts.measure.get(key), dict)
    }
    if not told:
        return
    rows = [[title, *(found.get(key, "-") for found in told.values())] for key, title in _MEASURED.items()]
    yield _table(["", *told], rows)
    data = facts.measure.get("data") or {}
    yield (
        f"On {_number(data.get('supervised_tokens'))} supervised tokens of {_number(data.get('rows'))} held-out conversations; "
        "the live stack is the base as training saw it with every adapter on it."
    )


def _lineage(facts: Facts) -> Iterator[str]:
    yield "## Lineage"
    base = facts.mark["base"]
    rows = [["base", _text(facts.base), f"`{base.get('fingerprint') or '-'}`"]]
    rows += [[stage.method, _text(stage.name), f"`{stage.sha256}`"] for stage in facts.stages]
    rows += [["adapter", "its run is not here", f"`{link.get('sha256')}`"] for link in facts.lost]
    for stage in facts.stages:
        rows.append([f"rows of {stage.name}", "-", f"`{(stage.info.get('data') or {}).get('fingerprint', '-')}`"])
    yield _table(["", "name", "content hash"], rows)
    for stage in facts.stages[-1:]:
        versions = ", ".join(f"{name} {version}" for name, version in (stage.info.get("versions") or {}).items())
        yield f"Trained with {_text(versions)}." if versions else ""


def _limits(facts: Facts, license: str | None) -> Iterator[str]:
    yield "## Limits"
    told = [
        "It says what is likely, not what is true; check what matters.",
        "It was not trained to refuse, and no safety evaluation was made of it.",
        "It knows no more languages and facts than its base; a smaller data set changes how it answers rather than what it knows.",
    ]
    if not facts.results:
        told.append("No benchmark was run on it, and nobody compared its answers.")
    if not license:
        told.append("No licence is stated: the base's and the data sets' terms hold.")
    yield "\n".join(f"- {line}" for line in told)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    """One line of a text that nobody vouches for: no HTML, no table cell that ends early."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[!", "\\[!")


def _named(name: str, place: str | None) -> str:
    return f"[{place}](https://huggingface.co/{place})" if place else _text(name)


def _value(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1000:  # counts are logged as floats
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
