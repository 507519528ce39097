"""The fused engine, TRL and Unsloth on a Mistral-7B in NF4 on one NVIDIA card: tokens/s (SFT), pairs/s (DPO), peak memory.

    python -m bench.gpu --out gpu.json                    # a consumer card of 24 GiB, imitated on a larger one
    python -m bench.gpu --cap 24 12 --out gpu.json

The model has random weights (built once, 4 GB, see ``mistral``), the rows have the lengths of real ones (``rows``).
Every engine tries its settings (micro-batches, recomputation on and off); its fastest that fits counts (``contest``). A
setting that does not fit, and an engine that is missing or refuses, is a result. The whole takes ``--minutes``: where time
is short, settings and rounds are dropped, never an engine.
"""

from bench.command import run

# Engines' processes import this file too, before anything else: nothing heavy may be imported here (see ``process``).

if __name__ == "__main__":
    from bench.contest import main

    run(main)
