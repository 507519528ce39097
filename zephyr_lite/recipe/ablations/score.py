"""How an arm does on the held-out rows: one loaded base, and the adapters of whichever arm is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ...config.load import Method, RunConfig
from ...data.chat_template import ChatTemplate, resolve_template
from ...data.dataset import TokenizedDataset, prepare
from ...errors import UserError
from ...evaluate.likelihood import PairLogps, chat_loss, pair_logps
from ...io.run_dir import StageDir
from ...model.adapters import AdapterStack
from ...model.base import is_fingerprint_of, load_base, load_tokenizer
from ...model.chain import Chain, chain_of_run
from ...model.decoder import Decoder
from .table import ArmStage, Table


@dataclass(frozen=True)
class Score:
    """Where a model stands on the held-out rows.

    Attributes:
        chat_loss: nats a supervised token.
        accuracy: share of pairs whose chosen response gained more log-probability over the bare base than the rejected
            one (a tie is no success), and its standard error; None for the base itself.
        margin: mean over the pairs of that difference, in nats, and its standard error.
        likelier: share of pairs whose chosen response has the higher mean log-probability a token.
        own_accuracy, own_margin: a DPO stage's own last evaluation, against its own reference.
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


class Scores:
    """Scores the arms of a table whose stages are finished.

    Raises:
        UserError: a stage is not finished, its adapters were changed, or held-out rows cannot be read.
    """

    def __init__(self, table: Table, say: Callable[[str], None]) -> None:
        self.table, self.say = table, say
        self.chains = {arm: chain_of_run(table.run, stage=stages[-1].name) for arm, stages in table.arms.items()}
        first = next(iter(self.chains.values()))
        config = next(iter(table.arms.values()))[0].loaded.config
        base = load_base(config, say=say)
        for arm, chain in self.chains.items():
            if not is_fingerprint_of(chain.base["fingerprint"], base.path):
                raise UserError(
                    f"arm {arm!r} was trained on other weights of {chain.base['name_or_path']} than {base.path} holds.",
                    "Restore them, or choose another folder with --out.",
                )
        self.dtype = base.dtype
        self.stack = AdapterStack(base.model)
        self.names: dict[str, str] = {}  # an adapter's hash → its name in the stack
        self._data: dict[str, tuple[TokenizedDataset, TokenizedDataset]] = {}
        self._base_logps: dict[str, PairLogps] = {}
        self.template = self._template(first)
        conversations, pairs = self._held_out(self.template)
        self.conversations, self.pairs = len(conversations.lengths), len(pairs.lengths)

    def base(self) -> Score:
        """The bare base, with the first arm's template."""
        conversations, _ = self._held_out(self.template)
        self.say("scoring the base")
        logps = self._reference(self.template)
        return Score(chat_loss(self._decoder([]), conversations), _likelier(logps))

    def arm(self, arm: str) -> Score:
        """One arm: everything that its chain of adapters changed."""
        chain = self.chains[arm]
        template = self._template(chain)
        conversations, pairs = self._held_out(template)
        reference = self._reference(template)
        self.say(f"scoring {arm}")
        for place, adapter in enumerate(chain.adapters):
            if adapter.sha256 not in self.names:
                name = f"{len(self.names)}-{arm if place == len(chain.adapters) - 1 else 'below'}"
                self.names[adapter.sha256] = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
                self.stack.add_frozen(self.names[adapter.sha256], adapter)
        decoder = self._decoder([self.names[adapter.sha256] for adapter in chain.adapters])
        logps = pair_logps(decoder, pairs)
        gained = logps.sums - reference.sums
        margins = gained[:, 0] - gained[:, 1]
        won = (margins > 0).double()
        evaluation = own_evaluation(self.table.arms[arm][-1], StageDir(self.table.run / self.table.arms[arm][-1].name))
        return Score(
            chat_loss=chat_loss(decoder, conversations),
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

    def _reference(self, template: ChatTemplate) -> PairLogps:
        if template.text not in self._base_logps:
            self._base_logps[template.text] = pair_logps(self._decoder([]), self._held_out(template)[1])
        return self._base_logps[template.text]

    def _held_out(self, template: ChatTemplate) -> tuple[TokenizedDataset, TokenizedDataset]:
        """Conversations and pairs; with the lengths that the stages trained on."""
        if template.text not in self._data:
            stages = self.table.stages()
            self._data[template.text] = (
                prepare([self.table.chat], "sft", held_out_config(stages, "sft"), template, what="held-out"),
                prepare([self.table.preferences], "dpo", held_out_config(stages, "dpo"), template, what="held-out"),
            )
            for data in self._data[template.text]:
                for line in data.report.lines():
                    self.say(line)
        return self._data[template.text]

    def _template(self, chain: Chain) -> ChatTemplate:
        assert chain.tokenizer_from is not None  # every stage of ours saves its tokenizer
        return resolve_template("auto", load_tokenizer(chain.tokenizer_from))


def own_evaluation(stage: ArmStage, folder: StageDir) -> dict[str, float]:
    """The last evaluation of a stage; {} where it held nothing out."""
    evaluations = ((folder.info() or {}).get("result") or {}).get("evaluations") or [{}]
    return evaluations[-1] if stage.method == "dpo" else {}


def held_out_config(stages: list[ArmStage], method: Method) -> RunConfig:
    """The configuration that held-out rows are read with: the first stage's of this method, or the recipe's."""
    found = next((stage.loaded.config for stage in stages if stage.method == method), None)
    return found or RunConfig(max_length=2048 if method == "sft" else 1024)


def _likelier(logps: PairLogps) -> float:
    means = logps.means()
    return (means[:, 0] > means[:, 1]).double().mean().item()


def _standard_error(values: Tensor) -> float | None:
    if len(values) < 2:
        return None
    return (torch.std(values) / len(values) ** 0.5).item()
