"""A stage that is ready to train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config.load import Method, RunConfig
from ..data.chat_template import ChatTemplate
from ..data.dataset import TokenizedDataset
from ..io.run_dir import StageDir
from ..io.sync import Mirror
from ..memory.plan import Plan
from ..memory.workload import Workload
from ..model.adapters import AdapterStack
from ..model.base import Base
from ..model.decoder import Decoder
from ..model.peft_io import AdapterFile


@dataclass
class Stage:
    """A stage that is ready to train.

    Attributes:
        method: sft or dpo.
        config: its resolved configuration.
        dir: its folder.
        base: the loaded base.
        template: how conversations are rendered.
        stack: the live adapters.
        decoder: runs batches through them.
        data, eval_data: rows to train on, and held-out ones (or None).
        plan: how a step is split.
        frozen: the adapters below, from the bottom up.
        info: the content of stage.json.
        mirror: copies checkpoints to ``sync``, or None.
        forget_best: the best checkpoint so far was judged on other held-out rows.
        draws_samples: False once samples could not be drawn; the reason was printed.
        writes: this process writes the folder: not in a dry run, and in one of several processes.
    """

    method: Method
    config: RunConfig
    dir: StageDir
    base: Base
    template: ChatTemplate
    stack: AdapterStack
    decoder: Decoder
    data: TokenizedDataset
    eval_data: TokenizedDataset | None
    workload: Workload
    plan: Plan
    frozen: list[AdapterFile]
    info: dict[str, Any] = field(default_factory=dict)
    mirror: Mirror | None = None
    forget_best: bool = False
    draws_samples: bool = True
    writes: bool = True
