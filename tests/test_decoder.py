"""The decoder against the Hugging Face model, and the invariants of batches: packed, split, shared prompts, references."""

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.conftest import make_model
from zephyr_lite.config import RunConfig
from zephyr_lite.data.batch import Batch, Segment, collate_conversations, collate_pairs
from zephyr_lite.data.chat import Example, PairExample
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.model.load import load_base
from zephyr_lite.model.peft_files import AdapterFile

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def apart(a, b):
    """Normwise difference."""
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def conversation(index, length, seed=None):
    rng = np.random.default_rng(index if seed is None else seed)
    ids = rng.integers(3, 440, length).astype(np.int32)
    return Example(ids=ids, mask=rng.random(length) < 0.6, where=f"row {index}", index=index)


def pair(index, prompt, chosen, rejected):
    rng = np.random.default_rng(100 + index)

    def ids(n):
        return rng.integers(3, 440, n).astype(np.int32)

    return PairExample(
        prompt_ids=ids(prompt),
        chosen_ids=ids(chosen),
        chosen_mask=np.ones(chosen, bool),
        rejected_ids=ids(rejected),
        rejected_mask=np.ones(rejected, bool),
        where=f"row {index}",
        index=index,
    )


def live_stack(model, dtype=torch.float32, frozen=True, trained=True, r=4):
    """The model with a frozen adapter whose B is not zero, and a trainable one."""
    stack = AdapterStack(model)
    if frozen:
        stack.add_trainable("sft", r=2, alpha=8, targets="all-linear", seed=1)
        _randomize_b(stack, "sft", 5)
        weights = stack.weights("sft")
        plain = stack.model.unload()
        stack = AdapterStack(plain)
        stack.add_frozen("sft", AdapterFile(path="sft", config={}, modules=weights))
    stack.add_trainable("dpo", r=r, alpha=4, targets="all-linear", seed=2)
    if trained:
        _randomize_b(stack, "dpo", 6)
    if dtype == torch.float64:
        stack.model.double()
    return stack


def _randomize_b(stack, name, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in stack.lora_layers():
        weight = layer.lora_B[name].weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def loss_and_gradients(decoder, batch, weights=None, **options):
    for p in decoder.stack.parameters().values():
        p.grad = None
    logps = decoder.token_logps(batch, **options)
    (logps if weights is None else logps * weights).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in decoder.stack.parameters().items()}


def assert_same(found, wanted, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert apart(found[name], wanted[name]) < tolerance, name


def hugging_face_logps(stack, ids, targets, names):
    with stack.only(names):
        logits = stack.model(torch.from_numpy(ids[None].astype(np.int64))).logits[0]
    return logits.log_softmax(-1)[torch.tensor(targets) - 1, torch.from_numpy(ids[targets].astype(np.int64))]


@pytest.fixture(params=["mistral", "llama"])
def model(request):
    return make_model(request.param)


def test_equals_the_hugging_face_model_with_the_stack(model):
    """The PEFT model's own forward with both adapters on gives the same log-probabilities and gradients."""
    decoder = Decoder(live_stack(model), torch.float32)
    example = conversation(0, 33)
    targets = np.flatnonzero(example.mask[1:]) + 1
    logps, grads = loss_and_gradients(decoder, collate_conversations([example]))
    want = hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])
    assert apart(logps, want.detach()) < 1e-5
    for p in decoder.stack.parameters().values():
        p.grad = None
    with torch.enable_grad():
        decoder.stack.model.base_model.set_adapter(["sft", "dpo"])
        hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"]).sum().backward()
    assert_same({n: p.grad for n, p in decoder.stack.parameters().items()}, grads)


@pytest.mark.parametrize("change", ["rope", "bias", "tied", "head_dim"])
def test_variants_of_the_families(change):
    changes = {
        "rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0,
                                     "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        "bias": {"attention_bias": True},
        "tied": {"tie_word_embeddings": True},
        "head_dim": {"head_dim": 24},
    }[change]  # fmt: skip
    decoder = Decoder(live_stack(make_model("llama", **changes)), torch.float32)
    example = conversation(0, 25)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_sliding_window_equals_the_hugging_face_model():
    decoder = Decoder(live_stack(make_model(sliding_window=7)), torch.float32)
    example = conversation(0, 40)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5
        wide = Decoder(live_stack(make_model()), torch.float32).token_logps(collate_conversations([example]))
    assert apart(logps, wide) > 1e-3  # the window mattered


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_packed_equals_one_row_at_a_time(window, p):
    """Invariant 2, and 4: however rows are packed or split, dropout on or off."""
    decoder = Decoder(live_stack(make_model(sliding_window=window)), torch.float32)
    examples = [conversation(i, n) for i, n in enumerate([17, 1, 9, 30])]
    dropout = Dropout(p, seed=3, step=11)
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


def test_a_llama_has_no_sliding_window():
    """Whatever its configuration says: the Hugging Face model ignores the key."""
    decoder = Decoder(live_stack(make_model("llama")), torch.float32)
    decoder.stack.base.config.sliding_window = 3
    example = conversation(0, 25)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        logps = decoder.token_logps(collate_conversations([example]))
        assert apart(logps, hugging_face_logps(decoder.stack, example.ids, targets, ["sft", "dpo"])) < 1e-5


def test_dropout_changes_the_loss_and_is_repeatable():
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_conversations([conversation(0, 20)])
    with torch.no_grad():
        plain = decoder.token_logps(batch)
        a, b, c = (decoder.token_logps(batch, dropout=Dropout(0.2, 1, step)) for step in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, plain)


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


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_keep_input_equals_keep_all(p):
    decoder = Decoder(live_stack(make_model()), torch.float32)
    batch = collate_pairs([pair(0, 9, 6, 4)])
    everything = loss_and_gradients(decoder, batch, keep="all", dropout=Dropout(p, 1, 1))
    recomputed = loss_and_gradients(decoder, batch, keep="input", dropout=Dropout(p, 1, 1))
    assert torch.equal(everything[0], recomputed[0])
    assert_same(recomputed[1], everything[1], 1e-7)


def test_reference_is_the_frozen_stack_and_equals_an_untrained_policy_bit_for_bit():
    """Invariant 1's ground: at step 0 nothing differs, and later the reference is still base + sft, not the raw base."""
    batch = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 8, 8)])
    fresh = Decoder(live_stack(make_model(), trained=False), torch.float32)
    policy, reference = fresh.token_logps(batch).detach(), fresh.token_logps(batch, reference=True)
    assert torch.equal(policy, reference) and not reference.requires_grad
    trained = Decoder(live_stack(make_model()), torch.float32)
    assert torch.equal(trained.token_logps(batch, reference=True), reference)
    assert apart(trained.token_logps(batch).detach(), reference) > 1e-3
    bare = Decoder(live_stack(make_model(), frozen=False, trained=False), torch.float32)
    assert apart(bare.token_logps(batch).detach(), reference) > 1e-3


def test_only_the_top_adapter_is_trainable_and_master_weights_are_float32():
    stack = live_stack(make_model().to(torch.bfloat16))
    for _ in range(2):
        trainable = {n for n, p in stack.model.named_parameters() if p.requires_grad}
        assert trainable and all(".dpo." in n for n in trainable)
        assert all(p.dtype == torch.float32 for n, p in stack.model.named_parameters() if "lora_" in n)
        with stack.only(["sft"]):  # switching adapters makes them trainable in PEFT
            pass
        with stack.only([]):
            pass


@pytest.mark.parametrize("names", [[], ["sft"], ["dpo"], ["sft", "dpo"]])
def test_only_these_adapters_are_on(names):
    """Generation with some of the adapters is the decoder with those, and differs from all other choices."""
    stack = live_stack(make_model())
    example = conversation(0, 20)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        for choice in ([], ["sft"], ["dpo"], ["sft", "dpo"]):
            ours = Decoder(stack, torch.float32, choice).token_logps(collate_conversations([example]))
            difference = apart(ours, hugging_face_logps(stack, example.ids, targets, names))
            assert difference < 1e-5 if choice == names else difference > 1e-3
    assert {n.split(".")[-2] for n, p in stack.model.named_parameters() if p.requires_grad} == {"dpo"}


def test_nf4_base_equals_the_bitsandbytes_forward(tiny_base):
    """Through the real 4-bit storage, nested scales included, and again after generation touched the modules."""
    base = load_base(RunConfig(model_name_or_path=str(tiny_base)))
    assert base.load_in_4bit and base.dtype == torch.float32
    stack = live_stack(base.model)
    decoder = Decoder(stack, base.dtype)
    assert sum(isinstance(m, LoraLayer) for m in stack.base.modules()) == 14
    example = conversation(0, 30)
    targets = np.flatnonzero(example.mask[1:]) + 1
    with torch.no_grad():
        before = decoder.token_logps(collate_conversations([example]))
        want = hugging_face_logps(stack, example.ids, targets, ["sft", "dpo"])
        after = decoder.token_logps(collate_conversations([example]))
    assert apart(before, want) < 1e-5
    assert torch.equal(before, after)  # nothing was repacked in place


def test_float64_runs_in_float64():
    decoder = Decoder(live_stack(make_model(), torch.float64), torch.float64)
    examples = [conversation(i, n) for i, n in enumerate([17, 9])]
    together, grads = loss_and_gradients(decoder, collate_conversations(examples))
    parts = [loss_and_gradients(decoder, collate_conversations([e])) for e in examples]
    assert together.dtype == torch.float64
    assert apart(torch.cat([p[0] for p in parts]), together) < 1e-12
    # the rotary angles and their cosines are float32 in the Hugging Face model, the same in both
    assert_same({n: parts[0][1][n] + parts[1][1][n] for n in grads}, grads, 1e-12)


def test_collate_names_every_target_once():
    pairs = [pair(0, 3, 2, 4)]
    batch = collate_pairs(pairs)
    assert isinstance(batch, Batch)
    assert batch.segments == (Segment(0, 5), Segment(5, 9, (0, 3)))
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6]
    assert batch.target_rows.tolist() == [2, 3, 2, 5, 6, 7]
    assert batch.target_ids.tolist() == [*pairs[0].chosen_ids, *pairs[0].rejected_ids]
    assert batch.group_sizes.tolist() == [2, 4]
    assert batch.sum_by_group(torch.arange(6.0)).tolist() == [1.0, 14.0]
