"""A model card: README.md in the folder of a merged model or a composed adapter, and its pictures."""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard

from .. import __version__
from ..config.load import RunConfig
from ..config.strict_yaml import read_yaml
from ..errors import UserError
from ..evaluate.results import have_matplotlib
from ..io.atomic import bytes_aside, copy_file, make_folder, write_text
from ..io.run_dir import StageDir, checked, read_json
from ..merge.weights import MARK
from ..model.base import fingerprint
from ..model.files import local_folder
from .vllm import serve_adapter, serve_model

logger = logging.getLogger(__name__)

CARD = "README.md"
PLOTS = "plots"
OURS = "<!-- made by zephyr-lite; `zephyr-lite export card` replaces this file as long as this line stands here -->"
BLUE, ORANGE = "#3b6ea8", "#d0722b"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_METHODS = {"sft": "supervised fine-tuning on conversations", "dpo": "direct preference optimization"}
_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "bnb_4bit_use_double_quant"),
    *(
        "max_length",
        "batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_ratio",
    ),
    *("warmup_steps", "optim", "weight_decay", "max_grad_norm", "loss_on", "seed"),
)
_DPO_KEYS = ("max_prompt_length", "beta", "loss_type", "label_smoothing")
_MEASURED = {
    "kl": "KL(live ‖ merged), nats a token",
    "top1_agreement": "same likeliest token",
    "loss": "held-out loss, nats a token",
    "loss_minus_live": "minus the live stack's",
}
_MERGED = {"live": "live stack", "base": "merged onto base", "nf4": "merged onto nf4"}
_ONTO = {"base": "the base in its own precision", "nf4": "the base as NF4 rounded it, which is what training saw"}


@dataclass
class StageFacts:
    """One stage of training: its name (sft), method and engine, configuration, stage.json, the hash of its own adapter, and
    its folder."""

    name: str
    method: str
    engine: str
    config: RunConfig
    info: dict[str, Any]
    sha256: str
    folder: Path

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The last one of training."""
        return ((self.info.get("result") or {}).get("evaluations") or [None])[-1]


@dataclass
class Facts:
    """The record of a folder that ``merge`` made."""

    folder: Path  # the model, or the adapter (``adapter``)
    mark: dict[str, Any]  # its zephyr_lite.json
    base: str  # the base's name; of a local one the folder's name alone
    base_id: str | None  # its hub id, or None
    adapter: bool
    stages: list[StageFacts] = field(default_factory=list)  # those that were found, from the bottom up
    lost: list[dict[str, Any]] = field(default_factory=list)  # adapters without a stage
    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # kind → an evaluation's JSON
    pictures: dict[str, Path] = field(default_factory=dict)  # kind → the evaluation's picture
    # the merge compared with the live stack (``measured`` in zephyr_lite.json)
    measure: dict[str, Any] = field(default_factory=dict)
    license: str | None = None  # of the base, if its files name one


def write_card(
    folder: str | Path,
    *,
    run: Path | None = None,
    license: str | None = None,
    plots: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Write README.md into a folder that ``merge`` made.

    Args:
        folder: a merged model, or an adapter of ``merge --adapter-only``.
        run: the run's folder, if it was moved since.
        license: its SPDX name as the hub writes it; the base's by default, if its files say.
        plots: draw the curves; None: if matplotlib is installed.
        overwrite: replace a README.md that zephyr-lite did not write.

    Returns:
        the card.
    Raises:
        UserError: ``merge`` did not make the folder, or it has a README.md that zephyr-lite did not write.
    """
    folder = Path(folder).expanduser()
    facts = gather(folder, run=run)
    card = folder / CARD
    if card.exists() and not overwrite and OURS not in card.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{card}: exists, and zephyr-lite did not write it.", "Add --overwrite to replace it.")
    pictures = _pictures(facts, have_matplotlib() if plots is None else plots)
    if plots is None and not pictures and not have_matplotlib():
        logger.info('the card has no curves: pip install "zephyr-lite[plots]" draws them')
    write_text(card, card_text(facts, pictures, license or facts.license))
    return card


# From the folder, its run, and the evaluations


def gather(folder: Path, *, run: Path | None = None) -> Facts:
    """Read the record of a folder that ``merge`` made.

    Args:
        run: the run's folder or a stage's, if it was moved since.

    Raises:
        UserError: ``merge`` did not make the folder, or ``run`` is not the run that it was merged from.
    """
    mark = read_json(folder / MARK)
    if mark is None or not isinstance(mark.get("adapters"), list) or not isinstance(mark.get("base"), dict):
        raise UserError(
            f"{folder}: is no folder that zephyr-lite merge made (it has no {MARK}).",
            "Make it: zephyr-lite merge --out model/",
        )
    if run is not None and (run / "stage.json").is_file():
        run = run.resolve().parent
    name = str(mark["base"].get("name_or_path", ""))
    base_id = hub_id(name)
    base = base_id or f"{Path(name).name} (a local folder)"
    facts = Facts(folder, mark, base, base_id, "adapter" in str(mark["kind"]), measure=mark.get("measured") or {})
    for link in mark["adapters"]:
        stage = _stage(link, run)
        if stage is None:
            facts.lost.append(link)
            hint = "" if run is not None else "; give the run's folder with --run"
            logger.info(f"{link.get('path')}: no finished stage with this adapter, so the card has only its hash{hint}")
            continue
        if stage.sha256 != (stage.info.get("own") or {}).get("sha256"):  # adapter/ holds the stages below too
            for part in stage.info.get("adapters") or []:
                below = _stage({**part, "path": str(stage.folder.parent / str(part.get("path")))}, None)
                facts.stages += [below] if below is not None else []
                facts.lost += [part] if below is None else []
        facts.stages.append(stage)
    if run is not None and not facts.stages:
        raise UserError(
            f"--run {run}: none of its stages is what {folder} was merged from.",
            "Give the run that it was merged from; without --run the card has only hashes.",
        )
    _find_results(facts)
    here = local_folder(name) if name else None
    if here is not None and (here / CARD).is_file():
        card = ModelCard((here / CARD).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        facts.license = card.data.to_dict().get("license")
    return facts


def hub_id(name: str) -> str | None:
    """The name if it is a hub id and not a local folder; local paths are not published."""
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _stage(link: Mapping[str, Any], run: Path | None) -> StageFacts | None:
    """The finished stage of an adapter, if it is there and has this adapter."""
    place = Path(str(link.get("path", ""))).parent
    stage = StageDir(place if run is None else run / place.name)
    info = stage.info()
    if info is None or info.get("status") != "complete":
        return None
    checked(info, stage.path / "stage.json")
    if link.get("sha256") not in ((info.get("own") or {}).get("sha256"), info.get("adapter_sha256")):
        return None
    config = RunConfig.model_validate(read_yaml(stage.config))
    method, engine = str(info.get("method", "sft")), str(info.get("engine", "fused"))
    return StageFacts(stage.path.name, method, engine, config, info, str(link["sha256"]), stage.path)


def _find_results(facts: Facts) -> None:
    """Evaluations of this very model: of the stage that it was merged from, and of the folder."""
    wanted = [link.get("sha256") for link in facts.mark["adapters"]]
    own = fingerprint(facts.folder) if (facts.folder / "config.json").is_file() else None
    folders = [stage.folder / "eval" for stage in facts.stages[-1:]]
    folders.append(facts.folder.with_name(f"{facts.folder.resolve().name}-eval"))
    for path in (path for place in folders for path in sorted(place.glob("*.json"))):
        told = read_json(path) or {}
        if not isinstance(told.get("models"), dict):
            continue
        found = [link.get("sha256") for link in told.get("adapters") or []]
        if found != wanted and (found or (told.get("base") or {}).get("fingerprint") != own):
            logger.warning(f"{path}: is of other adapters, and left out of the card")
        elif re.search(r"-limit-\d+$", path.stem):
            logger.warning(f"{path}: is a trial on a few rows, and left out of the card")
        else:
            facts.results[path.stem] = told
            if (picture := path.with_suffix(".png")).is_file():
                facts.pictures[path.stem] = picture


# The text


def card_text(facts: Facts, pictures: dict[str, str], license: str | None) -> str:
    """The card's text (``model_card.md.j2``)."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(json=json.dumps, number=_number, text=_text, setting=_setting, hub_id=hub_id)
    template = environment.from_string(Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"))
    name, stages = facts.folder.resolve().name, facts.stages
    served, not_served = _served(facts, name)
    measured = {title: dict(leaves(facts.measure[key])) for key, title in _MERGED.items() if facts.measure.get(key)}
    measured_rows = [[title, *(told.get(key, "-") for told in measured.values())] for key, title in _MEASURED.items()]
    onto = str(facts.mark.get("onto"))
    front = {
        "library_name": "peft" if facts.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": license,
        "base_model": facts.base_id,
        "base_model_relation": ("adapter" if facts.adapter else "finetune") if facts.base_id else None,
        "datasets": list(dict.fromkeys(filter(None, (hub_id(d.path) for s in stages for d in s.config.dataset)))),
        "tags": ["zephyr-lite", "lora", *dict.fromkeys(stage.method for stage in stages), "conversational"],
    }
    text = template.render(
        facts=facts,
        front=front,
        ours=OURS,
        name=name,
        version=__version__,
        methods=_METHODS,
        in_four_bits=any(stage.config.load_in_4bit for stage in stages),
        served=served,
        not_served=not_served,
        results=[_result(kind, told) for kind, told in facts.results.items()],
        pictures=pictures,
        keys=(*_KEYS, *_DPO_KEYS),
        dpo_keys=_DPO_KEYS,
        onto=_ONTO.get(onto, onto),
        measured_header=["", *measured],
        measured_rows=measured_rows if measured else [],
        versions=(stages[-1].info.get("versions") or {}) if stages else {},
        license=license,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _served(facts: Facts, name: str) -> tuple[str, str]:
    """(vLLM's command line, why there is none)."""
    if not facts.adapter:
        return serve_model(name), ""
    try:
        line = serve_adapter(facts.folder).replace(str(facts.folder), name)
    except UserError as error:
        return "", error.message
    if facts.base_id is None:
        line = line.replace(str(facts.mark["base"].get("name_or_path")), "PATH/TO/BASE")
    return line, ""


def _result(kind: str, told: dict[str, Any]) -> dict[str, Any]:
    """An evaluation: its table of models, its rows, judge and notes, and the models compared."""
    models = {str(name): dict(leaves(body)) for name, body in told["models"].items() if isinstance(body, dict)}
    keys = dict.fromkeys(key for found in models.values() for key in found)
    data, judge = told.get("data") or {}, (told.get("settings") or {}).get("judge") or {}
    names = ", ".join(hub_id(str(d["path"])) or Path(str(d["path"])).name for d in data.get("datasets") or [])
    lines = [f"On {data['rows']:,} rows of {names}."] if names and "rows" in data else []
    lines += [f"Judge: {judge.get('model') or judge['name']}."] if judge else []
    lines += [f"Note: {note}" for note in told.get("notes") or []]
    # a list of both names and the numbers, or the numbers by a text of both names
    compared = []
    for pairs in (told.get("differences"), told.get("comparisons")):
        entries = pairs.items() if isinstance(pairs, dict) else ((None, entry) for entry in pairs or [])
        for names_of_both, entry in entries:
            both = names_of_both or " against ".join(str(v) for v in entry.values() if isinstance(v, str))
            compared.append((both, "; ".join(f"{key} {value}" for key, value in leaves(entry))))
    return {
        "kind": kind,
        "header": ["", *models],
        "rows": [[key, *(found.get(key, "-") for found in models.values())] for key in keys],
        "lines": lines,
        "compared": compared,
    }


def leaves(body: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested result: (path, text); a value with its interval is one of them."""
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


def _text(text: str) -> str:
    """A text as one line of Markdown: no HTML, no table cell that ends early."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|").replace("[!", "\\[!")


def _setting(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "-"
    if isinstance(value, float) and value.is_integer() and abs(value) >= 1000:  # counts are logged as floats
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"


# The pictures


def _pictures(facts: Facts, curves: bool) -> dict[str, str]:
    """Draw or copy the pictures: title → file, relative to the folder."""
    place, made = facts.folder / PLOTS, dict[str, str]()
    if curves or facts.pictures:
        make_folder(place)
    for stage in facts.stages if curves else []:
        if _draw_stage(place / f"{stage.name}.png", stage):
            made[f"{stage.name}: what training logged"] = f"{PLOTS}/{stage.name}.png"
    for kind, picture in facts.pictures.items():
        copy_file(picture, place / f"eval-{kind}.png")
        made[f"eval {kind}"] = f"{PLOTS}/eval-{kind}.png"
    return made


def _draw_stage(path: Path, stage: StageFacts) -> bool:
    """Draw a stage's loss with its held-out points, and of DPO the reward's accuracy and margin. False: no points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = StageDir(stage.folder).metrics
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    panels = {"loss": "nats a token" if stage.method == "sft" else "DPO loss"}
    if stage.method == "dpo":
        panels |= {"rewards/accuracies": "share of pairs", "rewards/margins": "β · nats"}
    curves = {
        key: [
            (prefix, [(line["step"], line[prefix + key]) for line in lines if prefix + key in line])
            for prefix in ("", "eval_")
        ]
        for key in panels
    }
    drawn = [key for key in panels if any(points for _, points in curves[key])]
    if not drawn:
        return False
    figure = Figure(figsize=(4.6 * len(drawn) + 0.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, key in enumerate(drawn, start=1):
        axes = figure.add_subplot(1, len(drawn), place)
        for prefix, points in curves[key]:
            label, color, marker = ("held-out", ORANGE, "o") if prefix else ("training", BLUE, "")
            if points:
                axes.plot(*zip(*points), linewidth=1.4, color=color, marker=marker, markersize=4, label=label)
        axes.set(title=key, xlabel="step", ylabel=panels[key])
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    with bytes_aside(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return True
