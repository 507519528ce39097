"""Claim 2: packed rows equal one row at a time, a shared prompt equals two sequences, a cached reference the live one."""

import numpy as np
import pytest
import torch

from tests.conftest import make_model
from tests.contract.steps import moved, open_dpo, step_of
from tests.numeric import apart, assert_same, conversation, live_stack, loss_and_gradients, pair
from tests.train.test_train import LN2, dpo_words, metrics
from zephyr_lite.config.load import load_config
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.data.chat_template import Example
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.peft_io import read_adapter
from zephyr_lite.ops.dropout import DropoutKey, uniform
from zephyr_lite.train.dpo import DpoObjective, run_dpo


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(("p", "noise"), [(0.0, 0.0), (0.3, 0.0), (0.3, 5.0)])
def test_packed_equals_one_row_at_a_time(window, p, noise):
    """Invariant 2, and 4: however rows are packed or split, dropout and NEFTune's noise on or off."""
    decoder = Decoder(live_stack(make_model(sliding_window=window)), torch.float32)
    examples = [conversation(i, n) for i, n in enumerate([17, 1, 9, 30])]
    dropout = Dropout(p, seed=3, step=11, noise=noise)
    together, grads = loss_and_gradients(decoder, collate_conversations(examples), dropout=dropout)
    for split in ([[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        logps, summed = {}, None
        for group in split:
            batch = collate_conversations([examples[i] for i in group])
            part, found = loss_and_gradients(decoder, batch, dropout=dropout)
            summed = found if summed is None else {n: summed[n] + found[n] for n in found}
            logps |= dict(zip(group, part.split(batch.group_sizes.tolist())))
        assert apart(torch.cat([logps[i] for i in range(4)]), together) < 1e-5
        assert_same(summed, grads)


@pytest.mark.parametrize("window", [None, 6])
def test_a_shared_prompt_equals_separate_sequences(window):
    """Invariant 2: prompt computed once, rejected sees its gathered keys; log-probabilities and gradients are the same."""
    decoder = Decoder(live_stack(make_model(sliding_window=window)), torch.float32)
    pairs = [pair(0, 12, 7, 5), pair(1, 1, 3, 9), pair(2, 20, 1, 1)]
    shared = collate_pairs(pairs)
    assert len(shared) == sum(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    weights = torch.randn(len(shared.target_ids))
    logps, grads = loss_and_gradients(decoder, shared, weights)
    separate = []
    for p in pairs:
        for ids in (p.chosen_ids, p.rejected_ids):
            mask = np.concatenate([np.zeros(len(p.prompt_ids), bool), np.ones(len(ids), bool)])
            separate.append(Example(np.concatenate([p.prompt_ids, ids]), mask, p.where, p.index))
    want, wanted = loss_and_gradients(decoder, collate_conversations(separate), weights)
    assert apart(logps, want) < 1e-5
    assert_same(grads, wanted)


def test_neftune_adds_uniform_noise_to_the_embeddings_of_the_hugging_face_model():
    """Within ± alpha / √(L · d), L the tokens of the example; another in every step, none without an alpha."""
    decoder = Decoder(live_stack(make_model(), torch.float64), torch.float64)
    example = conversation(4, 33)
    batch = collate_conversations([example])
    unit = uniform(DropoutKey(0.0, 3, 11, batch.streams, batch.positions, layer=-1), 64)
    assert unit.abs().max() <= 1 and abs(unit.mean()) < 0.05 and abs(unit.var() - 1 / 3) < 0.02
    embedded = decoder.stack.base.model.embed_tokens(batch.tokens) + 5 * unit / (33 * 64) ** 0.5
    with torch.no_grad():
        logps = decoder.stack.model(inputs_embeds=embedded[None]).logits[0].log_softmax(-1)
        found = decoder.token_logps(batch, dropout=Dropout(0.0, 3, 11, noise=5.0))
        later = decoder.token_logps(batch, dropout=Dropout(0.0, 3, 12, noise=5.0))
        plain = decoder.token_logps(batch, dropout=Dropout(0.0, 3, 11))
    assert apart(found, logps[batch.target_rows, batch.target_ids]) < 1e-6  # both norms compute in float32 at most
    assert min(apart(found, later), apart(found, plain)) > 1e-3


def test_float64_runs_in_float64():
    decoder = Decoder(live_stack(make_model(), torch.float64), torch.float64)
    examples = [conversation(i, n) for i, n in enumerate([17, 9])]
    together, grads = loss_and_gradients(decoder, collate_conversations(examples))
    parts = [loss_and_gradients(decoder, collate_conversations([e])) for e in examples]
    assert together.dtype == torch.float64
    assert apart(torch.cat([p[0] for p in parts]), together) < 1e-12
    # the rotary angles and their cosines are float32 in the Hugging Face model, the same in both
    assert_same({n: parts[0][1][n] + parts[1][1][n] for n in grads}, grads, 1e-12)


def test_every_gradient_from_a_cached_reference_is_that_of_the_live_one(windowed, run, pair_rows):
    found = {}
    for cached in (False, True):
        stage = open_dpo(windowed, run, pair_rows, stage=f"dpo{cached}", precompute_ref_log_probs=cached)
        task = DpoObjective(stage)  # the cache is filled in other micro-batches than the step's
        moved(stage)
        found[cached] = step_of(stage, task, 200, 1)
    assert apart(torch.tensor(found[True][0]["loss"]), torch.tensor(found[False][0]["loss"])) < 1e-5
    assert abs(found[True][0]["loss"] - LN2) > 1e-3
    for name, grad in found[False][1].items():
        assert grad.norm() > 0 and apart(found[True][1][name], grad) < 1e-5, name


def test_cached_reference_equals_live(tiny_base, quantized_run, pair_rows):
    """Invariant 2: the same losses and adapters from reference log-probabilities that were computed once."""
    for name, cached in (("live", False), ("cached", True)):
        run_dpo(
            load_config(
                "dpo", None, dpo_words(tiny_base, quantized_run, pair_rows, stage=name, precompute_ref_log_probs=cached)
            ),
        )
    assert metrics(quantized_run / "cached") == pytest.approx(metrics(quantized_run / "live"), abs=1e-5)
    live, cached = (read_adapter(quantized_run / name / "delta").modules for name in ("live", "cached"))
    for module in live:
        assert (live[module].b - cached[module].b).norm() <= 1e-3 * live[module].b.norm()
    assert list((quantized_run / "cached").glob("reference-*.safetensors"))
