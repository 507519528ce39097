"""Best-fit packing and what is cut."""

from __future__ import annotations

import random

import numpy as np
import pytest

from zephyr_lite.data.chat_template import PairExample
from zephyr_lite.data.messages import RowError
from zephyr_lite.data.packing import best_fit, cut_pair


def naive(lengths: list[int], capacity: int) -> int:
    """How many bins best-fit decreasing opens, found by looking at every bin for every item."""
    rooms: list[int] = []
    for size in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(capacity - size)
    return len(rooms)


def test_every_item_lies_in_one_bin_and_no_bin_overflows():
    rng = random.Random(0)
    for _ in range(60):
        capacity = rng.randint(1, 60)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(0, 80))]
        bins = best_fit(lengths, capacity)
        assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in items) <= capacity for items in bins)
        assert len(bins) == naive(lengths, capacity)
        assert bins == best_fit(np.asarray(lengths, dtype=np.int64), capacity)
        assert all(items == sorted(items) for items in bins)
        assert [items[0] for items in bins] == sorted(items[0] for items in bins)


def make_pair(prompt: int, chosen: int, rejected: int) -> PairExample:
    def ids(start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.int32)

    return PairExample(
        ids(1, prompt), ids(1000, chosen), np.ones(chosen, bool), ids(2000, rejected), np.ones(rejected, bool)
    )


def test_a_long_pair_is_cut_on_the_prompts_left_then_on_each_responses_right():
    pair = make_pair(20, 4, 30)
    short = cut_pair(pair, 24, 10, True)
    assert short.prompt_ids.tolist() == [1, *range(12, 21)]  # BOS stays, once
    assert short.chosen_ids.tolist() == [1000, 1001, 1002, 1003]  # fits by itself: not cut to the other's length
    assert short.rejected_ids.tolist() == list(range(2000, 2014)) and len(short.rejected_mask) == 14
    without_bos = cut_pair(pair, 24, 10, False)
    assert without_bos.prompt_ids.tolist() == list(range(11, 21))
    assert cut_pair(pair, 24, 1, True).prompt_ids.tolist() == [1]
    assert cut_pair(pair, 24, 1, False).prompt_ids.tolist() == [20]


def test_a_prompt_that_leaves_no_room_is_refused():
    for longest in (10, 512):
        with pytest.raises(RowError, match="leaves no room in max_length 10"):
            cut_pair(make_pair(20, 4, 4), 10, longest, True)
    assert len(cut_pair(make_pair(20, 4, 4), 10, 9, True).chosen_ids) == 1
