"""What ``zephyr-lite merge`` does: find the chain, merge it, compare the merged folder with the live stack."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ..config import RunConfig, read_dumped
from ..data.batch import collate_conversations
from ..data.chat import ChatTemplate, Example, resolve_template
from ..data.prepare import prepare
from ..demo import CONVERSATIONS_TEST
from ..errors import UserError
from ..model.adapters import AdapterStack, resolve_frozen_names
from ..model.chain import Chain, chain_of_adapters, chain_of_run
from ..model.decoder import Decoder
from ..model.load import (
    FAMILIES,
    Base,
    compute_device,
    compute_dtype,
    fetch_base,
    fingerprint,
    load_base,
    load_tokenizer,
)
from ..model.peft_config import other_base
from ..rundir import StageDir
from ..stage_info import check_rendering
from .check import LogpDifference, compare_logps, folder_logps
from .weights import MergeReport, adapter_only, merge

Say = Callable[[str], None]
CHECK_ROWS = 4
CHECK_TOKENS = 256  # of each row


def run_merge(
    out: Path,
    *,
    run: Path | None = None,
    stage: str | None = None,
    adapters: Sequence[str] = (),
    base: str | None = None,
    onto: Literal["base", "nf4"] = "base",
    as_adapter: bool = False,
    overwrite: bool = False,
    check: bool = True,
    say: Say = print,
) -> LogpDifference | None:
    """Merge a run's chain, or explicit adapters, into ``out``.

    Args:
        run, stage: which; the newest run's last complete stage by default.
        adapters, base: instead of a run, from the bottom up.
        onto, overwrite: see ``merge.merge``.
        as_adapter: write one PEFT adapter instead of a model.
        check: compare the result with the live stack.
    Returns:
        the comparison, where there was one.
    Raises:
        UserError: nothing to merge, a chain that is not what the stage was finished with, another base, an ``out``
            that is not ours.
    """
    if adapters and (run is not None or stage is not None):
        raise UserError("--adapter names the chain itself; --run and --stage name one too.", "Give one or the other.")
    if base is not None and not adapters:
        raise UserError("--base goes with --adapter; a run knows its own.", "Leave --base out, or name the adapters.")
    chain = chain_of_adapters(list(adapters), base) if adapters else chain_of_run(run, stage=stage)
    name = chain.base["name_or_path"]
    where = f"{chain.run}, stage {chain.stage}" if chain.run is not None else "explicit adapters"
    say(f"{where}: {' + '.join([name, *(str(a.path) for a in chain.adapters)])}")
    if chain.run is not None and chain.stage is not None and chain.tokenizer_from is not None:
        template = resolve_template("auto", load_tokenizer(chain.tokenizer_from))
        check_rendering(chain.info, chain.run / chain.stage, template.text, template.tokenizer)
    for adapter in chain.adapters if adapters else ():
        if (told := other_base(adapter.config, name)) is not None:
            say(f"{adapter.path}: {told}")
    if as_adapter:
        adapter_only(
            chain.adapters,
            out,
            base_model_name=name,
            tokenizer_from=chain.tokenizer_from,
            lineage=chain.lineage(),
            overwrite=overwrite,
        )
        say(f"{out}: the whole chain as one PEFT adapter; it belongs on the bare {name}")
        return None
    folder = fetch_base(name, chain.base.get("revision", "main"))
    if (known := chain.base.get("fingerprint")) is not None and fingerprint(folder) != known:
        raise UserError(
            f"{folder}: is not the model that the stage was trained on (its files changed since).",
            "Restore it, or merge the adapters explicitly (--adapter, --base).",
        )
    report = _merge(chain, folder, out, onto, overwrite, say)
    for line in report.lines():
        say(line)
    if not check:
        return None
    difference = check_merged(chain, out, say=say)
    say(difference.line())
    if onto == "base" and chain.base.get("load_in_4bit", True):
        say(
            "(live is in 4 bits, merged is not: this is mostly the base's rounding; --onto nf4 keeps what training saw)"
        )
    return difference


def _merge(
    chain: Chain, folder: Path, out: Path, onto: Literal["base", "nf4"], overwrite: bool, say: Say
) -> MergeReport:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        if total > 2e9 and done * 10 // total > told:  # below that it takes seconds
            told = done * 10 // total
            say(f"written {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return merge(
        folder,
        chain.adapters,
        out,
        onto=onto,
        double_quant=chain.base.get("double_quant", True),
        quant_dtype=_dtype(chain),
        tokenizer_from=chain.tokenizer_from,
        lineage=chain.lineage(),
        overwrite=overwrite,
        progress=progress,
    )


def check_merged(chain: Chain, merged: Path, *, say: Say = print) -> LogpDifference:
    """Log-probabilities of a few rows: the base as the stage trained on it with the chain live on it, and ``merged``.

    The rows are the stage's held-out ones, or the demo's where the stage's cannot be read any more.
    """
    base = load_base(_base_config(chain))
    template = resolve_template("auto", load_tokenizer(chain.tokenizer_from or base.path))
    rows = _rows(chain, template, say)
    live = live_logps(base, chain, rows)
    device, dtype = base.device, base.dtype
    del base
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return compare_logps(live, folder_logps(merged, rows, device, dtype))


@torch.no_grad()
def live_logps(base: Base, chain: Chain, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per-token log-probabilities with every adapter of the chain frozen on the base: float32 [T - 1] for each row."""
    stack = AdapterStack(base.model)
    for name, adapter in zip(resolve_frozen_names([a.path for a in chain.adapters]), chain.adapters):
        stack.add_frozen(name, adapter)
    head = stack.base.get_output_embeddings()
    if base.model.config.model_type not in FAMILIES or isinstance(head, LoraLayer):  # trained by another engine
        return [_plain_logps(stack.model, row, base.device) for row in rows]
    decoder = Decoder(stack, base.dtype)
    result = []
    for place, row in enumerate(rows):
        example = Example(np.asarray(row, dtype=np.int32), np.ones(len(row), dtype=bool), "", place)
        result.append(decoder.token_logps(collate_conversations([example]).to(decoder.device)).float().cpu())
    return result


def _plain_logps(model: Any, row: Sequence[int], device: torch.device) -> Tensor:
    ids = torch.tensor([list(row)], device=device)
    logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[:, 0].cpu()


def _rows(chain: Chain, template: ChatTemplate, say: Say) -> list[list[int]]:
    if chain.run is not None and chain.stage is not None:
        stored = StageDir(chain.run / chain.stage).config
        try:
            config = RunConfig.model_validate(read_dumped(stored))
            specs = (config.eval_dataset or config.dataset)[:1]
            few = [spec.model_copy(update={"limit": CHECK_ROWS, "weight": 1.0}) for spec in specs]
            method = chain.info.get("method", "sft")
            examples = list(prepare(few, method, config, template, what="check").examples)
            whole = [e.ids if method == "sft" else np.concatenate([e.prompt_ids, e.chosen_ids]) for e in examples]
            return [ids[:CHECK_TOKENS].tolist() for ids in whole]
        except (UserError, OSError, ValueError) as error:
            say(f"the stage's rows cannot be read for the check ({str(error).splitlines()[0]}); taking the demo's")
    lines = CONVERSATIONS_TEST.read_text(encoding="utf-8").splitlines()[:CHECK_ROWS]
    encoded = [template.encode(json.loads(line)["messages"], "all")[0] for line in lines]
    return [ids[:CHECK_TOKENS].tolist() for ids in encoded]


def _base_config(chain: Chain) -> RunConfig:
    described = chain.base
    return RunConfig(
        model_name_or_path=described["name_or_path"],
        model_revision=described.get("revision", "main"),
        load_in_4bit=described.get("load_in_4bit", True),
        bnb_4bit_use_double_quant=described.get("double_quant", True),
        engine=chain.info.get("engine", "fused"),
    )


def _dtype(chain: Chain) -> torch.dtype:
    """What the base was loaded in when it was quantized."""
    stored = chain.base.get("dtype")
    return getattr(torch, stored) if stored else compute_dtype("auto", compute_device())
