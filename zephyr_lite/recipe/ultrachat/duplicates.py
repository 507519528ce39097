"""Which rows stay: duplicates are found among all rows, with arrays in files instead of memory, and the test split drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .near import BANDS, PERMUTATIONS, equal_groups, join_near, memmap

KEPT, FAULTY, EXACT, NEAR = 0, 1, 2, 3
_BATCH = 100_000


@dataclass(frozen=True)
class Fates:
    """What becomes of each row.

    Attributes:
        fate: uint8 [rows]: kept, faulty (the first pass says why), an exact or a near duplicate.
        of: int64 [rows]: of a duplicate, the row that stays instead.
        prompt: uint64 [rows], the prompts' hashes.
    """

    fate: np.ndarray
    of: np.ndarray
    prompt: np.ndarray

    def kept(self) -> int:
        return int((self.fate == KEPT).sum())


def find_duplicates(scanned: datasets.Dataset, folder: Path, threshold: float | None) -> Fates:
    """Exact and near duplicates among the rows that have no fault; the first of a group stays.

    Args:
        scanned: of the first pass.
        folder: for the arrays; about 600 bytes a row.
        threshold: the Jaccard similarity from which on rows are near duplicates; None for exact ones only.
    """
    count = len(scanned)
    fate = memmap(folder / "fate.npy", np.uint8, (count,))
    parent = memmap(folder / "parent.npy", np.int64, (count,))
    prompt = memmap(folder / "prompt.npy", np.uint64, (count,))
    exact = memmap(folder / "exact.npy", np.uint64, (2, count))
    bands = memmap(folder / "bands.npy", np.uint64, (BANDS, count if threshold is not None else 0))
    marks = memmap(folder / "marks.npy", np.uint16, (count if threshold is not None else 0, PERMUTATIONS))
    arrow = scanned.with_format("arrow")
    for start in range(0, count, _BATCH):
        table = arrow[start : start + _BATCH]
        stop = start + len(table)
        fate[start:stop] = pc.not_equal(table["fault"], "").to_numpy()
        parent[start:stop] = np.arange(start, stop)
        prompt[start:stop] = table["prompt_hash"].to_numpy()
        exact[:, start:stop] = _fixed(table["exact"], np.uint64).T
        if threshold is not None:
            bands[:, start:stop] = _fixed(table["bands"], np.uint64).T
            marks[start:stop] = _fixed(table["signature"], np.uint16)
    for rows, begins in equal_groups(exact[0], fate == KEPT):
        sizes = np.diff(np.concatenate((begins, [len(rows)])))
        first = np.repeat(rows[begins], sizes)
        same = (exact[1][rows] == exact[1][first]) & (rows != first)
        fate[rows[same]] = EXACT
        parent[rows[same]] = first[same]
    if threshold is not None:
        near = memmap(folder / "near.npy", np.int64, (count,))
        near[:] = np.arange(count)
        join_near(bands, marks, fate == KEPT, near, threshold)
        for start in range(0, count, _BATCH):
            rows = np.flatnonzero(near[start : start + _BATCH] != np.arange(start, min(start + _BATCH, count))) + start
            fate[rows] = NEAR
            parent[rows] = near[rows]
    return Fates(fate, parent, prompt)


def _fixed(column: pa.ChunkedArray, kind: type) -> np.ndarray:
    """A binary column whose values have one length → an array with a row for each."""
    array = column.combine_chunks()
    if hasattr(array, "num_chunks"):
        array = array.chunk(0)
    bounds = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(array.buffers()[2], np.uint8)[bounds[0] : bounds[-1]]
    return data.view(kind).reshape(len(array), -1)


def test_limit(fates: Fates, test: float) -> int:
    """The hash below which a prompt belongs to the test split, so that a prompt is in one split only.

    Args:
        test: below 1 a share of the prompts; from 1 on a number of rows, which is not exceeded.
    """
    if test < 1:
        return int(test * 2.0**64)
    low, high = 0, 2**64  # the largest limit that leaves at most so many rows below it
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _below(fates, middle) <= test else (low, middle - 1)
    return low


def _below(fates: Fates, limit: int) -> int:
    if limit >= 2**64:
        return fates.kept()
    return sum(
        int(((fates.prompt[s : s + _BATCH] < np.uint64(limit)) & (fates.fate[s : s + _BATCH] == KEPT)).sum())
        for s in range(0, len(fates.fate), _BATCH)
    )


def write_kept(fates: Fates, limit: int, folder: Path) -> dict[str, tuple[str, int]]:
    """The numbers of the rows of each split, in files.

    Returns:
        split → (file of int64, how many).
    """
    found = {}
    for split in ("train_sft", "test_sft"):
        parts = []
        for start in range(0, len(fates.fate), _BATCH):
            kept = np.asarray(fates.fate[start : start + _BATCH] == KEPT)
            prompt = fates.prompt[start : start + _BATCH]
            test = np.ones(len(kept), bool) if limit >= 2**64 else prompt < np.uint64(limit)
            parts.append(np.flatnonzero(kept & (test if split == "test_sft" else ~test)) + start)
        numbers = np.concatenate(parts)
        np.save(folder / f"{split}.npy", numbers.astype(np.int64))
        found[split] = (str(folder / f"{split}.npy"), len(numbers))
    return found


test_limit.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test
