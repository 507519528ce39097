"""The first lines of an engine's process. Nothing heavy is imported here: Unsloth has to come before transformers."""

from __future__ import annotations

import os
import pickle
from multiprocessing.connection import Connection

from zephyr_lite.errors import UserError


def begin(pipe: Connection, engine: str, folder: str | None, packed: bytes) -> None:
    """Run ``turns.worker``.

    Args:
        folder: where to work, and where libraries may keep what they generate, which several at once must not share.
        packed: the worker's other arguments, pickled: unpickling them imports everything.
    """
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        os.environ["UNSLOTH_COMPILE_LOCATION"] = os.path.join(folder, "unsloth")
        os.environ["HF_DATASETS_CACHE"] = os.path.join(folder, "datasets")
    if engine == "unsloth":
        from zephyr_lite.train.baselines import start_unsloth

        try:
            start_unsloth()
        except UserError as error:
            pipe.send({"kind": "refused", "error": str(error)})
            return
    from bench.turns import worker

    worker(pipe, *pickle.loads(packed))
