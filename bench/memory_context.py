"""The longest context that a card holds: by the plan's arithmetic, by trial on two layers, and by a step of the whole model.

On two layers a trial takes a second, because what all layers keep lies on the host, and what one layer takes while it
runs is the same at any depth. What the other layers would have on the card besides (adapters, gradients, moments) is
taken from it before the trials.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.memory_case import CONTEXT_BYTES, Case, opened
from zephyr_lite.config.load import RunConfig
from zephyr_lite.data.batch import Batch, collate_conversations
from zephyr_lite.data.chat_template import Example

# where less than this share is between what fitted and what did not, the search ends
NEAR = 1 / 32


def longest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, to within ``NEAR``; 0: not even one step does."""
    low, high = 0, step
    while high <= most and fits(high):
        low, high = high, 2 * high
    if high > most:
        if low < most // step * step and fits(most // step * step):
            return most // step * step
        high = min(high, most // step * step)
    while high - low > max(step, int(low * NEAR)):
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def one_row(tokens: int, vocabulary: int) -> Batch:
    """A conversation of so many tokens, every one of them supervised."""
    ids = np.random.default_rng(0).integers(3, vocabulary, tokens).astype(np.int32)
    return collate_conversations([Example(ids, np.ones(tokens, dtype=bool), "", 0)])


def measure_context(case: Case, begun: float) -> dict[str, Any]:
    """Trials on a shallow model whose layers are streamed and keep their inputs on the host: the least that a card needs.

    Options:
        layers: of the whole model.
        tile: tokens that the MLP takes at a time.
        step, most: tokens; multiples of the one up to the other are tried.
    """
    from zephyr_lite.model.decoder import Dropout
    from zephyr_lite.train.oom import is_out_of_memory

    stage, state = opened(case, [])
    decoder, config = stage.decoder, stage.config
    here, whole = stage.base.model.config.num_hidden_layers, case.options["layers"]
    plan = replace(
        stage.plan, keep=("input",) * here, offload=here, tile=case.options["tile"], scratch="small", reference="own"
    )
    decoder.follow(plan)
    each = bytes_of_adapters(state) // here
    missing = each * (whole - here)
    ballast = torch.empty(missing, dtype=torch.uint8, device=decoder.device)
    tried: dict[int, bool] = {}

    def fits(tokens: int) -> bool:
        batch = one_row(tokens, stage.base.model.config.vocab_size).to(decoder.device)
        dropout = Dropout(config.lora_dropout, config.seed, 0)
        try:
            logps, _ = decoder.token_stats(batch, keep=plan.keep, dropout=dropout)
            (-logps.sum() / tokens).backward()
            tried[tokens] = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            tried[tokens] = False
        state.optimizer.zero_grad(set_to_none=True)
        decoder.follow(plan)
        return tried[tokens]

    def apart(tokens: int) -> bool:
        """What failed is referred to by its traceback until here."""
        found = fits(tokens)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return found

    found = longest(apart, case.options["step"], case.options["most"])
    hidden = stage.base.model.config.hidden_size * stage.base.dtype.itemsize
    kept = found * whole * hidden
    return {
        "tokens": found,
        "tried": tried,
        "ballast": ballast.numel(),
        "host": {"kept activations": kept, "streamed base": decoder.stream.host_bytes // here * whole},
    }


def bytes_of_adapters(state: Any) -> int:
    """What training takes on the device besides activations: parameters, gradients, the optimizer's state."""
    tensors: list[Tensor] = list(state.parameters.values())
    moments = [
        value for values in state.optimizer.state.values() for value in values.values() if isinstance(value, Tensor)
    ]
    on_device = [
        value for value in moments if value.device == tensors[0].device and not getattr(value, "is_paged", False)
    ]
    return 2 * sum(t.nbytes for t in tensors) + sum(value.nbytes for value in on_device)


def plan_context(
    values: dict[str, Any],
    card: float,
    capability: tuple[int, int],
    dtype: torch.dtype,
    *,
    host: float,
    step: int,
    most: int,
) -> dict[str, Any]:
    """The longest context by the plan's arithmetic alone, for the whole model: nothing is loaded, no card is touched.

    Args:
        values: the configuration of an SFT stage.
        card: its nominal GiB.
        capability: of the card that the steps run on.
        dtype: of the computation.
        host: GiB of main memory to spare.
        step, most: tokens; multiples of the one up to the other are tried.
    """
    from zephyr_lite.memory.estimate import GIB, Device
    from zephyr_lite.memory.gpus import gpu_of_size
    from zephyr_lite.memory.plan import Limits, longest_context
    from zephyr_lite.memory.workload import make_workload
    from zephyr_lite.model.base import read_model_config

    config = RunConfig.model_validate(values)
    job = make_workload(config, "sft", read_model_config(Path(config.model_name_or_path)), dtype, storage="nf4 nested")
    kind = Device.of(capability, dtype.itemsize == 2, context=CONTEXT_BYTES)
    limits = Limits(int(card * GIB), int(host * GIB), gpu_of_size(card), kind)
    return {"tokens": longest_context(job, limits, config.memory, step=step, most=most), "host_limit": limits.host}
