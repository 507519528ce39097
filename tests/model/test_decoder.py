"""What the decoder trains."""

import torch

from tests.conftest import make_model
from tests.numeric import live_stack


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
