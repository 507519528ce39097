"""Rows in, examples out: sources, chat templates, packing and batches. Knows nothing of models or training."""
