"""The adapter under audit on its base, with the adapters that it is combined or compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.load import RunConfig
from ..errors import UserError
from ..model.adapters import AdapterStack
from ..model.base import Base, is_fingerprint_of, load_base
from ..model.chain import chain_of_run
from ..model.decoder import Decoder
from ..model.families import FAMILIES, NAMES
from ..model.peft_io import AdapterFile, read_adapter
from .evidence import Evidence, adapter_folder
from .verdict import Audit

OWN = "adapter"


@dataclass
class Request:
    """The options of the command.

    Attributes:
        adapter: a folder (PEFT's, a stage's, a run's), or a hub id.
        base: instead of the one that it names.
        below: adapters below it, from the bottom up.
        start: the adapter that it was continued from, and therefore contains.
        reference: the claimed reference: ``start`` (what it started from), ``base``, or an adapter.
        rows, pairs: files or hub ids; None: its own held-out rows, or the demo's; no pairs.
        beta: of DPO; None: its own, or TRL's default.
        chat_template: instead of the saved one.
        limit: number of rows, and of pairs.
        load_in_4bit: None: as in training if known, else in 4 bits.
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
        policy, start, below: names of the adapters of the finished model, of the start of training, and below the adapter.
        references: name of a possible reference → its adapters.
        claimed: the claimed one.
        folders: name of an adapter → its folder.
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
        """The folders of some adapters."""
        return " + ".join(self.folders[name] for name in names) or "the bare base"

    def decoder(self, names: Sequence[str]) -> Decoder:
        return Decoder(self.stack, self.base.dtype, list(names))


def load_subject(
    request: Request, evidence: Evidence, base: str, below: list[AdapterFile], start: AdapterFile | None, found: Audit
) -> Subject | None:
    """Load the base and attach every adapter. A base that is missing or does not fit is a finding, and None is returned.

    Args:
        below: the adapters below it; [] takes them from the adapter's own stage.
        start: the adapter that it was continued from, as claimed.

    Raises:
        UserError: the claimed reference is no adapter, or does not fit.
    """
    described = evidence.info.get("base") or {}
    in_4bit = request.load_in_4bit
    if in_4bit is None:
        in_4bit = described.get("load_in_4bit", True) if request.base is None else True
    double_quant = bool(described.get("double_quant", True))
    config = RunConfig(model_name_or_path=base, load_in_4bit=in_4bit, bnb_4bit_use_double_quant=double_quant)
    try:
        loaded = load_base(config)
    except UserError as error:
        found.doubtful("base", f"nothing could be measured: {error.message}", advice=error.hint)
        return None
    kind = loaded.model.config.model_type
    if kind not in FAMILIES:
        found.note("base", f"nothing could be measured on {kind}: supported families are {NAMES}")
        return None
    known = described.get("fingerprint")
    if request.base is None and known is not None and not is_fingerprint_of(known, loaded.path):
        text = f"{loaded.path} is not the model that it was trained on: its files changed since"
        found.wrong("base", text, advice="Restore them.")
    lower, starts = list(below), [start] if start is not None else []
    if evidence.stage is not None and not below and start is None and evidence.links:
        try:
            chain = chain_of_run(evidence.stage.run, stage=evidence.stage.path.name).adapters[:-1]
        except UserError:
            chain = []  # a finding of ``check_below``
        if evidence.is_delta:
            lower = chain
        else:
            starts = chain  # the composed adapter contains them
    stack = AdapterStack(loaded.model)
    folders: dict[str, str] = {}

    def attach(kind: str, adapters: Sequence[AdapterFile]) -> list[str]:
        names = [f"{kind}{place}" for place in range(len(adapters))]
        for name, adapter in zip(names, adapters):
            stack.add_frozen(name, adapter)
            folders[name] = str(adapter.path)
        return names

    try:
        below_names, start_names = attach("below", lower), attach("start", starts)
        stack.add_frozen(OWN, evidence.adapter)
    except UserError as error:
        found.wrong("base", f"it does not fit {base}: {error.message}", advice=error.hint)
        return None
    found.right("base", f"it fits {base}", f"{len(evidence.adapter.modules)} modules, shapes equal")
    start_names = start_names or below_names
    references = {"start": start_names, "base": []}
    if request.reference not in references:
        references[request.reference] = attach("reference", [read_adapter(adapter_folder(request.reference))])
    policy = [*below_names, OWN]
    return Subject(evidence, loaded, stack, policy, start_names, below_names, references, request.reference, folders)
