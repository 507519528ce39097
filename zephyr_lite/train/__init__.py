"""Training: one file a stage, and the loop that both share."""
