"""The package's messages and a run's logged steps, for tests."""

from zephyr_lite.io import logging as messages
from zephyr_lite.train.stage import Observer


def messages_to(write):
    """Within, every message goes to a function, as text."""
    return messages.messages_to(lambda record: write(record.getMessage()))


class Logged(Observer):
    """Calls a function with every logged step and evaluation."""

    def __init__(self, function):
        self.on_log = function
