"""The optimizer's state: there before the first step, put back in place, the same bits."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer

from tests.conftest import make_model
from tests.numeric import live_stack
from zephyr_lite.config.load import RunConfig
from zephyr_lite.errors import UserError
from zephyr_lite.train import optim
from zephyr_lite.train.optim import make_buffers, make_optimizer, make_scheduler, restore_state, state_of

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


@pytest.mark.parametrize(
    ("keys", "rising"), [({"warmup_steps": 7}, 7), ({"warmup_ratio": 0.1}, 2), ({"warmup_ratio": 0}, 0)]
)
def test_the_learning_rate_rises_for_so_many_steps(keys, rising):
    config = RunConfig(learning_rate=0.7, lr_scheduler_type="constant_with_warmup", **keys)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    scheduler = make_scheduler(config, optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.7 * step / rising for step in range(rising)] + [0.7] * (20 - rising))


def test_a_schedule_takes_its_own_options_only():
    """cosine_with_min_lr ends at its share of both learning rates of LoRA+."""
    keys = {"learning_rate": 0.5, "warmup_ratio": 0, "loraplus_lr_ratio": 16, "lr_scheduler_type": "cosine_with_min_lr"}
    config = RunConfig(**keys, lr_scheduler_kwargs={"min_lr_rate": "0.1"})  # as YAML reads 1e-1
    optimizer = make_optimizer(
        config, {"x.lora_A": torch.nn.Parameter(torch.ones(1)), "x.lora_B": torch.nn.Parameter(torch.ones(1))}
    )
    scheduler = make_scheduler(config, optimizer, 8)
    for step in range(9):
        share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 8))
        assert scheduler.get_last_lr() == pytest.approx([0.5 * share, 8 * share])
        optimizer.step()
        scheduler.step()
    for name, options, says, hint in (
        ("cosine", {"min_lr": 1e-6}, "no option 'min_lr'; cosine_with_min_lr has", "lr_scheduler_kwargs: num_cycles."),
        ("constant", {"num_cycles": 2}, "no option 'num_cycles'", "lr_scheduler_kwargs: none."),
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate", "num_cycles, min_lr, min_lr_rate"),
        ("cosin", {}, "cosin is not a valid", "Try cosine"),
    ):
        with pytest.raises(UserError, match=says) as told:
            make_scheduler(RunConfig(lr_scheduler_type=name, lr_scheduler_kwargs=options), optimizer, 8)
        assert hint in str(told.value)


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


@pytest.mark.parametrize(("ratio", "largest"), [(None, optim.LARGEST), (4.0, optim.LARGEST), (None, 9000)])
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
def test_the_state_is_there_before_the_first_step_and_no_step_adds_to_it(kind):
    named = parameters()
    optimizer = make_optimizer(RunConfig(optim=kind, learning_rate=1e-2), named)
    assert list(optimizer.state) == list(named.values())
    before = tensors(optimizer)
    places = [t.data_ptr() for t in before]
    assert not any(
        t.any() for s in optimizer.state.values() for k, t in s.items() if k in ("state1", "exp_avg", "absmax1")
    )
    train(optimizer, named, 2)
    after = tensors(optimizer)
    assert [t.data_ptr() for t in after] == places and all(a is b for a, b in zip(after, before))
    eight = {s["state1"].dtype for s in optimizer.state.values() if "state1" in s}
    assert eight == ({torch.uint8, torch.float32} if "8bit" in kind else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_is_put_back_goes_into_the_place_that_is_there(kind):
    """So that paged memory stays paged, nothing is there twice, and training goes on to the same bits."""
    config = RunConfig(optim=kind, learning_rate=1e-2)
    named = parameters()
    optimizer = make_optimizer(config, named)
    train(optimizer, named, 3)
    saved = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
        for p in named.values()
    ]
    groups = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
    groups[0]["lr"] = 3e-3
    groups[0]["fused"] = None  # a checkpoint of another version: how it is computed is not its to say
    again = parameters()
    for name, parameter in again.items():
        parameter.data.copy_(named[name].data)
    fresh = make_optimizer(config, again)
    fused = fresh.param_groups[0].get("fused")
    places = tensors(fresh)
    places[0].is_paged = True
    restore_state(fresh, dict(zip(again.values(), saved)), groups)
    assert all(a is b for a, b in zip(tensors(fresh), places, strict=True)) and tensors(fresh)[0].is_paged
    assert fresh.param_groups[0]["lr"] == 3e-3 and fresh.param_groups[0]["betas"] == (0.9, 0.999)
    assert fresh.param_groups[0].get("fused") == fused
    places[0].is_paged = False
    optimizer.param_groups[0]["lr"] = 3e-3
    train(optimizer, named, 2, seed=5)
    train(fresh, again, 2, seed=5)
    assert all(torch.equal(named[n], again[n]) for n in named)


@pytest.mark.parametrize("kind", KINDS)
def test_allocating_ahead_changes_no_bit(kind):
    """Against the same optimizer whose first step makes its own state."""
    ours, theirs = parameters(), parameters()
    first = make_optimizer(RunConfig(optim=kind, learning_rate=1e-2), ours)
    second = make_optimizer(RunConfig(optim=kind, learning_rate=1e-2), theirs)
    second.state.clear()
    for optimizer, named in ((first, ours), (second, theirs)):
        train(optimizer, named, 3)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    for mine, other in zip(first.state.values(), second.state.values()):
        assert mine.keys() == other.keys()
        for key, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_a_parameter_that_a_checkpoint_does_not_have_keeps_its_fresh_state():
    """An adapter's side that no gradient reached had no state before it was allocated ahead."""
    named = parameters()
    optimizer = make_optimizer(RunConfig(), named)
    saved = [{k: v.clone() + 1 for k, v in optimizer.state[p].items()} for p in named.values()]
    states = dict(zip(named.values(), [saved[0], {}, *saved[2:]]))
    restore_state(optimizer, states, optimizer.state_dict()["param_groups"])
    steps = [state["step"].item() for state in optimizer.state.values()]
    assert steps == [1, 0, 1, 1]
