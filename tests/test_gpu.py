"""What only a GPU can show: run with ``pytest -m gpu``."""

import math

import pytest
import torch

from tests.conftest import make_model
from tests.test_decoder import apart, conversation, live_stack, loss_and_gradients, pair
from tests.test_train import LN2, metrics, quiet, words
from zephyr_lite.config import load_config
from zephyr_lite.data.batch import Segment, collate_conversations, collate_pairs
from zephyr_lite.model.decoder import Decoder
from zephyr_lite.ops.attention import SegmentTable, _by_segment, _has_flash, attention
from zephyr_lite.train.dpo import run_dpo
from zephyr_lite.train.sft import run_sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.mark.parametrize("window", [None, 20])
def test_variable_length_flash_attention_equals_sdpa_a_segment(window):
    torch.manual_seed(0)
    segments = [Segment(0, 70), Segment(70, 110, (0, 40)), Segment(110, 111), Segment(111, 180)]
    q, k, v = (torch.randn(180, h, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    if not _has_flash(q):
        pytest.skip("this card has no variable-length FlashAttention")
    table = SegmentTable.build(segments, window, q.device)
    upstream = torch.randn_like(q)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = attention(*exact, table, 0.125)
    wanted = torch.autograd.grad(want, exact, upstream.double())
    for run in (attention, lambda *a: _by_segment_gathered(*a)):
        out = run(q, k, v, table, 0.125)
        assert apart(out.double(), want) < 1e-2
        for a, b in zip(torch.autograd.grad(out, (q, k, v), upstream), wanted):
            assert apart(a.double(), b) < 2e-2


def _by_segment_gathered(q, k, v, table, scale):
    runs = table.runs
    k, v = (torch.cat([t[a:b] for a, b in runs]) for t in (k, v))
    return _by_segment(q, k, v, table, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_decoder_on_the_gpu_equals_float32_on_the_cpu(dtype):
    batch = collate_pairs([pair(0, 40, 30, 20), pair(1, 9, 12, 30)])
    want, wanted = loss_and_gradients(Decoder(live_stack(make_model()), torch.float32), batch)
    stack = live_stack(make_model())
    stack.model.cuda()
    for name, parameter in stack.model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    got, grads = loss_and_gradients(Decoder(stack, dtype), batch.to("cuda"))
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
    assert torch.equal(decoder.token_logps(batch).detach(), decoder.token_logps(batch, reference=True))


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
    run_sft(load_config("sft", None, words(tiny_base, tmp_path / "r", chat_rows, dtype=dtype, optim=optim)), say=quiet)
    losses = metrics(tmp_path / "r" / "sft")
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    settings = words(tiny_base, tmp_path / "r", pair_rows, max_prompt_length=64, dtype=dtype, optim=optim, beta=0.1)
    run_dpo(load_config("dpo", None, settings), say=quiet)
    assert metrics(tmp_path / "r" / "dpo")[0] == pytest.approx(LN2, abs=1e-6)
