"""What only a GPU can show: run with ``pytest -m gpu``."""

import math
from functools import partial

import pytest
import torch

from tests.conftest import make_model
from tests.contract.test_fuse import IDS, RIGHT, both, peft_model
from tests.contract.test_fuse import assert_same as assert_same_hidden
from tests.contract.test_more_families import FAMILIES, tiny
from tests.numeric import apart, conversation, live_stack, loss_and_gradients, pair
from tests.ops.test_ops import UnderAutograd
from tests.train.test_train import LN2, metrics, words
from zephyr_lite.config.load import RunConfig, load_config
from zephyr_lite.data.batch import Segment, collate_conversations, collate_pairs
from zephyr_lite.model.base import load_base
from zephyr_lite.model.decoder import Decoder, Dropout
from zephyr_lite.ops import attention as attention_file
from zephyr_lite.ops import dispatch, int8
from zephyr_lite.ops.segments import SegmentTable, segment_starts
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("window", [None, 20, 1])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("flash", torch.bfloat16),
        ("flash", torch.float16),
        ("efficient", torch.bfloat16),
        ("efficient", torch.float16),
        ("efficient", torch.float32),
        ("plain", torch.float32),
    ],
)
def test_every_attention_kernel_equals_float64(kind, dtype, size, window, monkeypatch):
    """Packed, shared prompts, one token alone, grouped queries, views of one buffer; forward and backward."""
    segments = [
        Segment(0, 70),
        Segment(70, 110, (0, 40)),
        Segment(110, 111),
        Segment(111, 180),
        Segment(180, 190, (111, 160)),
    ]
    torch.manual_seed(0)
    whole = torch.randn(190, 12, size, device="cuda", dtype=dtype, requires_grad=True)
    if kind == "flash" and attention_file.backend(whole) != "flash":
        pytest.skip("this card has no FlashAttention")
    table = SegmentTable.build(segments, window, segment_starts(segments).to(whole.device))
    upstream = torch.randn_like(whole[:, :8])

    def run(whole):
        out = UnderAutograd.apply(*whole.split([8, 2, 2], dim=1), table, 0.125)
        return out, torch.autograd.grad(out, whole, upstream.to(out.dtype))[0]

    monkeypatch.setattr(attention_file, "backend", lambda q: "plain")
    want, wanted = run(whole.detach().double().requires_grad_())
    monkeypatch.setattr(attention_file, "backend", lambda q: kind)
    out, grad = run(whole)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert apart(out.double(), want) < tolerance
    assert apart(grad.double(), wanted) < 2 * tolerance


@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [make_model, *(partial(tiny, name) for name in FAMILIES)])
def test_the_decoder_on_the_gpu_equals_float32_on_the_cpu(make, dtype, dropout):
    batch = collate_pairs([pair(0, 40, 30, 20), pair(1, 9, 12, 30)])
    want, wanted = loss_and_gradients(Decoder(live_stack(make()), torch.float32), batch, dropout=dropout)
    stack = live_stack(make())
    stack.model.cuda()
    for name, parameter in stack.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    got, grads = loss_and_gradients(Decoder(stack, dtype), batch.to("cuda"), dropout=dropout)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert apart(got.cpu().float(), want) < tolerance
    for name, grad in wanted.items():
        assert apart(grads[name].cpu(), grad) < 3 * tolerance, name


def test_step_0_is_ln_2_in_16_bits():
    stack = live_stack(make_model(), trained=False)
    stack.model.cuda()
    for name, parameter in stack.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    decoder = Decoder(stack, torch.bfloat16)
    batch = collate_pairs([pair(0, 40, 30, 20), pair(1, 9, 12, 30)]).to("cuda")
    for dropout in (None, Dropout(0.1, 1, 1)):
        policy, reference = decoder.policy_and_reference(batch, dropout=dropout)
        assert torch.equal(policy.detach(), reference)
        assert torch.equal(reference, decoder.token_logps(batch, reference=True, dropout=dropout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keep_policies_agree_on_the_gpu(dtype):
    """Recomputing is the same kernels on the same numbers: the same bits."""
    stack = live_stack(make_model())
    stack.model.cuda()
    for name, parameter in stack.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    decoder = Decoder(stack, dtype)
    batch = collate_pairs([pair(0, 40, 30, 20)]).to("cuda")
    found = [
        loss_and_gradients(decoder, batch, keep=k, dropout=Dropout(0.1, 1, 1)) for k in ("all", "attention", "input")
    ]
    for logps, grads in found[1:]:
        assert torch.equal(logps, found[0][0])
        assert all(apart(grads[n], found[0][1][n]) < 1e-3 for n in grads)


@pytest.mark.parametrize("scratch", ["layer", "small"])
def test_nf4_on_the_gpu_equals_bitsandbytes_own_forward(tiny_base, scratch):
    base = load_base(RunConfig(model_name_or_path=str(tiny_base), dtype="float32"))
    decoder = Decoder(live_stack(base.model), base.dtype, scratch=scratch)
    decoder.stack.model.cuda()
    example = conversation(0, 33)
    batch = collate_conversations([example]).to("cuda")
    logps, grads = loss_and_gradients(decoder, batch, keep="input")
    targets = batch.target_rows
    decoder.stack.model.base_model.set_adapter(["sft", "dpo"])
    logits = decoder.stack.model(batch.tokens[None]).logits[0].log_softmax(-1)
    want = logits[targets, batch.target_ids]
    parameters = decoder.stack.parameters()
    wanted = torch.autograd.grad(want.sum(), list(parameters.values()))
    assert apart(logps, want.detach()) < 1e-4
    for (name, _), grad in zip(parameters.items(), wanted):
        assert apart(grads[name], grad) < 1e-3, name


def test_fuse_on_the_gpu():
    model = peft_model()
    model.cuda()
    assert_same_hidden(both(model, input_ids=IDS.cuda(), attention_mask=RIGHT.cuda()), 1e-4)


def test_packed_equals_one_row_at_a_time_on_the_gpu():
    stack = live_stack(make_model())
    stack.model.cuda()
    decoder = Decoder(stack, torch.float32)
    examples = [conversation(i, n) for i, n in enumerate([17, 9, 30])]
    together, _ = loss_and_gradients(decoder, collate_conversations(examples).to("cuda"))
    apart_ = [loss_and_gradients(decoder, collate_conversations([e]).to("cuda"))[0] for e in examples]
    assert apart(torch.cat(apart_), together) < 1e-4


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_both_stages_in_nf4(tiny_base, chat_rows, pair_rows, tmp_path, dtype, optim):
    run_sft(load_config("sft", None, words(tiny_base, tmp_path / "r", chat_rows, dtype=dtype, optim=optim)))
    losses = metrics(tmp_path / "r" / "sft")
    assert all(map(math.isfinite, losses)) and min(losses) < losses[0]
    settings = words(tiny_base, tmp_path / "r", pair_rows, max_prompt_length=64, dtype=dtype, optim=optim, beta=0.1)
    run_dpo(load_config("dpo", None, settings))
    assert metrics(tmp_path / "r" / "dpo")[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_products_on_the_gpu(dtype):
    """Mistral-7B's widest projection; the matrix units' sums are exact."""
    if torch.cuda.get_device_capability() < int8.CAPABILITY:
        pytest.skip("this card runs no int8 products")
    device = torch.device("cuda")
    assert dispatch.check_kernels(device, dtype, dispatch.Widths(4096, 14_336, int8=True)) == []
    torch.manual_seed(0)
    x, weight = (
        int8.Int8Matrix(
            torch.randint(-127, 128, (rows, 14_336), dtype=torch.int8, device=device),
            torch.full((rows,), 2.0**-12, device=device),
            torch.randn(rows, 224, device=device, dtype=dtype),
        )
        for rows in (1000, 4096)
    )
    low_rank = torch.randn(1000, 16, device=device, dtype=dtype), torch.randn(4096, 16, device=device, dtype=dtype)
    before = torch.randn(1000, 4096, device=device, dtype=dtype)
    y = int8.int8_mm(x, weight, before.clone(), low_rank, add=True)
    exact = x.double() @ weight.double().T + low_rank[0].double() @ low_rank[1].double().T + before.double()
    assert apart(y.double(), exact) < 2 * torch.finfo(dtype).eps
