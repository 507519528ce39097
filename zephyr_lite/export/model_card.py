"""A model card: README.md in the folder of a merged model or a composed adapter, and its pictures."""

from __future__ import annotations

import html
import json
import logging
import re
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, try_to_load_from_cache

from .. import __version__
from ..config.load import RunConfig
from ..errors import UserError
from ..evaluate.results import have_matplotlib
from ..io.atomic import bytes_aside, copy_file, write_text
from ..io.run_dir import StageDir, read_json
from ..merge.weights import COMPOSED, MARK
from ..model.base_folder import fingerprint
from ..model.files import TEXT_NAMES, has_text_model, local_folder
from ..model.peft_io import read_adapter
from ..monitor.charts import number
from ..monitor.records import StageRecord
from ..monitor.report import leaves, result_tables, value_text

logger = logging.getLogger(__name__)

CARD = "README.md"
PLOTS = "plots"
OURS = "<!-- made by zephyr-lite; `zephyr-lite export card` replaces this file as long as this line stands here -->"
BLUE, ORANGE = "#3b6ea8", "#d0722b"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of vLLM's --max-lora-rank
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_METHODS = {"sft": "supervised fine-tuning on conversations", "dpo": "preference optimization"}
_KEYS = [
    *("lora_r", "lora_alpha", "use_rslora", "lora_dropout", "lora_target_modules", "load_in_4bit"),
    *("bnb_4bit_use_double_quant", "max_length", "batch_size", "num_train_epochs", "max_steps", "learning_rate"),
    *("loraplus_lr_ratio", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", "optim"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "neftune_noise_alpha", "loss_on"),
    "seed",
]
_DPO_KEYS = [
    *("max_prompt_length", "beta", "loss_type", "loss_weights", "label_smoothing", "simpo_gamma"),
    *("desirable_weight", "undesirable_weight"),
]
_MEASURED = {
    "kl": "KL(live ‖ merged), nats a token",
    "top1_agreement": "same likeliest token",
    "loss": "held-out loss, nats a token",
    "loss_minus_live": "minus the live stack's",
}
_MERGED = {"live": "live stack", "base": "merged onto base", "nf4": "merged onto nf4"}
_ONTO = {"base": "the base in its own precision", "nf4": "the base as NF4 rounded it, which is what training saw"}


def write_card(
    folder: str | Path,
    *,
    run: Path | None = None,
    license: str | None = None,
    plots: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Write README.md into a folder that ``merge`` made; returns its path.

    Args:
        run: the run's folder, if it was moved since.
        license: its SPDX name as the hub writes it; the base's by default, if its files say.
        plots: draw the curves; None: if matplotlib is installed.
        overwrite: replace a README.md that zephyr-lite did not write.

    Raises:
        UserError: ``merge`` did not make the folder, ``run`` is not what it was merged from, or it has a README.md that
            zephyr-lite did not write.
    """
    folder = Path(folder).expanduser()
    mark = read_json(folder / MARK)
    if mark is None or "adapters" not in mark or "base" not in mark:
        raise UserError(
            f"{folder}: is no folder that zephyr-lite merge made (it has no {MARK}).",
            "Make it: zephyr-lite merge --out model/",
        )
    card = folder / CARD
    if card.exists() and not overwrite and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{card}: exists, and zephyr-lite did not write it.", "Add --overwrite to replace it.")
    stages, lost = _stages(mark, run)
    if run is not None and not stages:
        raise UserError(
            f"--run {run}: none of its stages is what {folder} was merged from.",
            "Give the run that it was merged from; without --run the card has only hashes.",
        )
    if plots is None and not have_matplotlib():
        logger.info('the card has no curves: pip install "zephyr-lite[plots]" draws them')
    results, pictures = _results(folder, mark, stages)
    drawn = have_matplotlib() if plots is None else plots
    if drawn or pictures:
        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    named = {}
    for stage in stages if drawn else []:
        if _draw_stage(folder / PLOTS / f"{stage.name}.png", stage):
            named[f"{stage.name}: what training logged"] = f"{PLOTS}/{stage.name}.png"
    for kind, picture in pictures.items():
        copy_file(picture, folder / PLOTS / f"eval-{kind}.png")
        named[f"eval {kind}"] = f"{PLOTS}/eval-{kind}.png"
    write_text(card, _card_text(folder, mark, stages, lost, results, named, license))
    return card


def hub_id(name: str) -> str | None:
    """The name if it is a hub id and not a local folder; local paths are not published."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _stages(mark: dict[str, Any], run: Path | None) -> tuple[list[StageRecord], list[dict[str, Any]]]:
    """The finished stages of the merged adapters, from the bottom up, and the adapters without one."""
    stages, lost = [], []
    for link in mark["adapters"]:
        place = Path(link["path"]).parent
        place = place if run is None else run / place.name
        stage = StageRecord(place) if StageDir(place).complete() else None
        if stage is None or stage.info["own"].get("sha256") != link["sha256"]:
            lost.append(link)
            hint = "" if run is not None else "; give the run's folder with --run"
            logger.info(f"{link['path']}: no finished stage with this adapter, so the card has only its hash{hint}")
        else:
            stage.config = RunConfig.model_validate(stage.config).model_dump(mode="json")  # with the defaults
            stages.append(stage)
    return stages, lost


def _results(
    folder: Path, mark: dict[str, Any], stages: list[StageRecord]
) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """Evaluations of this very model, of its last stage and of the folder: kind → result, and kind → picture."""
    wanted = [link["sha256"] for link in mark["adapters"]]
    results, pictures = {}, {}
    places = [stage.folder / "eval" for stage in stages[-1:]]
    places.append(folder.with_name(f"{folder.resolve().name}-eval"))
    for path in (path for place in places for path in sorted(place.glob("*.json"))):
        told = read_json(path) or {}
        if "models" not in told:
            continue
        adapters = [link.get("sha256") for link in told.get("adapters") or []]
        base = (told.get("base") or {}).get("fingerprint")
        if re.search(r"-limit-\d+$", path.stem):
            logger.warning(f"{path}: is a trial on a few rows, and left out of the card")
        elif adapters == wanted or (not adapters and base == fingerprint(folder)):
            results[path.stem] = told
            if (picture := path.with_suffix(".png")).is_file():
                pictures[path.stem] = picture
        else:
            logger.warning(f"{path}: is of other adapters, and left out of the card")
    return results, pictures


def _card_text(
    folder: Path,
    mark: dict[str, Any],
    stages: list[StageRecord],
    lost: list[dict[str, Any]],
    results: dict[str, dict[str, Any]],
    pictures: dict[str, str],
    license: str | None,
) -> str:
    """The card's text (``model_card.md.j2``)."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(json=json.dumps, number=number, text=_text, setting=value_text, hub_id=hub_id)
    template = environment.from_string(Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"))
    is_adapter, base = mark["kind"] == COMPOSED, str(mark["base"].get("name_or_path", ""))
    base_id, here = hub_id(base), local_folder(base)
    if license is None and here is not None and (here / CARD).is_file():
        theirs = ModelCard((here / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        license = theirs.data.to_dict().get("license")
    config = here / "config.json" if here is not None else base_id and try_to_load_from_cache(base_id, "config.json")
    multimodal = is_adapter and isinstance(config, (str, Path)) and has_text_model(read_json(Path(config)) or {})
    served, not_served = _vllm(folder, is_adapter, base_id or "PATH/TO/BASE")
    if multimodal:
        not_served = "it is the text model's, and vLLM loads this base as a multimodal model. Serve a merged model."
    measure = mark.get("measured") or {}
    measured = {title: dict(leaves(measure[key])) for key, title in _MERGED.items() if measure.get(key)}
    methods = list(dict.fromkeys(stage.method for stage in stages))
    paths = [data["path"] for stage in stages for data in stage.config["dataset"]]
    front = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": license,
        "base_model": base_id,
        "base_model_relation": ("adapter" if is_adapter else "finetune") if base_id else None,
        "datasets": list(dict.fromkeys(filter(None, map(hub_id, paths)))),
        "tags": ["zephyr-lite", "lora", *methods, "conversational"],
    }
    text = template.render(
        front=front,
        ours=OURS,
        name=folder.resolve().name,
        version=__version__,
        is_adapter=is_adapter,
        base=base_id or f"{Path(base).name} (a local folder)",
        base_id=base_id,
        mark=mark,
        stages=stages,
        lost=lost,
        methods=_METHODS,
        in_four_bits=any(stage.config["load_in_4bit"] for stage in stages),
        multimodal=multimodal,
        text_names=TEXT_NAMES,
        served="" if multimodal else served,
        not_served=not_served,
        results=[_result(kind, told) for kind, told in results.items()],
        pictures=pictures,
        keys=[*_KEYS, *(_DPO_KEYS if "dpo" in methods else [])],
        dpo_keys=_DPO_KEYS,
        onto=_ONTO.get(str(mark.get("onto"))),
        measure=measure,
        measured_header=["", *measured],
        measured_rows=[
            [title, *(told.get(key, "-") for told in measured.values())] for key, title in _MEASURED.items()
        ],
        versions=stages[-1].info["versions"] if stages else {},
        license=license,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _vllm(folder: Path, is_adapter: bool, base: str) -> tuple[str, str]:
    """(vLLM's command line, why there is none). Source: docs.vllm.ai, engine arguments and LoRA adapters."""
    name = folder.resolve().name
    if not is_adapter:
        return f"vllm serve {name} --served-model-name {name}", ""
    modules = read_adapter(folder).modules
    rank, scales = max(w.rank for w in modules.values()), {round(w.scale, 6) for w in modules.values()}
    if len(scales) > 1 or rank > VLLM_RANKS[-1] or any(m.endswith(("lm_head", "embed_tokens")) for m in modules):
        return "", f"it serves adapters of one scale, of ranks up to {VLLM_RANKS[-1]} and of decoder layers only."
    allowed = min(allowed for allowed in VLLM_RANKS if rank <= allowed)
    return (
        f"vllm serve {base} --enable-lora --lora-modules {name}={name} --max-lora-rank {allowed} "
        f"--chat-template {name}/chat_template.jinja"
    ), ""


def _result(kind: str, told: dict[str, Any]) -> dict[str, Any]:
    """An evaluation: its table of models, its rows, judge and notes, and the models compared."""
    data, judge = told.get("data") or {}, (told.get("settings") or {}).get("judge") or {}
    names = ", ".join(hub_id(d["path"]) or Path(d["path"]).name for d in data.get("datasets") or [])
    lines = [f"On {data['rows']:,} rows of {names}."] if names else []
    lines += [f"Judge: {judge.get('model') or judge['name']}."] if judge else []
    lines += [f"Note: {note}" for note in told.get("notes") or []]
    return {"kind": kind, "lines": lines, **result_tables(told)}


def _text(text: str) -> str:
    """A text as one line of Markdown: no HTML, no table cell that ends early."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[!", "\\[!")


def _draw_stage(path: Path, stage: StageRecord) -> bool:
    """Draw a stage's loss with its held-out points, and of DPO the reward's accuracy and margin. False: no points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"loss": "nats a token" if stage.method == "sft" else "DPO loss"}
    if stage.method == "dpo":
        panels |= {"rewards/accuracies": "share of pairs", "rewards/margins": "β · nats"}
    drawn = [key for key in panels if key in stage.columns or f"eval_{key}" in stage.columns]
    if not drawn:
        return False
    figure = Figure(figsize=(4.6 * len(drawn) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, key in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), place)
        for column, label, color, marker in ((key, "training", BLUE, ""), (f"eval_{key}", "held-out", ORANGE, "o")):
            if column in stage.columns:
                steps, values = stage.columns[column]
                axes.plot(steps, values, linewidth=1.4, color=color, marker=marker, markersize=4, label=label)
        axes.set(title=key, xlabel="step", ylabel=panels[key])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
