"""Complete checkpoints, copied elsewhere while a run goes on, and a run fetched from there by a new machine."""
