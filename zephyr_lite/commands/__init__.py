"""The commands beside training: each module is one command (``data_chat`` is ``zephyr-lite data chat``): parse, call, print."""
