"""The package's messages, for tests."""

from zephyr_lite.io import logging as messages


def messages_to(write):
    """Within, every message goes to a function, as text."""
    return messages.messages_to(lambda record: write(record.getMessage()))
