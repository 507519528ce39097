"""The optimizer's state: there before the first step, and the same bits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from tests.conftest import make_model
from tests.numeric import live_stack
from zephyr_lite.config.load import RunConfig
from zephyr_lite.train import optim
from zephyr_lite.train.optim import make_buffers, make_optimizer, make_scheduler, state_of

KINDS = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters(seed=0):
    """A tensor that bitsandbytes keeps in 8 bits, one of a ragged last block, one that it keeps in 32, a scalar's."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (64, 128), "b": (70, 77), "c": (4, 33), "d": (1,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def train(optimizer, named, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    optimizer.zero_grad()


def tensors(optimizer):
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("ratio", [None, 16.0])
def test_the_update_is_that_of_torch_and_of_pefts_lora_plus(ratio):
    """Bit for bit: the learning rate of A and B, betas, epsilon and weight decay, under a schedule."""
    keys = {"learning_rate": 1e-2, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4}
    config = RunConfig(**keys, loraplus_lr_ratio=ratio)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "fused": True}
    models = [get_peft_model(make_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])) for _ in range(2)]
    mine, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in models)
    with torch.no_grad():
        for name, parameter in mine.items():
            theirs[name].copy_(parameter)
    ours = make_optimizer(config, mine)
    if ratio is None:
        other = torch.optim.AdamW(theirs.values(), weight_decay=0.1, **settings)
    else:
        other = create_loraplus_optimizer(
            models[1], torch.optim.AdamW, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1, **settings
        )
    for optimizer, named in ((ours, mine), (other, theirs)):
        scheduler = make_scheduler(config, optimizer, 5)
        for step in range(4):
            train(optimizer, named, 1, seed=step)
            scheduler.step()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine) and any("lora_B" in name for name in mine)


@pytest.mark.parametrize(("ratio", "largest"), [(4.0, optim.LARGEST), (None, 9000)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_buffers_is_that_of_each_parameter(kind, ratio, largest, monkeypatch):
    """Bit for bit: the weights and the state, which a checkpoint has for each parameter."""
    monkeypatch.setattr(optim, "LARGEST", largest)
    config = RunConfig(optim=kind, learning_rate=1e-2, weight_decay=0.1, loraplus_lr_ratio=ratio)
    named = live_stack(make_model(), frozen=False, r=50).parameters()
    assert {p.numel() < 4096 for p in named.values()} == {True, False}
    apart = {name: torch.nn.Parameter(p.detach().clone()) for name, p in named.items()}
    buffers, gradients = make_buffers(config, named)
    ours, theirs = make_optimizer(config, buffers), make_optimizer(config, apart)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, p in named.items():
            apart[name].grad = torch.randn(p.shape, generator=generator)
            gradients.as_strided(p.shape, p.stride(), p.storage_offset()).copy_(apart[name].grad)
        ours.step()
        theirs.step()
    for name, p in named.items():
        assert torch.equal(p, apart[name]), name
        found, wanted = state_of(ours, p), theirs.state[apart[name]]
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(torch.as_tensor(found[key]), torch.as_tensor(value)), (name, key)
            assert torch.as_tensor(found[key]).shape == torch.as_tensor(value).shape, (name, key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_there_before_the_first_step_and_changes_no_bit(kind):
    """Against the same optimizer whose first step makes its own state."""
    ours, theirs = parameters(), parameters()
    first = make_optimizer(RunConfig(optim=kind, learning_rate=1e-2), ours)
    second = make_optimizer(RunConfig(optim=kind, learning_rate=1e-2), theirs)
    second.state.clear()
    assert list(first.state) == list(ours.values())
    before = tensors(first)
    places = [t.data_ptr() for t in before]
    for optimizer, named in ((first, ours), (second, theirs)):
        train(optimizer, named, 3)
    after = tensors(first)
    assert [t.data_ptr() for t in after] == places and all(a is b for a, b in zip(after, before))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for mine, other in zip(first.state.values(), second.state.values()):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key
    eight = {s["state1"].dtype for s in first.state.values() if "state1" in s}
    assert eight == ({torch.uint8, torch.float32} if "8bit" in kind else set())
