"""Tiny batches, a stack of two adapters, and normwise comparisons: what the numerical tests share."""

import numpy as np
import torch

from zephyr_lite.data.chat_template import Example, PairExample
from zephyr_lite.merge.measure import open_folder
from zephyr_lite.model.adapters import AdapterStack
from zephyr_lite.model.peft_io import AdapterFile

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


@torch.no_grad()
def folder_logps(folder, rows, *, memory=None):
    """Log p of tokens 1 … T-1 of each row, by a model folder in float32 (``open_folder``): [T - 1] each."""
    result = []
    with open_folder(folder, memory=memory) as model:
        for row in rows:
            ids = torch.tensor([row])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            result.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return result
