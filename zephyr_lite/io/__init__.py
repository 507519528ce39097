"""Files: atomic writes, locks, safetensors, a run's folder, copies elsewhere."""
