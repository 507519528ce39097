"""Rows → the files of a data set in the hub's layout: ``SPLIT.parquet`` (in shards if it is large) or ``SPLIT.jsonl``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

FileFormat = Literal["parquet", "jsonl"]
SHARD_BYTES = 500_000_000
_BATCH = 1000


def write_split(folder: Path, split: str, rows: datasets.Dataset, file_format: FileFormat) -> list[Path]:
    """Write a split in batches, so that memory does not grow with it; the same rows always give the same bytes.

    Args:
        folder: exists.
        split: the file's name before its suffix.
        rows: at least one.
        file_format: Parquet compressed with zstd, its schema carrying ``datasets``' features; or JSONL in UTF-8.

    Returns:
        The files, in the order of the rows.
    """
    arrow = rows.with_format("arrow")
    if file_format == "jsonl":
        path = folder / f"{split}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for start in range(0, len(rows), _BATCH):
                for row in arrow[start : start + _BATCH].to_pylist():
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return [path]
    schema = rows.features.arrow_schema
    # the names of shards need their number, so sizes come first
    size = sum(arrow[start : start + _BATCH].combine_chunks().nbytes for start in range(0, len(rows), _BATCH))
    shards = max(1, math.ceil(size / SHARD_BYTES))
    per_shard = math.ceil(len(rows) / shards)
    paths = []
    for shard in range(shards):
        name = split if shards == 1 else f"{split}-{shard:05d}-of-{shards:05d}"
        path = folder / f"{name}.parquet"
        end = min(len(rows), (shard + 1) * per_shard)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for start in range(shard * per_shard, end, _BATCH):
                table: pa.Table = arrow[start : min(end, start + _BATCH)]
                # the chunks of rows from several processes' files have other sizes
                writer.write_table(table.cast(schema).combine_chunks())
        paths.append(path)
    return paths
