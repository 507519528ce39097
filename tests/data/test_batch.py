"""A batch goes to a device in one copy."""

import torch
from torch import Tensor

from tests.numeric import pair
from zephyr_lite.data.batch import collate_pairs


def test_a_batch_is_moved_as_one_block():
    batch = collate_pairs([pair(0, 9, 6, 4), pair(1, 5, 3, 7)])
    there = batch.to("cpu")
    tables = {name: value for name, value in vars(there).items() if isinstance(value, Tensor) and name != "host_tokens"}
    assert {"tokens", "positions", "streams", "segment_starts", "target_rows", "target_ids", "group_sizes"} == set(
        tables
    )
    for name, table in tables.items():
        assert torch.equal(table, getattr(batch, name)) and table.data_ptr() % 16 == 0, name
    assert len({table.untyped_storage().data_ptr() for table in tables.values()}) == 1
    assert there.host_tokens is batch.tokens
    assert there.segment_starts.tolist() == [[0, 15, 19, 27, 34], [0, 15, 28, 36, 48]]
