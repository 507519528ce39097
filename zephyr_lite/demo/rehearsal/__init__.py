"""``--smoke``: a run in minutes, before the night is spent. ``reproduce``: a recipe from its first step to a row of results."""
