"""Merging a chain of adapters into one model folder, streamed from file to file, and comparing it with the live stack."""

from ..model.chain import Chain, chain_of_adapters, chain_of_run
from .measure import LogpDifference, compare_logps
from .weights import MergeReport, adapter_only, merge

__all__ = [
    "Chain",
    "LogpDifference",
    "MergeReport",
    "adapter_only",
    "chain_of_adapters",
    "chain_of_run",
    "compare_logps",
    "merge",
]
