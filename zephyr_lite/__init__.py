"""zephyr-lite: a base Mistral-7B becomes a chat model, the way Zephyr was made, on one consumer GPU."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns at import that a kernel from the hub is missing. Nothing here calls it: it serves inference on
# processors with AVX512-BF16, after repacking the weights in place, which is switched off (see model/load.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
