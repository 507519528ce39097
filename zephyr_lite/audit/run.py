"""``zephyr-lite check``: an adapter of any tool, what has to lie below it, and whether it was trained as it claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..config import DatasetSpec, RunConfig
from ..data.chat import ChatTemplate, resolve_template
from ..data.prepare import Prepared, prepare
from ..data.sources import load_rows
from ..data.templates import NEEDED_TOKENS, TEMPLATES
from ..demo import CONVERSATIONS_TEST
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.chain import chain_of_run
from ..model.decoder import Decoder
from ..model.load import FAMILIES, Base, load_base, load_tokenizer
from ..model.peft_config import other_base
from ..model.peft_files import AdapterFile, read_adapter
from . import questions
from .evidence import Evidence, adapter_folder, gather
from .files import check_chain, check_log, check_start, check_weights
from .measured import Messages
from .verdict import Audit, Level

Say = Callable[[str], None]
OWN = "adapter"
BETA = 0.1  # TRL's default


@dataclass
class Request:
    """What is asked for, as the command's options.

    Attributes:
        adapter: a folder (PEFT's, a stage's, a run's), or a hub id.
        base: instead of the one that it names.
        below: adapters that lie below it, from the bottom up.
        start: the adapter that it was continued from, and therefore holds.
        reference: what it was trained against, as is claimed: ``start`` (what it started from), ``base``, or an adapter.
        rows, pairs: files or hub ids; None: its own held-out rows, or the demo's; no pairs.
        beta: of DPO; None: its own, or TRL's default.
        chat_template: instead of the one that it was saved with.
        limit: rows and pairs to measure on.
        load_in_4bit: None: as it was trained, where that is known, else in 4 bits.
        files_only: load no model.
    """

    adapter: str
    base: str | None = None
    below: Sequence[str] = ()
    start: str | None = None
    reference: str = "start"
    rows: str | None = None
    pairs: str | None = None
    beta: float | None = None
    chat_template: str | None = None
    limit: int = 16
    load_in_4bit: bool | None = None
    files_only: bool = False


@dataclass
class Subject:
    """An adapter on its base.

    Attributes:
        policy, start, below: names of the adapters that are on: in the finished model, in what training started from,
            and beneath the adapter itself (which is what its own weights changed).
        references: name of a possible reference → its adapters.
        claimed: the one that is claimed.
        folders: name of an adapter → where it lies.
    """

    evidence: Evidence
    base: Base
    stack: AdapterStack
    policy: list[str]
    start: list[str]
    below: list[str]
    references: dict[str, list[str]]
    claimed: str
    folders: dict[str, str]

    def called(self, names: Sequence[str]) -> str:
        """As a user knows them."""
        return " + ".join(self.folders[name] for name in names) or "the bare base"

    def decoder(self, names: Sequence[str]) -> Decoder:
        return Decoder(self.stack, self.base.dtype, list(names))


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
    subject = _load(request, evidence, base, below, start, found, say)
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


def _load(
    request: Request,
    evidence: Evidence,
    base: str,
    below: list[AdapterFile],
    start: AdapterFile | None,
    found: Audit,
    say: Say,
) -> Subject | None:
    described = evidence.info.get("base") if isinstance(evidence.info.get("base"), dict) else {}
    stored = described.get("load_in_4bit") if request.base is None and described else None
    in_4bit = request.load_in_4bit if request.load_in_4bit is not None else stored if stored is not None else True
    config = RunConfig(
        model_name_or_path=base,
        load_in_4bit=in_4bit,
        bnb_4bit_use_double_quant=bool((described or {}).get("double_quant", True)),
    )
    try:
        loaded = load_base(config, say=say)
    except UserError as error:
        found.add("base", Level.doubtful, f"nothing could be measured: {error.message}", advice=error.hint or "")
        return None
    if loaded.model.config.model_type not in FAMILIES:
        found.add("base", Level.note, f"nothing could be measured on {loaded.model.config.model_type}: the decoder knows "
                  "Mistral's and Llama's architecture")  # fmt: skip
        return None
    known = (described or {}).get("fingerprint")
    if request.base is None and known is not None and known != loaded.fingerprint:
        found.add("base", Level.wrong, f"{loaded.path} is not the model that it was trained on: its files changed since",
                  advice="Restore them.")  # fmt: skip
    lower, own_start = list(below), [start] if start is not None else []
    if evidence.stage is not None and not below and start is None and evidence.links():
        try:
            chain = chain_of_run(evidence.stage.run, stage=evidence.stage.path.name)
        except UserError:
            chain = None  # check_chain has said so
        if chain is not None and evidence.is_delta():
            lower = chain.adapters[:-1]
        elif chain is not None:
            own_start = chain.adapters[:-1]  # the composed adapter holds them
    stack = AdapterStack(loaded.model)
    try:
        names = _attach(stack, "below", lower)
        starts = _attach(stack, "start", own_start)
        _attach(stack, OWN, [evidence.adapter])
    except UserError as error:
        found.add("base", Level.wrong, f"it does not fit {base}: {error.message}", advice=error.hint or "")
        return None
    found.add("base", Level.right, f"it fits {base}", f"{len(evidence.adapter.modules)} modules, shapes equal")
    references = {"start": starts or names, "base": []}
    claimed = request.reference
    if claimed not in references:
        references[claimed] = _attach(stack, "reference", [read_adapter(adapter_folder(claimed))])
    folders = dict(zip([*names, *starts], [str(adapter.path) for adapter in [*lower, *own_start]]))
    return Subject(evidence, loaded, stack, [*names, OWN], starts or names, names, references, claimed, folders)


def _attach(stack: AdapterStack, kind: str, adapters: Sequence[AdapterFile]) -> list[str]:
    names = []
    for place, adapter in enumerate(adapters):
        name = kind if kind == OWN else f"{kind}{place}"
        stack.add_frozen(name, adapter)
        names.append(name)
    return names


def _templates(request: Request, subject: Subject, found: Audit) -> dict[str, ChatTemplate]:
    """``own`` (the one that is saved with it, or asked for) where there is one, the base's, and those of the kit."""
    evidence = subject.evidence
    folder = evidence.tokenizer_from or subject.base.path
    result: dict[str, ChatTemplate] = {}
    try:
        tokenizer = load_tokenizer(folder)
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
        found.add("template", Level.doubtful, f"{folder}: no chat template was saved with it",
                  advice="See below which one fits, and save it with the tokenizer.")  # fmt: skip
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
    return list(load_rows(specs, "sft", seed=0).dataset["messages"])


def _pairs(request: Request, evidence: Evidence, template: ChatTemplate) -> Prepared:
    length = evidence.settings.get("max_length") if evidence.method == "dpo" else None
    config = RunConfig(
        max_length=int(length or 1024), max_prompt_length=int(evidence.settings.get("max_prompt_length") or 512)
    )
    assert request.pairs is not None
    return prepare([DatasetSpec(path=request.pairs, limit=request.limit)], "dpo", config, template, what="pairs")
