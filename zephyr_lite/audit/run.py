"""``zephyr-lite check``: audits an adapter of any tool: the adapters below it, its reference, BOS, end token, template."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import ChatTemplate, resolve_template
from ..data.dataset import prepare
from ..data.load import load_rows
from ..data.templates import TEMPLATES
from ..demo import CONVERSATIONS_TEST
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.base import Base, load_base, load_tokenizer
from ..model.base_folder import is_fingerprint_of
from ..model.chain import chain_of_run
from ..model.families import FAMILIES, NAMES
from ..model.loaded import LoadedModel
from ..model.peft_io import other_base, read_adapter
from ..model.tokenizer import check_vocabulary
from .files import Audit, Evidence, adapter_folder, check_files, gather
from .measure import Messages, check_pairs, check_rows

logger = logging.getLogger(__name__)
BETA = 0.1  # TRL's default


def audit(
    adapter: str,
    *,
    base: str | None = None,
    below: Sequence[str] | None = None,
    start: str | None = None,
    reference: str = "start",
    rows: str | None = None,
    pairs: str | None = None,
    beta: float | None = None,
    chat_template: str | None = None,
    limit: int = 16,
    load_in_4bit: bool | None = None,
    files_only: bool = False,
) -> Audit:
    """Check the files, then load the base and measure; the arguments are the command's options.

    Raises:
        UserError: there is no such adapter, or the rows or pairs cannot be read. A base that is missing or does not fit is a
            finding.
    """
    if start is not None and below:
        raise UserError(
            "--start and --below cannot be combined.",
            "Give --start for an adapter that this one was continued from, --below for adapters that are active below it.",
        )
    evidence = gather(adapter)
    found = Audit(str(evidence.adapter.path), evidence.tool, evidence.method)
    lower = [read_adapter(adapter_folder(name)) for name in below or ()]
    starts = [read_adapter(adapter_folder(start))] if start else []
    claimed = [] if reference in ("start", "base") or files_only else [read_adapter(adapter_folder(reference))]
    check_files(evidence, lower, starts[0] if starts else None, found)
    base = base or evidence.base
    if base is None:
        found.doubtful("base", "it names no base", advice="Name it with --base.")
        return found
    if (difference := other_base(evidence.adapter.config, base)) is not None:
        found.note("base", difference)
    if files_only:
        found.note("base", "no model was loaded (--files-only): nothing was measured")
        return found
    conversations = _rows(rows, limit, evidence)
    specs = [DatasetSpec(path=pairs, limit=limit)] if pairs is not None else []
    if specs:  # a mistake in the pairs is found before the base is loaded
        load_rows(specs, "dpo", seed=0)
    if evidence.stage is not None and not lower and not starts and evidence.links:
        with suppress(UserError):  # an incomplete chain is a finding of ``check_files``
            chain = chain_of_run(evidence.stage.run, stage=evidence.stage.path.name).adapters[:-1]
            lower, starts = (chain, []) if evidence.is_delta else ([], chain)  # the composed adapter contains them
    loaded = _load(evidence, base, load_in_4bit, found)
    if loaded is None:
        return found
    stack, names = AdapterStack(loaded.model), dict[str, list[str]]()
    groups = {"below": lower, "start": starts, "policy": [evidence.adapter], "claimed": claimed}
    try:
        for kind, adapters in groups.items():
            names[kind] = [f"{kind}{place}" for place, _ in enumerate(adapters)]
            for name, file in zip(names[kind], adapters):
                stack.add_frozen(name, file)
    except UserError as error:
        found.wrong("base", f"it does not fit {base}: {error.message}", advice=error.hint)
        return found
    found.right("base", f"it fits {base}", f"{len(evidence.adapter.modules)} modules, shapes equal")
    under, own = names["below"], names["policy"]
    models = {"base": [], "start": names["start"] or under, "below": under, "policy": under + own}
    models |= {"alone": own} if under else {}
    models |= {reference: names["claimed"]} if claimed else {}
    templates = _templates(evidence, loaded, chat_template, found)
    if not templates:
        return found
    live = LoadedModel(str(evidence.adapter.path), loaded, stack, next(iter(templates.values())), models)
    logger.info("measuring %d conversations under %d templates", len(conversations), len(templates))
    recorded = "own" in templates and evidence.info.get("chat_template") == templates["own"].text
    check_rows(live, templates, recorded, conversations, found)
    if specs:
        settings = evidence.settings if evidence.method == "dpo" else {}
        config = RunConfig(
            max_length=settings.get("max_length") or 1024, max_prompt_length=settings.get("max_prompt_length") or 512
        )
        data = prepare(specs, "dpo", config, live.template, what="pairs")
        logger.info("measuring %d pairs", len(data.lengths))
        documented = evidence.stage is not None and evidence.method == "dpo"
        started = " + ".join(str(file.path) for file in starts or lower) or "the bare base"
        beta = beta or evidence.settings.get("beta") or BETA
        check_pairs(live, data, reference, beta, started, documented, found)
    elif evidence.method == "dpo":
        found.note("reference", "no pairs were given, so step 0 was not measured", advice="Add --pairs FILE.")
    return found


def _load(evidence: Evidence, base: str, load_in_4bit: bool | None, found: Audit) -> Base | None:
    """The base, as in training if that is known. One that is missing or of another architecture is a finding, and None."""
    trained_on = evidence.info.get("base") or {}
    own = base == evidence.base
    if load_in_4bit is None:
        load_in_4bit = trained_on.get("load_in_4bit", True) if own else True
    config = RunConfig(
        model_name_or_path=base,
        load_in_4bit=load_in_4bit,
        bnb_4bit_use_double_quant=trained_on.get("double_quant", True),
    )
    try:
        loaded = load_base(config)
    except UserError as error:
        found.doubtful("base", f"nothing could be measured: {error.message}", advice=error.hint)
        return None
    kind, known = loaded.model.config.model_type, trained_on.get("fingerprint")
    if kind not in FAMILIES:
        found.note("base", f"nothing could be measured on {kind}: supported families are {NAMES}")
        return None
    if own and known is not None and not is_fingerprint_of(known, loaded.path):
        text = f"{loaded.path} is not the model that it was trained on: its files changed since"
        found.wrong("base", text, advice="Restore them.")
    return loaded


def _templates(evidence: Evidence, base: Base, chosen: str | None, found: Audit) -> dict[str, ChatTemplate]:
    """``own`` (saved with it, or chosen) if there is one, the kit's templates, and the base's."""
    folder = evidence.tokenizer_from or base.path
    result: dict[str, ChatTemplate] = {}
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, base.model.get_input_embeddings().weight.shape[0], folder)
    except UserError as error:
        found.wrong("template", error.message, advice=error.hint)
        return {}
    if chosen is not None:
        result["own"] = resolve_template(chosen, tokenizer)
    elif tokenizer.chat_template:
        try:
            result["own"] = resolve_template("auto", tokenizer)
        except UserError as error:
            found.wrong("bos" if "BOS" in error.message else "template", error.message, advice=error.hint)
    else:
        advice = "See below which one fits, and save it with the tokenizer."
        found.doubtful("template", f"{folder}: no chat template was saved with it", advice=advice)
    for name in TEMPLATES:
        with suppress(UserError):  # it cannot be written with this tokenizer, so it was not trained with it
            result[name] = resolve_template(name, load_tokenizer(folder))
    plain = load_tokenizer(base.path)
    if plain.chat_template:
        with suppress(UserError):
            result["base"] = resolve_template("auto", plain)
    return result


def _rows(rows: str | None, limit: int, evidence: Evidence) -> list[Messages]:
    """The named conversations; else the held-out ones of its SFT stage; else the demo's."""
    spec = DatasetSpec(path=rows or str(CONVERSATIONS_TEST))
    if rows is None and evidence.method == "sft" and evidence.settings.get("eval_dataset"):
        spec = DatasetSpec(**evidence.settings["eval_dataset"][0])
    chosen = spec.model_copy(update={"limit": limit})
    return [row["messages"] for row in load_rows([chosen], "sft", seed=0).values()]
