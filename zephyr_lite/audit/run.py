"""``zephyr-lite check``: an adapter of any tool, what has to lie below it, and whether it was trained as it claims."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from ..config.load import DatasetSpec, RunConfig
from ..data.chat_template import ChatTemplate, resolve_template
from ..data.dataset import TokenizedDataset, prepare
from ..data.load import load_rows
from ..data.templates import NEEDED_TOKENS, TEMPLATES
from ..demo import CONVERSATIONS_TEST
from ..errors import UserError
from ..model.base import load_tokenizer
from ..model.peft_config import other_base
from ..model.peft_io import read_adapter
from ..model.tokenizer import check_vocabulary
from . import questions
from .evidence import Evidence, adapter_folder, gather
from .files import check_chain, check_log, check_start, check_weights
from .measured import Messages
from .subject import Request, Subject, load_subject
from .verdict import Audit, Level

Say = Callable[[str], None]
BETA = 0.1  # TRL's default


def audit(request: Request, say: Say = lambda line: None) -> Audit:
    """Look at the files, then load the base and measure.

    Raises:
        UserError: there is no such adapter, or rows or pairs that were named cannot be read. A base that is not there,
            or that the adapter does not fit, is a finding.
    """
    if request.start is not None and request.below:
        raise UserError(
            "--start names what it was continued from, --below what lay under it.",
            "Give one: an adapter that was continued holds the other; one that was stacked does not.",
        )
    evidence = gather(request.adapter)
    found = Audit(str(evidence.path), evidence.tool, evidence.method)
    below = [read_adapter(adapter_folder(name)) for name in request.below]
    start = read_adapter(adapter_folder(request.start)) if request.start else None
    if request.beta is not None and request.beta <= 0:
        raise UserError(f"--beta {request.beta:g}: DPO's beta is above 0.", "Leave it out for its own, or 0.1.")
    if not request.files_only:  # before anything is loaded
        if request.reference not in ("start", "base"):
            read_adapter(adapter_folder(request.reference))
        rows = _rows(request, evidence, say)
        if request.pairs is not None:
            load_rows([DatasetSpec(path=request.pairs, limit=request.limit)], "dpo", seed=0)
    check_weights(evidence, found)
    check_chain(evidence, below, found)
    if start is not None:
        check_start(evidence, start, found)
    check_log(evidence, found)
    base = request.base or evidence.base
    if base is None:
        found.add("base", Level.doubtful, "it names no base", advice="Say which one with --base.")
        return found
    if (told := other_base(evidence.adapter.config, base)) is not None:
        found.add("base", Level.note, told)
    if request.files_only:
        found.add("base", Level.note, "no model was loaded (--files-only): nothing of this was measured")
        return found
    subject = load_subject(request, evidence, base, below, start, found, say)
    if subject is None:
        return found
    templates = _templates(request, subject, found)
    own = templates.get("own")
    if templates:
        questions.ask_rows(subject, templates, rows, found, say)
    if request.pairs is not None:
        best = own or next(iter(templates.values()), None)
        if best is None:
            raise UserError("no chat template fits, so the pairs cannot be rendered.", "Name one with --chat-template.")
        beta = request.beta if request.beta is not None else float(evidence.settings.get("beta") or BETA)
        questions.ask_pairs(subject, _pairs(request, evidence, best), beta, found, say)
    elif evidence.method == "dpo":
        found.add(
            "reference", Level.note, "no pairs were given, so step 0 was not measured", advice="Add --pairs FILE."
        )
    return found


def _templates(request: Request, subject: Subject, found: Audit) -> dict[str, ChatTemplate]:
    """``own`` (the one that is saved with it, or asked for) where there is one, the base's, and those of the kit."""
    evidence = subject.evidence
    folder = evidence.tokenizer_from or subject.base.path
    result: dict[str, ChatTemplate] = {}
    try:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, subject.base.model.get_input_embeddings().weight.shape[0], folder)
    except UserError as error:
        found.add("template", Level.wrong, error.message, advice=error.hint or "")
        return {}
    if request.chat_template is not None or tokenizer.chat_template:
        try:
            result["own"] = resolve_template(request.chat_template or "auto", tokenizer)
        except UserError as error:
            if request.chat_template is not None:
                raise  # the user's choice, and nothing that the adapter has done
            topic = "bos" if "BOS" in error.message else "template"
            found.add(topic, Level.wrong, error.message, advice=error.hint or "")
    else:
        found.add(
            "template",
            Level.doubtful,
            f"{folder}: no chat template was saved with it",
            advice="See below which one fits, and save it with the tokenizer.",
        )
    for name in TEMPLATES:
        fresh = load_tokenizer(folder)  # resolve_template sets the template on the tokenizer
        if set(NEEDED_TOKENS[name]) <= set(fresh.get_vocab()):
            try:
                result[name] = resolve_template(name, fresh)
            except UserError:
                continue  # cannot be written with this tokenizer, so it was not trained with it
    plain = load_tokenizer(subject.base.path)
    if plain.chat_template:
        with suppress(UserError):  # a template that cannot be trained with is no candidate
            result["base"] = resolve_template("auto", plain)
    return result


def _rows(request: Request, evidence: Evidence, say: Say) -> list[Messages]:
    """Conversations: those that are named, its own held-out ones where it is an SFT stage of ours, else the demo's."""
    specs = [DatasetSpec(path=request.rows, limit=request.limit)] if request.rows is not None else []
    if not specs and evidence.method == "sft" and evidence.settings.get("eval_dataset"):
        try:
            config = RunConfig.model_validate(evidence.settings)
            specs = [spec.model_copy(update={"limit": request.limit}) for spec in config.eval_dataset[:1]]
            return _messages(specs)
        except (UserError, OSError, ValueError) as error:
            say(f"its own held-out rows cannot be read ({str(error).splitlines()[0]}); taking the demo's")
            specs = []
    return _messages(specs or [DatasetSpec(path=str(CONVERSATIONS_TEST), limit=request.limit)])


def _messages(specs: list[DatasetSpec]) -> list[Messages]:
    return [row["messages"] for row in load_rows(specs, "sft", seed=0).values()]


def _pairs(request: Request, evidence: Evidence, template: ChatTemplate) -> TokenizedDataset:
    length = evidence.settings.get("max_length") if evidence.method == "dpo" else None
    config = RunConfig(
        max_length=int(length or 1024), max_prompt_length=int(evidence.settings.get("max_prompt_length") or 512)
    )
    assert request.pairs is not None
    return prepare([DatasetSpec(path=request.pairs, limit=request.limit)], "dpo", config, template, what="pairs")
