"""Packing of conversations into rows, and cutting of pairs to their budget."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from .chat_template import PairExample
from .messages import RowError


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first, goes into the bin that it leaves the least room in.

    Args:
        lengths: of the items; each between 1 and ``capacity``.
        capacity: of a bin.

    Returns:
        Bins of item indices, ascending in each, bins ordered by their first item; a function of the arguments alone.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    assert sizes.min() >= 1 and sizes.max() <= capacity, (sizes.min(), sizes.max(), capacity)
    bins: list[list[int]] = []
    # open bins by their room: at most `capacity` different ones, so a search is a bisection and an insertion is cheap
    rooms: list[int] = []
    by_room: dict[int, list[int]] = {}
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        place = bisect_left(rooms, size)
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[number].append(item)
        if left := room - size:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(number)
    return sorted(map(sorted, bins))


def cut_pair(pair: PairExample, max_length: int, max_prompt_length: int, keeps_first: bool) -> PairExample:
    """A pair within the budget of prompt + one response.

    A pair that fits is not changed, however long its prompt. Otherwise the prompt is cut on its left to
    ``max_prompt_length``, and then each response on its right. BOS, if the model has one, stays the first token: models
    that were trained with it give the first token of a sequence a role of its own.

    Args:
        pair: of ``ChatTemplate.encode_pair``.
        max_length: tokens of the prompt and one response.
        max_prompt_length: tokens of a cut prompt.
        keeps_first: the prompt's first token is BOS.

    Raises:
        RowError: the prompt leaves no room for a response.
    """
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    if len(prompt) + max(len(chosen), len(rejected)) <= max_length:
        return pair
    if len(prompt) > max_prompt_length:
        first = prompt[: int(keeps_first)]
        prompt = np.concatenate([first, prompt[len(prompt) - max_prompt_length + len(first) :]])
    room = max_length - len(prompt)
    if room < 1:
        raise RowError(
            f"the prompt is longer than the budget: max_prompt_length {max_prompt_length} leaves no room in max_length "
            f"{max_length}"
        )
    return PairExample(prompt, chosen[:room], pair.chosen_mask[:room], rejected[:room], pair.rejected_mask[:room])
