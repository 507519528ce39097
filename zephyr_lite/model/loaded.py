"""One loaded base with the adapters of a run: every model along the chain, by switching adapters."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.load import RunConfig
from ..config.schema import Dtype
from ..data.chat_template import ChatTemplate, resolve_template
from ..errors import UserError
from ..io.run_dir import STAGE_FILE, check_rendering, newest_run
from .adapters import AdapterStack, resolve_frozen_names
from .base import Base, load_base, load_tokenizer
from .base_folder import check_fingerprint
from .chain import Chain, chain_of_adapters, chain_of_run
from .decoder import Decoder
from .tokenizer import check_vocabulary

logger = logging.getLogger(__name__)

BASE = "base"
WHOLE = "model"  # name of a model folder's only model


@dataclass
class LoadedModel:
    """A base, loaded once, and the models that its adapters make of it.

    Attributes:
        source: the stage's folder, the model's folder, or the adapters, for messages.
        base: its ``model`` is wrapped by ``stack``.
        template: the chat template of training: a prompt's ids and the tokens that end an answer.
        models: model → names of the adapters that are on, from the bottom up. A run of two stages has ``base`` [],
            ``sft`` ["sft"] and ``dpo`` ["sft", "dpo"]; a model's folder has only ``model`` [].
        chain: where the adapters come from; None for a model's folder.
    """

    source: str
    base: Base
    stack: AdapterStack
    template: ChatTemplate
    models: dict[str, list[str]]
    chain: Chain | None = None

    @property
    def policy(self) -> str:
        """The model at the top, which was trained last."""
        return list(self.models)[-1]

    @property
    def reference(self) -> str:
        """The model below the policy, where its training started; a model's folder is its own reference."""
        return list(self.models)[max(0, len(self.models) - 2)]

    def decoder(self, model: str) -> Decoder:
        """Log-probabilities of one of the models (families of the fused engine)."""
        return Decoder(self.stack, self.base.dtype, self.models[model])


def open_live(
    source: str | Path | None = None,
    *,
    stage: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    chat_template: str | None = None,
) -> LoadedModel:
    """Load a run's folder (its last complete stage), a stage's folder, a model's folder, or explicit adapters.

    Args:
        source: the folder; None: the newest run under ``runs/`` that has a complete stage (see ``newest_run``).
        stage: of a run's folder.
        adapters: instead of a source: PEFT adapters from the bottom up.
        base: the adapters' base; for a run, where its base is now.
        chat_template: as the configuration's key (auto: the folder's own, or Zephyr's); None: the folder's own.

    Raises:
        UserError: the source is none of these; a stage is not finished, its base or adapters have changed, or there is no
            chat template.
    """
    chain = find_chain(source, stage=stage, adapters=adapters, base=base)
    if chain is not None:
        return live_of(chain, chat_template=chat_template)
    path = Path(str(source)).expanduser()
    loaded = load_base(RunConfig(model_name_or_path=str(path), load_in_4bit=False))
    template = template_of_folder(path, loaded.tokenizer, chat_template)
    return LoadedModel(str(path), loaded, AdapterStack(loaded.model), template, {WHOLE: []})


def find_chain(
    source: str | Path | None,
    *,
    stage: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    option: str = "",
) -> Chain | None:
    """The adapters of a source, not yet loaded; None for a model's folder. Arguments and errors as of ``open_live``; for
    ``option`` see ``newest_run``."""
    if adapters:
        if source is not None or stage is not None:
            raise UserError(
                "--adapter names the chain itself; a run or a stage (--run, --stage) names one too.", "Give one."
            )
        return chain_of_adapters(list(adapters), base)
    if source is None:
        source = newest_run(stage=stage, option=option)
        if source is None:
            raise UserError("runs: no run there has a complete stage.", "Train one first, or name a run's folder.")
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        if stage is not None or base is not None:
            raise UserError(f"{path}: is a model's folder, without stages or a base.", "Leave --stage and --base out.")
        return None
    if (path / STAGE_FILE).is_file():
        if stage not in (None, path.name):
            raise UserError(
                f"{path}: is the stage {path.name}, and --stage says {stage}.", f"Give the run: {path.parent}"
            )
        path, stage = path.parent, path.name
    return chain_of_run(path, stage=stage, base=base)


def live_of(chain: Chain, *, chat_template: str | None = None, dtype: Dtype = "auto") -> LoadedModel:
    """Load the base of a chain as its stage trained on it, and put every adapter on it, frozen.

    Args:
        chain: base and adapters.
        chat_template: see ``open_live``.
        dtype: the compute dtype, as the configuration's key.
    """
    for note in chain.notes:
        logger.info(note)
    described = chain.base
    config = RunConfig(
        model_name_or_path=described["name_or_path"],
        model_revision=described.get("revision", "main"),
        load_in_4bit=described.get("load_in_4bit", True),
        bnb_4bit_use_double_quant=described.get("double_quant", True),
        dtype=dtype,
        engine=chain.info.get("engine", "fused"),  # which decides what architectures are known
    )
    base = load_base(config)
    check_fingerprint(described.get("fingerprint"), base.path, chain.source)
    folder = chain.tokenizer_from or base.path
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, base.model.get_input_embeddings().weight.shape[0], folder)
    template = template_of_folder(folder, tokenizer, chat_template)
    if chain.info and chat_template in (None, "auto"):
        check_rendering(chain.info, Path(chain.source), template.text, template.tokenizer)
    stack = AdapterStack(base.model)
    models: dict[str, list[str]] = {BASE: []}
    for name, adapter in zip(resolve_frozen_names([a.path for a in chain.adapters]), chain.adapters):
        stack.add_frozen(name, adapter)
        models[name] = list(stack.names)
    return LoadedModel(chain.source, base, stack, template, models, chain)


def template_of_folder(folder: Path, tokenizer: Any, choice: str | None = None) -> ChatTemplate:
    """The chat template saved in a folder, or the chosen one."""
    if choice is None and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{folder}: its tokenizer has no chat template.",
            "Choose the one of its training with --chat-template: zephyr, chatml, llama3, or a .jinja file.",
        )
    return resolve_template(choice or "auto", tokenizer)
