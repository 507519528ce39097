"""``python -m zephyr_lite`` is ``zephyr-lite``."""

from .cli import main

if __name__ == "__main__":
    main()
