"""Losses and gradients equal stock TRL's on the same rows: a float32 base, the SFT adapter merged into it, a fresh
adapter on top, padded batches on TRL's side."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.conftest import make_model
from zephyr_lite.data.batch import collate_conversations, collate_pairs
from zephyr_lite.data.chat_template import Example, PairExample
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.decoder import Decoder
from zephyr_lite.model.peft_io import AdapterFile
from zephyr_lite.train.losses import preference_loss, sft_loss
from zephyr_lite.train.reference import pair_sums

RANK, ALPHA, BETA = 4, 8, 0.3
TOLERANCE = 1e-5


def apart(found, wanted):
    return ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def sft_adapter():
    """An adapter that was trained: its B is not zero."""
    stack = AdapterStack(make_model())
    stack.add_trainable("sft", r=3, alpha=6, targets="all-linear", seed=1)
    randomize_b(stack.lora_layers(), "sft", 5)
    return AdapterFile(path="sft", config={}, modules=stack.weights("sft"))


def randomize_b(layers, name, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in layers:
        weight = layer.lora_B[name].weight
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def ours(trained=True):
    """The live stack: base, frozen sft, trainable dpo."""
    stack = AdapterStack(make_model())
    stack.add_frozen("sft", sft_adapter())
    stack.add_trainable("dpo", r=RANK, alpha=ALPHA, targets="all-linear", seed=2)
    if trained:
        randomize_b(stack.lora_layers(), "dpo", 6)
    return stack, Decoder(stack, torch.float32)


def merged_base(with_sft=True):
    """The oracle's base: the SFT adapter added to plain weights."""
    model = make_model()
    for module, w in sft_adapter().modules.items() if with_sft else ():
        model.get_submodule(module).weight.data += w.scale * (w.b @ w.a)
    return model


def oracle(trainer_class, args, dataset, tokenizer, weights, model):
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    layers = dict(AdapterStack(trainer.model).lora_layers())
    assert layers.keys() == weights.keys()
    with torch.no_grad():
        for module, w in weights.items():
            layers[module].lora_A["default"].weight.copy_(w.a)
            layers[module].lora_B["default"].weight.copy_(w.b)
    trainer.model.train()
    return trainer, layers


def gradients(layers, name):
    return {
        f"{module}.{side}": getattr(layer, side)[name].weight.grad.clone()
        for module, layer in layers.items()
        for side in ("lora_A", "lora_B")
    }


def assert_same_gradients(stack, layers):
    found = {name: p.grad for name, p in stack.parameters().items()}
    wanted = gradients(layers, "default")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].norm() > 0, name
        assert apart(found[name], wanted[name]) <= TOLERANCE, name


def settings(tmp_path):
    return {
        "output_dir": str(tmp_path),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "max_length": None,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
    }


CONVERSATIONS = [
    Example(
        ids=np.random.default_rng(i).integers(3, 440, length).astype(np.int32),
        mask=np.random.default_rng(50 + i).random(length) < 0.6,
        where=f"row {i}",
        index=i,
    )
    for i, length in enumerate((31, 7, 18, 44))
]


def test_sft(tokenizer, tmp_path):
    stack, decoder = ours()
    batch = collate_conversations(CONVERSATIONS)
    loss = sft_loss(decoder.token_logps(batch), len(batch.target_ids))
    loss.backward()

    rows = [{"input_ids": e.ids.tolist(), "labels": np.where(e.mask, e.ids, -100).tolist()} for e in CONVERSATIONS]
    args = SFTConfig(**settings(tmp_path), dataset_kwargs={"skip_prepare_dataset": True})
    trainer, layers = oracle(SFTTrainer, args, Dataset.from_list(rows), tokenizer, stack.weights("dpo"), merged_base())
    padded = trainer.data_collator(rows)
    assert padded["attention_mask"].sum() == len(batch) < padded["attention_mask"].numel()
    wanted = trainer.compute_loss(trainer.model, padded)
    wanted.backward()
    assert apart(loss.detach(), wanted.detach()) <= TOLERANCE
    assert_same_gradients(stack, layers)


def random_pair(index, prompt, chosen, rejected):
    rng = np.random.default_rng(100 + index)
    p, c, r = (rng.integers(3, 440, n).astype(np.int32) for n in (prompt, chosen, rejected))
    return PairExample(p, c, np.ones(chosen, bool), r, np.ones(rejected, bool), f"row {index}", index)


PAIRS = [random_pair(i, *lengths) for i, lengths in enumerate([(9, 21, 5), (4, 3, 17), (16, 8, 8)])]


# a trainer needs a data set; the tests pass their batches to its compute_loss
TEXTS = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])


def dpo_oracle(tokenizer, tmp_path, weights, loss_type, label_smoothing=0.0, with_sft=True):
    losses = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    args = DPOConfig(
        **settings(tmp_path),
        beta=BETA,
        loss_type=list(losses),
        loss_weights=list(losses.values()),
        label_smoothing=label_smoothing,
    )
    return oracle(DPOTrainer, args, TEXTS, tokenizer, weights, merged_base(with_sft))


def collated(pairs):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return DataCollatorForPreference(pad_token_id=0)([{n: getattr(p, n).tolist() for n in names} for p in pairs])


def our_dpo(stack, decoder, pairs, loss_type, label_smoothing=0.0, *, free=False, **parameters):
    """With ``free`` without a reference."""
    batch = collate_pairs(pairs)
    reference = None if free else pair_sums(decoder, batch, reference=True)
    policy = pair_sums(decoder, batch)
    found = preference_loss(
        policy,
        reference,
        batch.group_sizes.view(-1, 2),
        beta=BETA,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        **parameters,
    )
    for parameter in stack.parameters().values():
        parameter.grad = None
    found.losses.mean().backward()
    return found, policy.detach(), reference


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [
        ("sigmoid", 0.0),
        ("ipo", 0.0),
        ("hinge", 0.0),
        ("robust", 0.2),
        ("sigmoid_norm", 0.0),
        ("apo_zero", 0.0),
        ("apo_down", 0.0),
        ("bco_pair", 0.0),
        ({"sigmoid": 1.0, "sft": 0.3}, 0.0),
        ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, 0.0),  # MPO
    ],
)
def test_dpo(tokenizer, tmp_path, loss_type, label_smoothing):
    stack, decoder = ours()
    found, policy, reference = our_dpo(stack, decoder, PAIRS, loss_type, label_smoothing)
    assert (policy - reference).abs().min() > 1e-3  # the adapter moved the policy, or nothing would be compared
    trainer, layers = dpo_oracle(tokenizer, tmp_path, stack.weights("dpo"), loss_type, label_smoothing)
    wanted = trainer.compute_loss(trainer.model, collated(PAIRS))
    wanted.backward()
    assert apart(found.losses.mean().detach(), wanted.detach()) <= TOLERANCE
    assert_same_gradients(stack, layers)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    chosen, rejected = found.chosen_rewards, found.rejected_rewards
    ours_by_name = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": policy[:, 0].mean(),
        "logps/rejected": policy[:, 1].mean(),
    }
    for name, value in ours_by_name.items():
        # a reward is a difference of two sums of some hundred nats each
        assert value.item() == pytest.approx(metrics[name], rel=TOLERANCE, abs=5e-5 if "rewards" in name else 0), name


def padded(pairs):
    """A batch of TRL's trainers without a reference."""
    batch = {}
    for name in ("chosen", "rejected"):
        parts = [(p.prompt_ids.tolist(), getattr(p, f"{name}_ids").tolist()) for p in pairs]
        longest = max(len(prompt) + len(ids) for prompt, ids in parts)
        for key, pad, row in (
            ("input_ids", 0, lambda prompt, ids: prompt + ids),
            ("attention_mask", 0, lambda prompt, ids: [1] * len(prompt + ids)),
            ("labels", -100, lambda prompt, ids: [-100] * len(prompt) + ids),
        ):
            rows = [row(*part) for part in parts]
            batch[f"{name}_{key}"] = torch.tensor([r + [pad] * (longest - len(r)) for r in rows])
    return batch


# TRL's ORPO has the tokens of the prompt in its first term too: a prompt of one token has none that is predicted
SHORT = [random_pair(i, 1, *lengths) for i, lengths in enumerate([(21, 5), (3, 17), (8, 8)])]


@pytest.mark.parametrize(
    ("loss_type", "trainer_class", "config", "theirs"),
    [
        ("simpo", CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        (
            {"simpo": 1.0, "sft": 0.4},
            CPOTrainer,
            CPOConfig,
            {"loss_type": "simpo", "cpo_alpha": 0.4},
        ),
        ("orpo", ORPOTrainer, ORPOConfig, {}),
    ],
)
def test_losses_without_a_reference(tokenizer, tmp_path, loss_type, trainer_class, config, theirs):
    pairs, simpo = (SHORT, {}) if loss_type == "orpo" else (PAIRS, {"simpo_gamma": 0.7})
    stack, decoder = ours()
    found, _, _ = our_dpo(stack, decoder, pairs, loss_type, free=True, **simpo)
    args = config(**settings(tmp_path) | {"max_length": 64}, beta=BETA, **simpo, **theirs)
    trainer, layers = oracle(trainer_class, args, TEXTS, tokenizer, stack.weights("dpo"), merged_base())
    wanted, metrics = trainer.get_batch_loss_metrics(trainer.model, padded(pairs))
    wanted.backward()
    assert apart(found.losses.mean().detach(), wanted.detach()) <= TOLERANCE
    assert_same_gradients(stack, layers)
    assert found.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=TOLERANCE)
    assert found.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=TOLERANCE)


@pytest.mark.parametrize("pair", PAIRS, ids=["first", "second", "third"])
def test_sigmoid_with_label_smoothing(tokenizer, tmp_path, pair):
    """TRL's ``sigmoid`` ignores label_smoothing; of a single pair its ``aot`` is the conservative mixture."""
    stack, decoder = ours()
    found, _, _ = our_dpo(stack, decoder, [pair], "sigmoid", 0.2)
    trainer, layers = dpo_oracle(tokenizer, tmp_path, stack.weights("dpo"), "aot", 0.2)
    wanted = trainer.compute_loss(trainer.model, collated([pair]))
    wanted.backward()
    assert apart(found.losses.mean().detach(), wanted.detach()) <= TOLERANCE
    assert_same_gradients(stack, layers)


def test_the_frozen_adapter_stays_in_the_reference(tokenizer, tmp_path):
    """The reference is base + sft. On the raw base (where the SFT adapter went off too) TRL is elsewhere."""
    stack, decoder = ours()
    _, _, reference = our_dpo(stack, decoder, PAIRS, "sigmoid")
    right, _ = dpo_oracle(tokenizer, tmp_path, stack.weights("dpo"), "sigmoid")
    raw, _ = dpo_oracle(tokenizer, tmp_path, stack.weights("dpo"), "sigmoid", with_sft=False)
    with torch.no_grad():
        of_sft = torch.stack(right.compute_ref_log_probs(right.model, collated(PAIRS)), 1)
        of_base = torch.stack(raw.compute_ref_log_probs(raw.model, collated(PAIRS)), 1)
    assert apart(reference, of_sft) <= TOLERANCE
    assert apart(reference, of_base) > 1e-3


def test_step_zero_is_ln_2_on_both_sides(tokenizer, tmp_path):
    stack, decoder = ours(trained=False)
    found, policy, reference = our_dpo(stack, decoder, PAIRS, "sigmoid")
    assert torch.equal(policy, reference)
    trainer, layers = dpo_oracle(tokenizer, tmp_path, stack.weights("dpo"), "sigmoid")
    wanted = trainer.compute_loss(trainer.model, collated(PAIRS))
    wanted.backward()
    assert found.losses.mean().item() == pytest.approx(np.log(2), abs=1e-6)
    assert wanted.item() == pytest.approx(np.log(2), abs=1e-6)
    ours_b = {n: p.grad for n, p in stack.parameters().items() if n.endswith("lora_B")}
    for name, grad in ours_b.items():
        assert apart(grad, gradients(layers, "default")[name]) <= TOLERANCE, name
