"""Scores of the arms on the held-out rows: one base in memory, the arms' adapters switched on and off."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...config.load import Method, RunConfig
from ...data.chat_template import ChatTemplate, resolve_template
from ...data.dataset import TokenizedDataset, prepare
from ...errors import UserError
from ...evaluate.likelihood import Logps, chat_loss, row_logps
from ...io.run_dir import StageDir
from ...model.adapters import AdapterStack
from ...model.base import is_fingerprint_of, load_base, load_tokenizer
from ...model.chain import Chain, chain_of_run
from ...model.decoder import Decoder
from .table import ArmStage, Table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Score:
    """A model's scores on the held-out rows.

    Attributes:
        chat_loss: nats a supervised token.
        likelier: share of pairs whose chosen response has the higher mean log-probability a token.
        accuracy: share of pairs whose chosen response gained more log-probability over the bare base than the rejected one
            (a tie does not count), with its standard error; None for the base.
        margin: mean of that difference in nats, with its standard error.
        own_accuracy, own_margin: a DPO stage's last evaluation against its own reference.
    """

    chat_loss: float
    likelier: float
    accuracy: float | None = None
    accuracy_error: float | None = None
    margin: float | None = None
    margin_error: float | None = None
    own_accuracy: float | None = None
    own_margin: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass
class _HeldOut:
    """The held-out rows in one template's format, and the base's log-probabilities of the pairs."""

    conversations: TokenizedDataset
    pairs: TokenizedDataset
    reference: Logps


class Scores:
    """Scores the arms of a table whose stages are finished.

    Raises:
        UserError: a stage is not finished, its adapters were changed, or held-out rows cannot be read.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.chains = {arm: chain_of_run(table.run, stage=stages[-1].name) for arm, stages in table.arms.items()}
        base = load_base(table.stages()[0].loaded.config)
        for arm, chain in self.chains.items():
            if not is_fingerprint_of(chain.base["fingerprint"], base.path):
                raise UserError(
                    f"arm {arm!r} was trained on other weights of {chain.base['name_or_path']} than those in {base.path}.",
                    "Restore them, or choose another folder with --out.",
                )
        self.dtype = base.dtype
        self.stack = AdapterStack(base.model)
        self._names: dict[str, str] = {}  # an adapter's hash → its name in the stack
        self._rows: dict[str, _HeldOut] = {}  # by template
        self._first = self._held_out(next(iter(self.chains.values())))
        self.conversations, self.pairs = len(self._first.conversations.lengths), len(self._first.pairs.lengths)

    def base(self) -> Score:
        """The bare base, with the first arm's template."""
        logger.info("scoring the base")
        return Score(chat_loss(self._decoder([]), self._first.conversations), _likelier(self._first.reference))

    def arm(self, arm: str) -> Score:
        """One arm, with all adapters of its chain."""
        chain = self.chains[arm]
        rows = self._held_out(chain)
        logger.info(f"scoring {arm}")
        for adapter in chain.adapters:
            if adapter.sha256 not in self._names:
                self._names[adapter.sha256] = f"adapter{len(self._names)}"
                self.stack.add_frozen(self._names[adapter.sha256], adapter)
        decoder = self._decoder([self._names[adapter.sha256] for adapter in chain.adapters])
        logps = row_logps(decoder, rows.pairs)
        gained = logps.sums - rows.reference.sums
        margins = gained[:, 0] - gained[:, 1]
        won = (margins > 0).double()
        evaluation = self._own_evaluation(self.table.arms[arm][-1])
        return Score(
            chat_loss=chat_loss(decoder, rows.conversations),
            likelier=_likelier(logps),
            accuracy=won.mean().item(),
            accuracy_error=_standard_error(won),
            margin=margins.mean().item(),
            margin_error=_standard_error(margins),
            own_accuracy=evaluation.get("eval_rewards/accuracies"),
            own_margin=evaluation.get("eval_rewards/margins"),
        )

    def _decoder(self, names: list[str]) -> Decoder:
        return Decoder(self.stack, self.dtype, names)

    def _held_out(self, chain: Chain) -> _HeldOut:
        assert chain.tokenizer_from is not None  # every stage saves its tokenizer
        template = resolve_template("auto", load_tokenizer(chain.tokenizer_from))
        if template.text not in self._rows:
            conversations, pairs = self._prepare("sft", template), self._prepare("dpo", template)
            self._rows[template.text] = _HeldOut(conversations, pairs, row_logps(self._decoder([]), pairs))
        return self._rows[template.text]

    def _prepare(self, method: Method, template: ChatTemplate) -> TokenizedDataset:
        spec = self.table.chat if method == "sft" else self.table.preferences
        data = prepare([spec], method, held_out_config(self.table.stages(), method), template, what="held-out")
        for line in data.report.lines():
            logger.info(line)
        return data

    def _own_evaluation(self, stage: ArmStage) -> dict[str, float]:
        """The last evaluation of a DPO stage; {} without held-out rows."""
        info = StageDir(self.table.run / stage.name).info() or {}
        evaluations = (info.get("result") or {}).get("evaluations") or [{}]
        return evaluations[-1] if stage.method == "dpo" else {}


def held_out_config(stages: list[ArmStage], method: Method) -> RunConfig:
    """The configuration to read held-out rows with: the first stage's of this method, or the recipe's."""
    found = next((stage.loaded.config for stage in stages if stage.method == method), None)
    return found or RunConfig(max_length=2048 if method == "sft" else 1024)


def _likelier(logps: Logps) -> float:
    means = logps.means()
    return (means[:, 0] > means[:, 1]).double().mean().item()


def _standard_error(values: Tensor) -> float | None:
    return (torch.std(values) / len(values) ** 0.5).item() if len(values) > 1 else None
