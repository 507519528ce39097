"""The page of ``zephyr-lite ui``: its buttons call what the command line calls."""
