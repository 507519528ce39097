"""A chain of adapters becomes one model folder, streamed from file to file; then it is compared with the live stack."""

from ..model.chain import Chain, chain_of_adapters, chain_of_run
from .check import LogpDifference, compare_logps, folder_logps
from .weights import MergeReport, adapter_only, merge

__all__ = [
    "Chain",
    "LogpDifference",
    "MergeReport",
    "adapter_only",
    "chain_of_adapters",
    "chain_of_run",
    "compare_logps",
    "folder_logps",
    "merge",
]
