"""A machine of the tests' own: a temporary HOME, an environment of the variables named in ``INHERITED`` only, and signals
that interrupt even where the suite was started in the background. Imported first, before anything reads these."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from pathlib import Path

# Everything else (the user's tokens, terminal, locale, time zone, proxies, caches, launcher variables) stays outside.
INHERITED = (
    "PATH",
    "LD_",
    "TMPDIR",
    "PYTEST_",
    "PYTHONPATH",
    "CUDA_",
    "NVIDIA_",
    "TRITON_",
    "OPENBLAS_",
    "OMP_",
    "CHROMIUM",
)
ROOT = Path(__file__).parent.parent
HOME = Path(tempfile.mkdtemp(prefix="zephyr-lite-home-"))
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
for variable in [name for name in os.environ if not name.startswith(INHERITED)]:
    del os.environ[variable]
os.environ.update(
    HOME=str(HOME),
    # of the commands that tests start
    PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    LANG="C.UTF-8",
    TZ="UTC",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # as the command line sets it in a pipe; the tests import transformers before
    COLUMNS="80",
    LINES="24",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    TORCHDYNAMO_DISABLE="1",  # bitsandbytes compiles what odd shapes need on a CPU: half a minute
)
os.environ.setdefault("TRITON_CACHE_DIR", str(HOME / "triton"))  # one for all workers
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for a second thread
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job and its children ignore it
signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and where a script traps this one, too
