"""The configuration of a run: schema, YAML files, presets, and the keys of other trainers."""
