"""``zephyr-lite check``: audits an adapter of any tool: the adapters below it, its reference, BOS, end token, template."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import NEEDED_TOKENS, TEMPLATES, ChatTemplate, resolve_template
from ..data.dataset import prepare
from ..data.load import load_rows
from ..errors import UserError
from ..model.base import load_tokenizer
from ..model.peft_io import other_base, read_adapter
from ..model.tokenizer import check_vocabulary
from .evidence import Evidence, adapter_folder, gather
from .files import check_below, check_log, check_start, check_weights
from .measured import Messages
from .measurements import check_pairs, check_rows
from .subject import Request, Subject, load_subject
from .verdict import Audit

logger = logging.getLogger(__name__)

BETA = 0.1  # TRL's default
DEMO_ROWS = Path(__file__).parents[1] / "demo" / "conversations_test.jsonl"


def audit(request: Request) -> Audit:
    """Check the files, then load the base and measure.

    Raises:
        UserError: there is no such adapter, or the rows or pairs cannot be read. A base that is missing or does not fit is a
            finding.
    """
    if request.start is not None and request.below:
        raise UserError(
            "--start names what it was continued from, --below what was below it.",
            "Give one: an adapter that was continued contains the other; one that was stacked does not.",
        )
    if request.beta is not None and request.beta <= 0:
        raise UserError(f"--beta {request.beta:g}: DPO's beta is above 0.", "Leave it out for its own, or 0.1.")
    evidence = gather(request.adapter)
    found = Audit(str(evidence.path), evidence.tool, evidence.method)
    below = [read_adapter(adapter_folder(name)) for name in request.below]
    start = read_adapter(adapter_folder(request.start)) if request.start else None
    pairs = [DatasetSpec(path=request.pairs, limit=request.limit)] if request.pairs is not None else []
    rows: list[Messages] = []
    if not request.files_only:  # before anything is loaded
        if request.reference not in ("start", "base"):
            read_adapter(adapter_folder(request.reference))
        rows = _rows(request, evidence)
        if pairs:
            load_rows(pairs, "dpo", seed=0)
    check_weights(evidence, found)
    check_below(evidence, below, found)
    if start is not None:
        check_start(evidence, start, found)
    check_log(evidence, found)
    base = request.base or evidence.base
    if base is None:
        found.doubtful("base", "it names no base", advice="Name it with --base.")
        return found
    if (difference := other_base(evidence.adapter.config, base)) is not None:
        found.note("base", difference)
    if request.files_only:
        found.note("base", "no model was loaded (--files-only): nothing was measured")
        return found
    subject = load_subject(request, evidence, base, below, start, found)
    if subject is None:
        return found
    templates = _templates(request, subject, found)
    if templates:
        logger.info(f"measuring {len(rows)} conversations under {len(templates)} templates")
        check_rows(subject, templates, rows, found)
    if pairs:
        template = templates.get("own") or next(iter(templates.values()), None)
        if template is None:
            raise UserError("no chat template fits, so the pairs cannot be rendered.", "Name one with --chat-template.")
        settings = evidence.settings if evidence.method == "dpo" else {}
        config = RunConfig(
            max_length=int(settings.get("max_length") or 1024),
            max_prompt_length=int(evidence.settings.get("max_prompt_length") or 512),
        )
        beta = request.beta if request.beta is not None else float(evidence.settings.get("beta") or BETA)
        data = prepare(pairs, "dpo", config, template, what="pairs")
        logger.info(f"measuring {len(data.lengths)} pairs")
        check_pairs(subject, data, beta, found)
    elif evidence.method == "dpo":
        found.note("reference", "no pairs were given, so step 0 was not measured", advice="Add --pairs FILE.")
    return found


def _templates(request: Request, subject: Subject, found: Audit) -> dict[str, ChatTemplate]:
    """``own`` (saved with it, or requested) if there is one, the kit's templates, and the base's."""
    folder = subject.evidence.tokenizer_from or subject.base.path
    result: dict[str, ChatTemplate] = {}
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, subject.base.model.get_input_embeddings().weight.shape[0], folder)
    except UserError as error:
        found.wrong("template", error.message, advice=error.hint)
        return {}
    if request.chat_template is not None:
        result["own"] = resolve_template(request.chat_template, tokenizer)
    elif tokenizer.chat_template:
        try:
            result["own"] = resolve_template("auto", tokenizer)
        except UserError as error:
            found.wrong("bos" if "BOS" in error.message else "template", error.message, advice=error.hint)
    else:
        advice = "See below which one fits, and save it with the tokenizer."
        found.doubtful("template", f"{folder}: no chat template was saved with it", advice=advice)
    for name in TEMPLATES:
        fresh = load_tokenizer(folder)  # resolve_template sets the template on the tokenizer
        if set(NEEDED_TOKENS[name]) <= set(fresh.get_vocab()):
            with suppress(UserError):  # it cannot be written with this tokenizer, so it was not trained with it
                result[name] = resolve_template(name, fresh)
    plain = load_tokenizer(subject.base.path)
    if plain.chat_template:
        with suppress(UserError):
            result["base"] = resolve_template("auto", plain)
    return result


def _rows(request: Request, evidence: Evidence) -> list[Messages]:
    """The named conversations; else the held-out ones of its SFT stage; else the demo's."""
    specs = [DatasetSpec(path=str(request.rows or DEMO_ROWS), limit=request.limit)]
    if request.rows is None and evidence.method == "sft" and evidence.settings.get("eval_dataset"):
        try:
            own = RunConfig.model_validate(evidence.settings).eval_dataset[:1]
            return _messages([spec.model_copy(update={"limit": request.limit}) for spec in own])
        except (UserError, OSError, ValueError) as error:
            logger.warning(f"its own held-out rows cannot be read ({str(error).splitlines()[0]}); taking the demo's")
    return _messages(specs)


def _messages(specs: list[DatasetSpec]) -> list[Messages]:
    return [row["messages"] for row in load_rows(specs, "sft", seed=0).values()]
