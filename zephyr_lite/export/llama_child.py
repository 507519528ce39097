"""llama.cpp in a child process: it aborts its process on some files, and writes to standard error.

python -m zephyr_lite.export.llama_child quantize IN OUT TYPE
python -m zephyr_lite.export.llama_child tokenize FILE     (texts as a JSON list on standard input, ids on output)
"""

from __future__ import annotations

import ctypes
import json
import os
import sys


def quantize(source: str, out: str, kind: str) -> int:
    """As the ``llama-quantize`` program: 0 on success."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params)))


def tokenize(file: str, texts: list[str]) -> list[list[int]]:
    """The ids that a server feeds: special tokens are parsed, BOS is added if the file says so."""
    import llama_cpp

    model = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    try:
        return [model.tokenize(text.encode("utf-8"), add_bos=True, special=True) for text in texts]
    finally:
        model.close()


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        sys.exit(quantize(*sys.argv[2:5]))
    json.dump(tokenize(sys.argv[2], json.load(sys.stdin)), sys.stdout)
