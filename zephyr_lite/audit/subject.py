"""What is audited: the adapter on its base, with everything that it may stand on or be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .verdict import Audit, Level

Say = Callable[[str], None]
OWN = "adapter"


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


def load_subject(
    request: Request,
    evidence: Evidence,
    base: str,
    below: list[AdapterFile],
    start: AdapterFile | None,
    found: Audit,
    say: Say,
) -> Subject | None:
    """Load the base and put every adapter on it; what cannot be measured on is a finding, and None.

    Args:
        base: its name.
        below: what was given as lying below; [] takes it from the stage of ours that the adapter lies in.
        start: what it was continued from, as is claimed.

    Raises:
        UserError: the claimed reference is no adapter, or does not fit.
    """
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
        kind = loaded.model.config.model_type
        found.add("base", Level.note, f"nothing could be measured on {kind}: the decoder knows the families {NAMES}")
        return None
    known = (described or {}).get("fingerprint")
    if request.base is None and known is not None and not is_fingerprint_of(known, loaded.path):
        found.add(
            "base",
            Level.wrong,
            f"{loaded.path} is not the model that it was trained on: its files changed since",
            advice="Restore them.",
        )
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
