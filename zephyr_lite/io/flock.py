"""flock, which the system lets go of however a process ends."""

from __future__ import annotations

import sys

if sys.platform != "win32":
    import fcntl


def flock(handle: int) -> bool | None:
    """Lock an open file or folder, without waiting.

    Returns:
        True: it is ours until the handle is closed; False: somebody else's; None: this system, or this file system, knows
        no such lock.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None
