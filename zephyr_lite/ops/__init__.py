"""One operation a file. What computes here knows nothing of models, data or training."""
