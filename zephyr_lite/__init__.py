"""zephyr-lite: a base Mistral-7B becomes a chat model, the way Zephyr was made, on one consumer GPU."""

# No imports here: under ``python -m zephyr_lite`` the current folder is on the path until __main__ removes it.

__version__ = "0.1.0"

__all__ = ["__version__", "fuse"]


def __getattr__(name: str):
    """``zephyr_lite.fuse``, imported when asked for: torch and transformers take seconds."""
    if name == "fuse":
        from .model.fuse import fuse

        return fuse
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
