"""The page of ``zephyr-lite ui``: its buttons call what the command line calls."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
