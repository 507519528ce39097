"""What the decoder trains, and what a batch of pairs holds."""

import torch

from tests.conftest import make_model
from tests.numeric import live_stack, pair
from zephyr_lite.data.batch import Batch, Segment, collate_pairs


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
