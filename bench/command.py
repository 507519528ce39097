"""How every bench ends when it is run as a command."""

import sys
from collections.abc import Callable
from typing import Any

from zephyr_lite.errors import UserError


def run(main: Callable[[], Any]) -> None:
    """Call it; what the user can mend is said in words, without a traceback."""
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
